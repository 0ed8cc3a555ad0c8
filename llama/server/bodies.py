"""Bodies of requests: their parameters, and how JSON becomes one of them."""

import asyncio
import json
import re
from typing import (
    Annotated,
    Any,
    Dict,
    List,
    Literal,
    Mapping,
    Optional,
    Tuple,
    Type,
    TypeVar,
    Union,
)

import msgspec
from msgspec import Meta, Struct, field
from starlette.requests import ClientDisconnect, Request

from llama.server.errors import ApiError, invalid

Texts = Union[str, List[str]]
Inputs = Union[str, List[Union[str, int, List[int]]]]  # ids alone are one text


Note = Annotated[str, Meta(max_length=512)]  # OpenAI's bounds
Metadata = Annotated[Dict[Annotated[str, Meta(max_length=64)], Note], Meta(max_length=16)]


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """What all bodies have. These are the client's own notes, and change no answer."""

    model: Optional[str] = None
    user: Optional[Note] = None
    metadata: Optional[Metadata] = None
    safety_identifier: Optional[Note] = None
    prompt_cache_key: Optional[Note] = None
    prompt_cache_retention: Optional[Literal["in_memory"]] = None
    store: Optional[Literal[False]] = None
    service_tier: Optional[Literal["auto", "default"]] = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # as load testers for vLLM ask: in every chunk, so far
    include_obfuscation: Literal[False] = False


class Sampling(Body, kw_only=True):
    """How tokens are chosen: OpenAI's parameters, and below them the field's extras."""

    temperature: Optional[float] = None
    top_p: Optional[float] = None
    stop: Optional[Texts] = None
    seed: Optional[int] = None
    logit_bias: Optional[Dict[str, float]] = None
    presence_penalty: Optional[float] = None
    frequency_penalty: Optional[float] = None

    top_k: Optional[int] = None
    min_p: Optional[float] = None
    typical_p: Optional[float] = None
    repetition_penalty: Optional[float] = None
    min_tokens: Optional[int] = None
    ignore_eos: Optional[bool] = None
    stop_token_ids: Optional[List[int]] = None
    guided_regex: Optional[str] = None
    guided_json: Optional[Dict[str, Any]] = None
    guided_choice: Optional[List[str]] = None
    guided_grammar: Optional[str] = None
    cache_prompt: Optional[bool] = None
    priority: Optional[int] = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_completion_tokens", "seed", "top_k"):
            if getattr(self, name, None) == -1:  # as other servers spell what isn't given
                setattr(self, name, None)


class Generation(Sampling, kw_only=True):
    """How an answer is generated."""

    max_tokens: Optional[int] = None
    n: Optional[int] = None
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None
    response_format: Optional[Dict[str, Any]] = None


class Completion(Generation, kw_only=True):
    prompt: Optional[Inputs] = None
    add_special_tokens: bool = True
    parse_special: bool = False
    echo: Optional[bool] = None
    logprobs: Optional[int] = None
    suffix: Optional[Literal[""]] = None
    best_of: Optional[int] = None


class FunctionCall(Struct, forbid_unknown_fields=True):
    name: str
    arguments: str
    parsed_arguments: Any = None  # the SDK's own


class Call(Struct, forbid_unknown_fields=True):
    function: FunctionCall
    id: Optional[str] = None
    type: Literal["function"] = "function"
    index: Optional[int] = None


class Part(Struct, forbid_unknown_fields=True):
    """A part of a message's content."""

    type: str
    text: Optional[str] = None
    refusal: Optional[str] = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class ChatMessage(Struct, forbid_unknown_fields=True):
    """A message. What follows `tool_call_id` is in answers of the API, and comes back with them."""

    role: Literal["developer", "system", "user", "assistant", "tool", "ipython", "function"]
    content: Union[str, List[Part], None] = None
    name: Optional[str] = None
    tool_calls: Optional[List[Call]] = None
    tool_call_id: Optional[str] = None
    refusal: Optional[str] = None
    annotations: Optional[List[Any]] = None
    parsed: Any = None  # the SDK's own
    function_call: Optional[FunctionCall] = None  # of clients from before there were tools

    def __post_init__(self) -> None:
        if self.function_call is not None:
            if self.tool_calls:
                raise ValueError("tool_calls and function_call: give one")
            self.tool_calls = [Call(self.function_call)]
        self.role = "tool" if self.role == "function" else self.role


