"""The parameters of a body as the options of the engine."""

from dataclasses import fields
from typing import Any, Dict, Optional

from llama.engine.params import SamplingParams
from llama.server.bodies import Generation
from llama.server.errors import invalid
from llama.tokenizer import Tokenizer

_SAME = {field.name for field in fields(SamplingParams)} & set(Generation.__struct_fields__)
_GUIDED = {
    "guided_regex": lambda regex: {"type": "regex", "regex": regex},
    "guided_json": lambda schema: {"type": "json_schema", "schema": schema},
    "guided_choice": lambda texts: {"type": "choice", "choice": texts},
    "guided_grammar": lambda grammar: {"type": "grammar", "grammar": grammar},
}


def options_of(body: Generation, tokenizer: Tokenizer) -> Dict[str, Any]:
    """Keyword arguments for `AsyncEngine.submit`, but for max_gen_len.

    Raises:
        ApiError: parameters out of range, or that exclude each other.
        ValueError: what SamplingParams raises.
    """
    given = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    if body.logit_bias is not None:
        bias = given["logit_bias"] = {}
        for name, value in body.logit_bias.items():
            if not (name.isdecimal() and int(name) < tokenizer.n_words):
                raise invalid(
                    f"logit_bias: {name[:100]!r} is no token id; they are 0 to "
                    f"{tokenizer.n_words - 1}", "logit_bias",
                )  # fmt: skip
            bias[int(name)] = value
    options: Dict[str, Any] = {"params": SamplingParams(**given), "n": _count(body)}
    for name in ("seed", "cache_prompt", "priority"):
        if getattr(body, name) is not None:
            options[name] = getattr(body, name)
    if body.seed is not None and not -(1 << 63) <= body.seed < 1 << 63:
        raise invalid(f"seed={body.seed} must have at most 64 bits", "seed")
    if body.priority is not None and abs(body.priority) > 1000:
        raise invalid(f"priority={body.priority} must lie between -1000 and 1000", "priority")
    if body.stop is not None:
        options["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
        if len(options["stop"]) > 16 or not all(options["stop"]):
            raise invalid("stop: at most 16 texts, none of them empty", "stop")
    if body.stop_token_ids or body.ignore_eos:
        usual = set() if body.ignore_eos else tokenizer.stop_tokens
        options["stop_tokens"] = usual | set(body.stop_token_ids or ())
    form = constraint(body)
    if form is not None:
        if body.ignore_eos:
            raise invalid("ignore_eos: a constrained answer has an end", "ignore_eos")
        options["response_format"] = form
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: only for stream: true", "stream_options")
    return options


def _count(body: Generation) -> int:
    if body.n is not None and not 1 <= body.n <= 128:
        raise invalid(f"n={body.n} must lie between 1 and 128", "n")
    return body.n or 1


def constraint_name(body: Generation) -> str:
    """The parameter from which an answer's response format comes."""
    names = (*_GUIDED, "response_format")
    return next((name for name in names if getattr(body, name) is not None), "tools")


def constraint(body: Generation) -> Optional[Dict[str, Any]]:
    """The response format that a body asks for, tools aside.

    Raises:
        ApiError: it asks for several.
    """
    found = {
        name: make(getattr(body, name))
        for name, make in _GUIDED.items()
        if getattr(body, name) is not None
    }
    if body.response_format is not None and body.response_format != {"type": "text"}:
        found["response_format"] = body.response_format
    if len(found) > 1:
        raise invalid(f"{' and '.join(sorted(found))}: choose one", sorted(found)[0])
    return next(iter(found.values()), None)
