"""`/v1/responses`: OpenAI's newer API, on top of the chat endpoint's answers."""

import time
import uuid
from collections import OrderedDict
from contextlib import aclosing
from typing import (
    Annotated,
    Any,
    AsyncGenerator,
    Dict,
    Iterator,
    List,
    Literal,
    Optional,
    Tuple,
    Union,
)

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from llama.server.bodies import (
    LENIENT,
    Body,
    Call,
    Chat,
    ChatMessage,
    FunctionCall,
    Sampling,
    convert,
)
from llama.server.chat import shown_tools, start
from llama.server.dialogs import encode
from llama.server.errors import ApiError, as_api_error, invalid
from llama.server.items import Output
from llama.server.service import Service, ready, received
from llama.server.streams import EventStream, json, whole

KEPT = 1024  # responses
LOGPROBS = "message.output_text.logprobs"
_SAMPLING = set(Sampling.__struct_fields__) - set(Body.__struct_fields__)


class Item(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An item of the input: a message, a call of a tool, its result, or an earlier item's id.

    What follows `status` is in answers of the API, and comes back with them, as does the reasoning
    that OpenAI's own models and other servers put before an answer. No prompt has it.
    """

    type: Literal[
        "message", "function_call", "function_call_output", "item_reference", "reasoning"
    ] = "message"
    role: Optional[str] = None
    content: Union[str, List[Dict[str, Any]], None] = None
    name: Optional[str] = None
    arguments: Optional[str] = None
    call_id: Optional[str] = None
    output: Union[str, List[Dict[str, Any]], None] = None
    id: Optional[str] = None
    status: Optional[str] = None
    phase: Optional[str] = None
    summary: Optional[List[Dict[str, Any]]] = None  # of reasoning, as is the next one
    encrypted_content: Optional[str] = None
    parsed_arguments: Any = None  # the SDK's own


class TextOptions(Struct, forbid_unknown_fields=True):
    format: Optional[Dict[str, Any]] = None
    verbosity: Optional[Literal["medium"]] = None


class Reasoning(Struct, forbid_unknown_fields=True):
    effort: Optional[Literal["none"]] = None
    summary: Optional[Literal["none"]] = None


class Responses(Sampling, kw_only=True):
    input: Union[str, List[Item]]
    instructions: Optional[str] = None
    previous_response_id: Optional[str] = None
    store: Optional[bool] = None  # type: ignore[assignment]  # here it is offered
    stream: Optional[bool] = None
    stream_options: Optional[Dict[str, Literal[False]]] = None
    max_output_tokens: Optional[int] = None
    top_logprobs: Optional[int] = None
    include: Optional[
        List[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]]
    ] = None
    text: Optional[TextOptions] = None
    tools: Optional[List[Dict[str, Any]]] = None
    tool_choice: Union[str, Dict[str, Any], None] = None
    parallel_tool_calls: Optional[bool] = None
    max_tool_calls: Optional[int] = None  # of OpenAI's own tools, which aren't offered
    truncation: Optional[Literal["auto", "disabled"]] = None
    background: Optional[Literal[False]] = None
    reasoning: Optional[Reasoning] = None
    chat_template_kwargs: Optional[Dict[str, Any]] = None


class Page(Struct, forbid_unknown_fields=True):
    """Which items of a list."""

    after: Optional[str] = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


class Retrieved(Struct, forbid_unknown_fields=True):
    stream: Literal["false"] = "false"


class Stored(Struct):
    response: Dict[str, Any]
    messages: List[ChatMessage]  # without instructions, the answer included
    items: List[Dict[str, Any]]  # of its own input


class Store:
    """The last responses, for `previous_response_id`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Stored] = OrderedDict()

    def add(self, stored: Stored) -> None:
        self._kept[stored.response["id"]] = stored
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def get(self, name: str, param: Optional[str] = None) -> Stored:
        if name not in self._kept:
            raise ApiError(
                404 if param is None else 400,
                f"there is no response {name[:100]!r}; the last {KEPT} are kept",
                param=param, code="previous_response_not_found" if param else "not_found",
            )  # fmt: skip
        return self._kept[name]

    def delete(self, name: str) -> None:
        self.get(name)
        del self._kept[name]

    def item(self, name: Optional[str]) -> Item:
        """An item of the input or the output of a response that is kept.

        Raises:
            ApiError: there is none with this id.
        """
        for item in self._items():
            if item["id"] == name:
                return convert(item, Item)
        raise invalid(f"input: there is no item {name!r:.100}", "input")

    def __contains__(self, name: str) -> bool:
        """Whether a response, or an item of one, has this id."""
        return name in self._kept or any(item["id"] == name for item in self._items())

    def _items(self) -> Iterator[Dict[str, Any]]:
        for stored in reversed(self._kept.values()):
            yield from (*stored.items, *stored.response["output"])