class FunctionTool(Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: Dict[str, Any]


class Function(Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: Function


class Allowed(Struct, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: List[NamedTool]


class AllowedTools(Struct, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    allowed_tools: Allowed


Choice = Union[Literal["none", "auto", "required"], NamedTool, AllowedTools]


class Chat(Generation, kw_only=True):
    messages: List[ChatMessage]
    tools: Optional[List[FunctionTool]] = None
    add_generation_prompt: Optional[bool] = None
    continue_final_message: Optional[bool] = None
    chat_template_kwargs: Optional[Dict[str, Any]] = None
    max_completion_tokens: Optional[int] = None
    logprobs: Optional[bool] = None
    top_logprobs: Optional[int] = None
    tool_choice: Optional[Choice] = None
    parallel_tool_calls: Optional[bool] = None
    modalities: Optional[List[Literal["text"]]] = None
    reasoning_effort: Optional[Literal["none"]] = None
    verbosity: Optional[Literal["medium"]] = None
    # What `tools` and `tool_choice` were before; the answer then has a call as it was then, too.
    functions: Optional[List[Dict[str, Any]]] = None
    function_call: Union[Literal["none", "auto"], Function, None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice = self.function_call
        if (self.functions is not None and self.tools) or (choice and self.tool_choice):
            raise ValueError("functions and function_call: leave them out beside tools")
        if self.functions is not None:
            self.tools = [FunctionTool(function) for function in self.functions]
            self.parallel_tool_calls = False
        if choice is not None:
            self.tool_choice = NamedTool(choice) if isinstance(choice, Function) else choice


class Embeddings(Body, kw_only=True):
    input: Inputs
    encoding_format: Optional[Literal["float", "base64"]] = None
    dimensions: Optional[int] = None
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True


class Tokenize(Body, kw_only=True):
    prompt: Optional[str] = None
    content: Optional[str] = None
    messages: Optional[List[ChatMessage]] = None
    tools: Optional[List[FunctionTool]] = None
    add_generation_prompt: Optional[bool] = None
    continue_final_message: Optional[bool] = None
    chat_template_kwargs: Optional[Dict[str, Any]] = None
    add_special_tokens: bool = True
    parse_special: bool = False
    with_pieces: bool = False


class Detokenize(Body, kw_only=True):
    tokens: List[int] = field(default_factory=list)


# What msgspec says of an unknown key, and of a wish that can't be met; the steps of such a path.
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)` - at `\$\.(?P<path>[^`]*)`")
_WISH = re.compile(
    r".* - at `\$\.(?:(?P<path>reasoning|text)\.)?(?P<name>effort|summary|verbosity|"
    r"reasoning_effort|store|service_tier|prompt_cache_retention)`", re.DOTALL,
)  # fmt: skip
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
# Escapes in JSON: a half of a surrogate pair, and whatever else (1), pairs included.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PAIR = r"\\u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}"
_ESCAPE = re.compile(rf"({_PAIR}|\\(?!u[dD][89a-fA-F]).)|\\u[dD][89a-fA-F][\da-fA-F]{{2}}")
# The objects within a body that aren't a client's own, as schemas and arguments are.
_OBJECTS: Mapping[str, Any] = {
    "messages": {"content": {}, "tool_calls": {"function": {}}, "function_call": {}},
    "input": {"content": {}, "output": {}},
    "tools": {"function": {}},
    "stream_options": {},
    "text": {},
    "reasoning": {},
}
MOST_IGNORED = 1000
LENIENT = " (--lenient ignores it)"

B = TypeVar("B", bound=Body)
T = TypeVar("T")


async def read(request: Request, kind: Type[B], lenient: bool) -> Tuple[B, List[str]]:
    """A request's body, and the names of unknown parameters that were ignored.

    Raises:
        ApiError: 400 with the parameter at fault; 408 for a body that doesn't come.
    """
    try:
        async with asyncio.timeout(request.app.state.settings.timeout):
            data = await request.body()
    except TimeoutError:
        raise ApiError(408, "the body hasn't come in time", code="timeout") from None
    except ClientDisconnect:  # nobody reads it
        raise ApiError(499, "the client has left") from None
    if len(data) > 100_000:  # others go on meanwhile
        return await asyncio.to_thread(parse, data, kind, lenient)
    return parse(data, kind, lenient)


def parse(data: bytes, kind: Type[B], lenient: bool) -> Tuple[B, List[str]]:
    """JSON to a body. NaN, keys that occur twice and unknown parameters are errors; half of a
    surrogate pair becomes U+FFFD."""
    try:
        text = data.decode()
        if _SURROGATE.search(text):
            text = _ESCAPE.sub(lambda found: found[1] or r"\ufffd", text)
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError:
        raise invalid("the body isn't valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise invalid(f"the body isn't valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    value = _given(value)
    known = {one.encode_name for one in msgspec.structs.fields(kind)}
    ignored = [name for name in value if name not in known]
    if ignored and not lenient:
        raise invalid(
            f"unknown parameter {ignored[0][:100]!r}{LENIENT}; known ones: "
            f"{', '.join(sorted(known))}",
            ignored[0][:100],
        )
    for name in ignored:
        del value[name]
    if lenient:
        ignored += _drop_unknown(value, kind)
    return convert(value, kind), ignored


def _drop_unknown(value: Any, kind: Type[B]) -> List[str]:
    """Delete the unknown keys of objects within a body, messages and their parts; what a client
    wishes beside an answer and can't have; and tools that it doesn't run itself. Their names."""
    found: List[str] = []
    if isinstance(value.get("tools"), list):
        kept = [tool for tool in value["tools"] if _runs(tool)]
        found += [f"tools.{tool['type']}" for tool in value["tools"] if not _runs(tool)]
        value["tools"] = kept
    while len(found) < MOST_IGNORED:
        try:
            msgspec.convert(value, kind)
            break
        except (msgspec.ValidationError, OverflowError, RecursionError) as error:
            unknown = _UNKNOWN.fullmatch(str(error)) or _WISH.fullmatch(str(error))
            if unknown is None:
                break  # `convert` says what
        inner, path = value, unknown["path"] or ""
        for key, index in _STEP.findall(path):
            inner = inner[int(index)] if index else inner[key]
        del inner[unknown["name"]]
        found.append(f"{path}.{unknown['name']}".lstrip("."))
    return found


def _runs(tool: Any) -> bool:
    """Whether a client runs a tool; false: the API would, or it isn't of JSON."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    return not isinstance(kind, str) or kind == "function"


def convert(value: Any, kind: Type[T], *, strict: bool = True) -> T:
    """A JSON value as a typed one.

    Args:
        strict: false: numbers may come as texts, as in queries of addresses.

    Raises:
        ApiError: 400 with the parameter at fault.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        text, _, path = str(error).replace("`", "").partition(" - at $.")
        missing = re.search(r"required field (\S+)", text)
        param = path or (missing[1] if missing else None)
        place = f"{param}: " if path else ""
        lenient = _UNKNOWN.fullmatch(str(error)) or _WISH.fullmatch(str(error))
        hint = LENIENT if lenient else ""
        raise invalid(f"{place}{text[:1].lower()}{text[1:]}{hint}", param) from None


def _given(value: Dict[str, Any], within: Mapping[str, Any] = _OBJECTS) -> Dict[str, Any]:
    """Without what is null: clients write so what they don't give, known or not.

    Args:
        within: the names of objects, or of lists of them, for which the same holds.
    """

    def plain(name: str, one: Any) -> Any:
        if name in within and isinstance(one, list):
            return [_given(x, within[name]) if isinstance(x, dict) else x for x in one]
        return _given(one, within[name]) if name in within and isinstance(one, dict) else one

    return {name: plain(name, one) for name, one in value.items() if one is not None}


def _once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")
