"""Predictor: a loaded model as a stage of Ray Data's pipelines."""

import hashlib
import json
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from llama.server.errors import invalid
from llama.server.offline import Offline, Reply, Request
from llama.server.settings import UNLIMITED, Settings

PATHS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions"}
LOST = (
    "n",
    "stream",
    "tools",
    "functions",
    "logprobs",
)  # parameters whose answers are more than a text


class Predictor:
    """Answers prompts or dialogs, with one engine in each actor:

        ds = ray.data.from_items([{"prompt": "The capital of France is"}])
        ds.map_batches(
            llama.ray.Predictor, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=4,
            fn_constructor_kwargs={
                "ckpt_dir": "checkpoints/SmolLM2-135M-Instruct", "body": {"temperature": 0},
            },
        )

    Calls may overlap (`max_concurrent_calls_per_actor` with `enable_true_multi_threading`): their
    rows run together.

    Args:
        ckpt_dir: the same path, or a remote one, on all machines.
        body: parameters of `/v1/completions` or `/v1/chat/completions` for all rows.
        settings: more of the server's, such as `cache_tokens`.
        options: of `Llama.build`.

    Raises:
        ValueError: a parameter in `body` whose answer the columns can't hold.
        ValueError, OSError: what loading the model fails with.
    """

    def __init__(
        self,
        ckpt_dir: str,
        body: Optional[Mapping[str, Any]] = None,
        settings: Optional[Mapping[str, Any]] = None,
        **options: Any,
    ):
        limits = Settings(**{**UNLIMITED, **(settings or {})})
        self._body = dict(body or {})
        for name in LOST:
            if self._body.get(name) and (name, self._body[name]) != ("n", 1):
                raise ValueError(
                    f"body: {name}={self._body[name]!r:.100}: a row gets one text; `llama batch` "
                    "keeps whole answers"
                )
        self._model = Offline({"ckpt_dir": ckpt_dir, **options}, limits)

    def __call__(self, batch: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """A batch of rows with a column `prompt` (texts) or `messages` (lists of objects).

        Rows without a seed get one from what they ask, so that the same row has the same answer
        wherever and whenever it is computed; a column `seed` says another.

        Returns:
            The batch with columns `generation`, `finish_reason` and `error`: where that is a text,
            the others are None.

        Raises:
            ValueError: neither column, or both.
        """
        [*names] = PATHS.keys() & batch.keys()
        if len(names) != 1:
            raise ValueError(f"columns {', '.join(batch)}: give one of prompt and messages")
        [name] = names
        requests, failed = [], {}
        for i, value in enumerate(batch[name]):
            try:
                body = {**self._body, name: _plain(value)}
                if "seed" in batch:
                    body["seed"] = int(batch["seed"][i])
                data = json.dumps(body).encode()
            except (TypeError, ValueError) as error:
                failed[i] = Reply(i, 400, json.dumps(invalid(f"row {i}: {error}").body).encode())
                continue
            seed = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")
            requests.append(Request(i, PATHS[name], data, seed))
        columns: Dict[str, List[Any]] = {"generation": [], "finish_reason": [], "error": []}
        replies = failed | {reply.number: reply for reply in self.answer(requests)}
        for _, reply in sorted(replies.items()):
            answer = json.loads(reply.body)
            choice = answer["choices"][0] if reply.status == 200 else {}
            columns["generation"].append(
                choice.get("message", {}).get("content", choice.get("text"))
            )
            columns["finish_reason"].append(choice.get("finish_reason"))
            columns["error"].append(None if choice else answer["error"]["message"])
        return {**batch, **{name: np.array(found, object) for name, found in columns.items()}}

    def answer(self, requests: Sequence[Request]) -> List[Reply]:
        """The replies, in the order of the requests."""
        return [future.result() for future in [*map(self._model.submit, requests)]]


def _plain(value: Any) -> Any:
    """A value of a column as one of JSON."""
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return value.decode() if isinstance(value, bytes) else value