async def responses(request: Request) -> Response:
    service, body, headers = await received(request, Responses)
    store: Store = request.app.state.store
    items, messages, chat = _read(body, store)
    truncate = "oldest_turns" if body.truncation == "auto" else None
    try:
        answer = await start(request, service, chat, truncate)
    except (ApiError, ValueError) as error:
        raise _renamed(error) from None
    output = Output(answer, _head(service, body))

    async def events() -> AsyncGenerator[Dict[str, Any], None]:
        async with aclosing(output.events()) as found:
            async for event in found:
                if output.response["status"] != "in_progress" and body.store is not False:
                    dialog = _joined([*messages, output.message()])
                    store.add(Stored(output.response, dialog, items))
                yield event

    async def last() -> Dict[str, Any]:
        async with aclosing(events()) as found:
            async for _ in found:
                pass
        if output.failure is not None:
            raise output.failure
        return output.response

    if body.stream:
        timeout = service.settings.timeout
        close = answer.running.end
        return EventStream(events(), timeout, named=True, done=b"", headers=headers, close=close)
    reply = await whole(request, last())
    reply.headers.update(headers)
    return reply


async def input_tokens(request: Request) -> Response:
    """How many tokens a request's input has."""
    service, body, headers = await received(request, Responses)
    service.adapter(body.model)
    _, _, chat = _read(body, request.app.state.store)
    try:
        truncate = "oldest_turns" if body.truncation == "auto" else None
        asked = await encode(service, chat, shown_tools(chat) or None, truncate)
        ids = await service.computed(*asked)
    except (ApiError, ValueError) as error:
        raise _renamed(error) from None
    return json({"object": "response.input_tokens", "input_tokens": len(ids)}, headers)


async def stored(request: Request) -> Response:
    """GET and DELETE of a response."""
    ready(request)
    store, name = request.app.state.store, request.path_params["id"]
    if request.method == "DELETE":
        store.delete(name)
        return json({"id": name, "object": "response", "deleted": True})
    convert(dict(request.query_params), Retrieved)
    return json(store.get(name).response)


async def input_items(request: Request) -> Response:
    ready(request)
    page = convert(dict(request.query_params), Page, strict=False)
    items = request.app.state.store.get(request.path_params["id"]).items
    items = items if page.order == "asc" else items[::-1]
    known = [item["id"] for item in items]
    if page.after is not None and page.after not in known:
        raise invalid(f"after={page.after[:100]!r}: there is no such item", "after")
    first = known.index(page.after) + 1 if page.after else 0
    found = items[first : first + page.limit]
    ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]} if found else {}
    more = first + len(found) < len(items)
    return json({"object": "list", "data": found, "has_more": more, **ends})


def _read(body: Responses, store: Store) -> Tuple[List[Dict[str, Any]], List[ChatMessage], Chat]:
    """A body's items as they are stored, its dialog without instructions, and its chat request."""
    given = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    given = [store.item(item.id) if item.type == "item_reference" else item for item in given]
    own = [_message(i, item) for i, item in enumerate(given) if item.type != "reasoning"]
    earlier = body.previous_response_id
    known = store.get(earlier, "previous_response_id").messages if earlier else []
    messages = _joined([*known, *own])
    return [_shown(item) for item in given], messages, as_chat(body, messages)


