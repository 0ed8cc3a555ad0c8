"""Which replica a request goes to: one whose cache holds the beginning of its prompt.

Keys are hashes of what a prompt begins with, and each replica has a hash with each key; the highest
takes the requests of that key (rendezvous hashing). So all that route agree without telling each
other, and a replica that comes or goes moves its own share of the conversations only.
"""

import random
from hashlib import blake2b
from itertools import takewhile
from typing import Any, Dict, List, Mapping, Optional

import msgspec
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

LEADING = (64, 256)  # characters or tokens of a prompt without messages that name it


def decoded(body: bytes) -> Dict[str, Any]:
    """A request's body; empty if it isn't a JSON object, which a replica then refuses."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def keys_of(body: Dict[str, Any]) -> str:
    """Names of what a request's prompt begins with: the system prompt, then the first message too.

    Requests with the same key have the same model, tools and leading messages. A text prompt has
    keys of its first 64 and 256 characters. Without a prompt there is no key.
    """
    model, prompt = body.get("model"), body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, (str, list)):
        return " ".join(_hash([model, prompt[:length]]) for length in LEADING)
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        return ""
    system = [*takewhile(_is_system, messages)]
    head = [model, body.get("tools"), body.get("instructions"), system]
    own = _hash([*head, messages[len(system) : len(system) + 1]])
    return f"{_hash(head)} {own}" if any(head[1:]) else own


def references(body: Dict[str, Any]) -> List[str]:
    """The ids of earlier responses and items that a request for a response goes on from."""
    items = body["input"] if isinstance(body.get("input"), list) else []
    items = [one for one in items if isinstance(one, dict)]
    found = [one.get("id") for one in items if one.get("type") == "item_reference"]
    return [one for one in (body.get("previous_response_id"), *found) if isinstance(one, str)]


def choose(keys: str, loads: Mapping[str, int], imbalance: int) -> Optional[str]:
    """The replica for a request; None: any.

    Args:
        keys: what `keys_of` returns, or the name of the only replica that can answer.
        loads: how many requests each replica has.
        imbalance: by how many more than the least busy one's a replica is overloaded.
    """
    least = min(loads.values())
    for key in keys.split():
        if key in loads:
            return key
        best = max(loads, key=lambda name: _hash([key, name]))
        if loads[best] - least <= imbalance:
            return best
    return None


class PrefixRouter(RequestRouter):
    """Ray Serve's router for replicas: `session_id` holds the keys of a request.

    A request without keys, or one whose replicas are overloaded or full, goes to the less busy one
    of two that are drawn.
    """

    def initialize_state(self, **options: Any) -> None:
        self._imbalance: int = options["imbalance"]

    async def choose_replicas(
        self,
        candidate_replicas: List[RunningReplica],
        pending_request: Optional[PendingRequest] = None,
    ) -> List[List[RunningReplica]]:
        known: Dict[str, RunningReplica] = {r.replica_id.unique_id: r for r in candidate_replicas}
        drawn = random.sample(candidate_replicas, min(2, len(known)))
        if pending_request is None or not known:
            return [drawn]
        pending_request.routing_context.should_backoff = True  # before it is tried again
        lengths = self.replica_queue_len_cache
        loads = {name: lengths.get(r.replica_id) or 0 for name, r in known.items()}
        keys = pending_request.metadata.session_id
        name = choose(keys, loads, self._imbalance)
        if name is None:
            return [drawn]
        return [[known[name]]] if name == keys else [[known[name]], drawn]


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def _hash(value: Any) -> str:
    return blake2b(msgspec.json.encode(value), digest_size=8).hexdigest()
