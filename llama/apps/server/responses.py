"""`/v1/responses`: OpenAI's newer API, on top of the chat endpoint's answers."""

import time
import uuid
from collections import OrderedDict
from contextlib import aclosing
from typing import Any, AsyncGenerator, Dict, List, Literal, Optional, Union

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from llama.apps.server.bodies import Body, Call, Chat, ChatMessage, FunctionCall, NamedTool
from llama.apps.server.chat import start
from llama.apps.server.errors import ApiError, invalid
from llama.apps.server.items import Output
from llama.apps.server.service import Service, ready, received
from llama.apps.server.streams import EventStream, json, whole

KEPT = 1024  # responses


class Item(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item of the input: a message, a call of a tool, or its result."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Optional[str] = None
    content: Union[str, List[Dict[str, Any]], None] = None
    name: Optional[str] = None
    arguments: Optional[str] = None
    call_id: Optional[str] = None
    output: Union[str, List[Dict[str, Any]], None] = None
    id: Optional[str] = None
    status: Optional[str] = None
    phase: Optional[str] = None


class NamedFunction(Struct, forbid_unknown_fields=True):
    name: str
    type: Literal["function"] = "function"


class TextOptions(Struct, forbid_unknown_fields=True):
    format: Optional[Dict[str, Any]] = None
    verbosity: Optional[Literal["medium"]] = None


class Responses(Body, kw_only=True):
    input: Union[str, List[Item]]
    instructions: Optional[str] = None
    previous_response_id: Optional[str] = None
    store: Optional[bool] = None  # type: ignore[assignment]  # here it is offered
    stream: Optional[bool] = None
    stream_options: Optional[Dict[str, Literal[False]]] = None
    max_output_tokens: Optional[int] = None
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    top_logprobs: Optional[int] = None
    include: Optional[List[Literal["message.output_text.logprobs"]]] = None
    text: Optional[TextOptions] = None
    tools: Optional[List[Dict[str, Any]]] = None
    tool_choice: Union[Literal["none", "auto", "required"], NamedFunction, None] = None
    parallel_tool_calls: Optional[bool] = None
    truncation: Optional[Literal["disabled"]] = None
    background: Optional[Literal[False]] = None
    reasoning: None = None


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


async def responses(request: Request) -> Response:
    service, body, headers = await received(request, Responses)
    store: Store = request.app.state.store
    own = [ChatMessage(role="user", content=body.input)] if isinstance(body.input, str) else [
        _message(i, item) for i, item in enumerate(body.input)
    ]  # fmt: skip
    earlier = body.previous_response_id
    known = store.get(earlier, "previous_response_id").messages if earlier else []
    chat = as_chat(body, _joined([*known, *own]))
    answer = await start(request, service, chat)
    output = Output(answer, _head(service, body))
    items = [{"type": "message", "role": "user", "content": body.input}] if isinstance(
        body.input, str
    ) else msgspec.to_builtins(body.input)  # fmt: skip

    async def events() -> AsyncGenerator[Dict[str, Any], None]:
        async with aclosing(output.events()) as found:
            async for event in found:
                ended = event.get("response", {}).get("status", "in_progress") != "in_progress"
                if ended and body.store is not False:
                    dialog = _joined([*known, *own, output.message()])
                    store.add(Stored(output.response, dialog, items))
                yield event

    async def last() -> Dict[str, Any]:
        async with aclosing(events()) as found:
            async for _ in found:
                pass
        return output.response

    if body.stream:
        timeout = service.settings.timeout
        return EventStream(events(), timeout, named=True, done=b"", headers=headers)
    reply = await whole(request, last())
    reply.headers.update(headers)
    return reply


async def stored(request: Request) -> Response:
    """GET and DELETE of a response."""
    ready(request)
    store, name = request.app.state.store, request.path_params["id"]
    if request.method == "DELETE":
        store.delete(name)
        return json({"id": name, "object": "response", "deleted": True})
    return json(store.get(name).response)


async def input_items(request: Request) -> Response:
    ready(request)
    items = request.app.state.store.get(request.path_params["id"]).items
    found = [{"id": f"item_{i}", "status": "completed", **item} for i, item in enumerate(items)]
    ends = {"first_id": "item_0", "last_id": f"item_{len(found) - 1}"}
    return json({"object": "list", "data": found, "has_more": False, **ends})


def as_chat(body: Responses, messages: List[ChatMessage]) -> Chat:
    """The chat request that a body stands for."""
    if body.instructions is not None:
        messages = [ChatMessage(role="system", content=body.instructions), *messages]
    choice: Any = body.tool_choice
    if isinstance(choice, NamedFunction):
        choice = NamedTool(NamedTool.Function(choice.name))
    form = body.text.format if body.text else None
    if form and form.get("type") == "json_schema":
        form = {
            "type": "json_schema",
            "json_schema": {k: v for k, v in form.items() if k != "type"},
        }
    return Chat(
        messages=messages, model=body.model, max_tokens=body.max_output_tokens,
        temperature=body.temperature, top_p=body.top_p, response_format=form,
        tools=[_tool(i, tool) for i, tool in enumerate(body.tools or ())] or None,
        tool_choice=choice, parallel_tool_calls=body.parallel_tool_calls,
        logprobs=bool(body.include or body.top_logprobs), top_logprobs=body.top_logprobs,
    )  # fmt: skip


def _tool(i: int, tool: Dict[str, Any]) -> Dict[str, Any]:
    if tool.get("type") != "function":
        raise invalid(f"tools[{i}]: of type {tool.get('type')!r}; only functions", "tools")
    keys = ("name", "description", "parameters", "strict")
    return {
        "type": "function",
        "function": {k: tool[k] for k in keys if tool.get(k) is not None},
    }


def _message(i: int, item: Item) -> ChatMessage:
    try:
        if item.type == "function_call":
            call = Call(FunctionCall(item.name or "", item.arguments or "{}"), id=item.call_id)
            return ChatMessage(role="assistant", tool_calls=[call])
        result = item.type == "function_call_output"
        found: Dict[str, Any] = {"role": "tool" if result else item.role}
        parts = item.output if result else item.content
        found["content"] = parts if isinstance(parts, str) else list(map(_part, parts or ()))
        return msgspec.convert({**found, "tool_call_id": item.call_id}, ChatMessage)
    except msgspec.ValidationError as error:
        raise invalid(f"input[{i}]: {error}".replace("`", ""), "input") from None


def _part(part: Dict[str, Any]) -> Dict[str, Any]:
    msgspec.convert(part.get("type"), str)
    return {"type": part["type"], "text": part.get("text")}


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
        "tool_choice": msgspec.to_builtins(body.tool_choice) or "auto",
        "tools": [{"parameters": None, "strict": None, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0, "truncation": "disabled", "usage": None,
        "metadata": body.metadata or {}, "user": body.user, "background": False,
        "service_tier": "default", "store": body.store is not False,
    }  # fmt: skip