def as_chat(body: Responses, messages: List[ChatMessage]) -> Chat:
    """The chat request that a body stands for."""
    if body.instructions is not None:
        messages = [ChatMessage(role="system", content=body.instructions), *messages]
    choice: Any = body.tool_choice
    if isinstance(choice, dict):
        tools = choice.get("tools")
        named = list(map(_nested, tools)) if isinstance(tools, list) else tools
        choice = _nested(choice | ({"tools": named} if tools else {}))
    form = body.text.format if body.text else None
    for i, tool in enumerate(body.tools or ()):
        if isinstance(tool.get("type"), str) and tool["type"] != "function":
            raise invalid(
                f"tools[{i}]: type {tool['type'][:50]!r}{LENIENT}; the server knows only functions",
                f"tools[{i}].type",
            )
    chat = {
        "tools": [_nested(tool) for tool in body.tools or ()] or None, "tool_choice": choice,
        "response_format": _nested(form) if form and form.get("type") == "json_schema" else form,
        "messages": [], "model": body.model, "max_tokens": body.max_output_tokens,
        "top_logprobs": body.top_logprobs,
        "logprobs": bool(body.top_logprobs) or LOGPROBS in (body.include or ()),
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
        **{name: getattr(body, name) for name in _SAMPLING},
    }  # fmt: skip
    return msgspec.structs.replace(convert(chat, Chat), messages=messages)


def _nested(value: Any) -> Any:
    """{"type": t, ...} as {"type": t, t: {...}}, which chat requests have instead."""
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return value
    return {"type": value["type"], value["type"]: {k: v for k, v in value.items() if k != "type"}}


def _renamed(error: Exception) -> ApiError:
    """An error of a chat request, with the parameter as it is called here."""
    found = as_api_error(error)
    param = found.body["error"]["param"] or ""
    names = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text"}
    found.body["error"]["param"] = names.get(param.partition("[")[0], param) or None
    return found


def _shown(item: Item) -> Dict[str, Any]:
    """An item as it is listed later."""
    found = {"status": "completed", "id": f"item_{uuid.uuid4().hex}", **msgspec.to_builtins(item)}
    found["type"] = item.type
    if isinstance(item.content, str):
        output: Dict[str, Any] = {"type": "output_text", "annotations": []}
        kind = output if item.role == "assistant" else {"type": "input_text"}
        found["content"] = [{**kind, "text": item.content}]
    return found


def _message(i: int, item: Item) -> ChatMessage:
    if item.type == "function_call":
        call = Call(FunctionCall(item.name or "", item.arguments or "{}"), id=item.call_id)
        return ChatMessage(role="assistant", tool_calls=[call])
    result = item.type == "function_call_output"
    content = item.output if result else item.content
    if isinstance(content, list):
        content = [*map(_part, content)]
    role = "tool" if result else item.role
    try:
        found = {"role": role, "content": content, "tool_call_id": item.call_id}
        return msgspec.convert(found, ChatMessage)
    except msgspec.ValidationError as error:
        raise invalid(f"input[{i}]: {error}".replace("`", ""), "input") from None


def _part(part: Dict[str, Any]) -> Dict[str, Any]:
    """A part of a message as chat requests have it."""
    if part.get("type") == "input_image" and part.get("image_url") is not None:
        return {"type": "image_url", "image_url": part["image_url"]}
    return {k: v for k, v in part.items() if k in ("type", "text", "refusal")}


def _joined(messages: List[ChatMessage]) -> List[ChatMessage]:
    """Calls that come one after the other, after the assistant's text, are one message."""
    found: List[ChatMessage] = []
    for message in messages:
        last = found[-1] if found else None
        if last and message.tool_calls and last.role == message.role == "assistant":
            calls = [*(last.tool_calls or ()), *message.tool_calls]
            found[-1] = ChatMessage(role="assistant", content=last.content, tool_calls=calls)
        else:
            found.append(message)
    return found


def _head(service: Service, body: Responses) -> Dict[str, Any]:
    """The response before there is an answer, with the parameters that it is made with."""
    usual = service.defaults
    return {
        "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
        "status": "in_progress", "error": None, "incomplete_details": None,
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "model": body.model or service.name, "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "temperature": usual.temperature if body.temperature is None else body.temperature,
        "top_p": usual.top_p if body.top_p is None else body.top_p,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"parameters": None, "strict": None, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0, "usage": None,
        "truncation": body.truncation or "disabled", "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {}, "user": body.user, "background": False,
        "service_tier": "default", "store": body.store is not False,
    }  # fmt: skip
