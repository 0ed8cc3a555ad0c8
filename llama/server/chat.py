"""`/v1/chat/completions`."""

from contextlib import aclosing
from typing import Any, AsyncGenerator, Dict, List, NamedTuple, Optional

from starlette.requests import Request
from starlette.responses import Response

from llama.engine.predictions import Event
from llama.engine.tool_formats import call_or_format, strict_format, tool_call_format
from llama.server.bodies import AllowedTools, Chat, NamedTool, StreamOptions
from llama.server.dialogs import encode
from llama.server.errors import invalid
from llama.server.sampling import constraint, constraint_name
from llama.server.service import Running, Service, received
from llama.server.streams import EventStream, whole
from llama.server.texts import MOST_TOP_LOGPROBS, chat_logprob
from llama.text.tool_stream import Delta, ToolCallStream
from llama.text.tools import split_tools

MOST_TOOLS = 128


async def chat(request: Request) -> Response:
    service, body, headers = await received(request, Chat)
    answer = await start(request, service, body)
    head = service.head("chatcmpl", "chat.completion", body.model)
    if not body.stream:
        reply = await whole(request, _collected(answer, head))
        reply.headers.update(headers)
        return reply
    events = _chunks(answer, {**head, "object": "chat.completion.chunk"}, body.stream_options)
    timeout, close = service.settings.timeout, answer.running.end
    return EventStream(events, timeout, headers=headers, close=close)


class Piece(NamedTuple):
    """What an event adds to a choice."""

    choice: int
    event: Event
    deltas: List[Delta]


class ChatAnswer:
    """The answers to a dialog, as pieces of text and of tool calls.

    Attributes:
        running: their counts.
        logprobs: whether they were asked for.
        one_call: a call is told as `function_call`, since `functions` were given.
    """

    def __init__(self, service: Service, running: Running, body: Chat):
        self.tokenizer = service.llama.tokenizer
        self.running, self.logprobs = running, bool(body.logprobs)
        self.choices = len(running.answers) * running.each
        self.one_call = body.functions is not None
        self._tools = shown_tools(body)
        self._most_calls = 1 if body.parallel_tool_calls is False else MOST_TOOLS
        self._streams: Dict[int, ToolCallStream] = {}
        self.calling = [False] * self.choices

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        async with aclosing(self.running.events()) as events:  # type: ignore[type-var]
            async for choice, event in events:
                yield Piece(choice, event, self._read(choice, event))

    def _read(self, choice: int, event: Event) -> List[Delta]:
        if not self._tools:
            return [Delta(event.text)] if event.text else []
        if choice not in self._streams:  # clients know only the tools that they declare
            self._streams[choice] = ToolCallStream(self._tools, builtins=())
        stream = self._streams[choice]
        deltas = stream.feed(event.text)
        if event.finish_reason is not None:
            deltas += stream.finish()
        found = [d for d in deltas if d.index is None or d.index < self._most_calls]
        self.calling[choice] |= any(delta.index is not None for delta in found)
        return found

    def complete(self, choice: int) -> bool:
        """Whether every call that has begun is whole."""
        stream = self._streams.get(choice)
        return stream is None or stream.whole

    def finish_reason(self, piece: Piece) -> Optional[str]:
        """A reply that a stop string cut off within a call doesn't end in calls."""
        reason, choice = piece.event.finish_reason, piece.choice
        calls = self.calling[choice] and self.complete(choice)
        told = "function_call" if self.one_call else "tool_calls"
        return told if reason == "stop" and calls else reason


async def start(
    request: Request, service: Service, body: Chat, truncate: Optional[str] = None
) -> ChatAnswer:
    """Check a body and queue its dialog.

    Args:
        truncate: "oldest_turns": drop those for which the context is too short.

    Raises:
        ApiError, ValueError: what is wrong with it.
    """
    service.adapter(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("max_tokens and max_completion_tokens: give one", "max_tokens")
    top = body.top_logprobs or 0
    if not 0 <= top <= MOST_TOP_LOGPROBS:
        raise invalid(
            f"top_logprobs={top} must lie between 0 and {MOST_TOP_LOGPROBS}", "top_logprobs"
        )
    if top and not body.logprobs:
        raise invalid("top_logprobs: only with logprobs: true", "top_logprobs")
    if len(body.tools or ()) > MOST_TOOLS:
        raise invalid(f"{len(body.tools or ())} tools: give at most {MOST_TOOLS}", "tools")
    tools = shown_tools(body)
    more: Dict[str, Any] = {"logprobs": bool(body.logprobs), "top_logprobs": top}
    choice: Any = body.tool_choice or "auto"
    choice = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
    given, form = constraint(body), None
    try:
        if choice not in ("auto", "none"):
            form = tool_call_format(_wanted(tools, choice), body.parallel_tool_calls is True)
        elif given is not None:
            form = call_or_format(tools, given) if tools else given
        else:
            form = strict_format(tools)
    except ValueError as error:
        text, name = str(error), "tools"
        if text.startswith("response_format"):
            name = constraint_name(body)
            text = text.replace("response_format", name, 1)
        raise invalid(text, name) from None
    except RecursionError:
        name = "tools" if given is None else constraint_name(body)
        raise invalid(f"{name}: a schema is nested too deeply", name) from None
    more |= {"response_format": form} if form else {}
    ids, images = await encode(service, body, tools or None, truncate)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    running = await service.submit(request, [ids], body, most, images, **more)
    return ChatAnswer(service, running, body)


def _wanted(tools: List[Dict[str, Any]], choice: Any) -> List[Dict[str, Any]]:
    """The tools of which one must be called."""
    name = choice.function.name if isinstance(choice, NamedTool) else None
    wanted = [tool for tool in tools if name in (None, tool["function"]["name"])]
    if not wanted:
        known = ", ".join(tool["function"]["name"] for tool in tools) or "none"
        raise invalid(f"tool_choice: no such tool; there are: {known}", "tool_choice")
    return wanted


def shown_tools(body: Chat) -> List[Dict[str, Any]]:
    """The tools that the model is told of.

    Raises:
        ApiError: one isn't valid, or tool_choice allows one that isn't there.
    """
    choice = body.tool_choice
    tools: List[Dict[str, Any]] = [
        {"type": "function", "function": {k: v for k, v in f.items() if v is not None}}
        for f in (tool.function for tool in body.tools or ())
    ]
    try:
        split_tools(tools)
    except ValueError as error:
        raise invalid(str(error), "tools") from None
    if not isinstance(choice, AllowedTools):
        return tools if choice != "none" else []
    names = {tool.function.name for tool in choice.allowed_tools.tools}
    found = [tool for tool in tools if tool["function"]["name"] in names]
    if len(found) < len(names):
        raise invalid(f"tool_choice: {', '.join(sorted(names))}: not all in tools", "tool_choice")
    return found


async def _collected(answer: ChatAnswer, head: Dict[str, Any]) -> Dict[str, Any]:
    choices: List[Dict[str, Any]] = [
        {
            "index": i,
            "message": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": {"content": [], "refusal": None} if answer.logprobs else None,
            "finish_reason": None,
        }
        for i in range(answer.choices)
    ]
    async with aclosing(answer.pieces()) as pieces:
        async for piece in pieces:
            choice = choices[piece.choice]
            for delta in piece.deltas:
                _add(choice["message"], delta)
            entry = chat_logprob(answer.tokenizer, piece.event)
            if entry is not None:
                choice["logprobs"]["content"].append(entry)
            choice["finish_reason"] = answer.finish_reason(piece)
    for message in (choice["message"] for choice in choices):
        if "tool_calls" in message:
            message["content"] = message["content"] or None
            if answer.one_call:
                message["function_call"] = message.pop("tool_calls")[0]["function"]
    return {**head, "choices": choices, "usage": answer.running.usage()}


def _add(message: Dict[str, Any], delta: Delta) -> None:
    if delta.index is None:
        message["content"] += delta.text
        return
    calls = message.setdefault("tool_calls", [])
    if delta.name:
        function = {"name": delta.name, "arguments": ""}
        calls.append({"id": delta.id, "type": "function", "function": function})
    calls[delta.index]["function"]["arguments"] += delta.arguments


async def _chunks(
    answer: ChatAnswer, head: Dict[str, Any], options: Optional[StreamOptions]
) -> AsyncGenerator[Dict[str, Any], None]:
    def chunk(choice: int, delta: Dict[str, Any], *rest: Any) -> Dict[str, Any]:
        logprobs, reason = rest or (None, None)
        only = {
            "index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason
        }  # fmt: skip
        return {**head, "choices": [only], **answer.running.usage_of_chunk(options)}

    for i in range(answer.choices):
        yield chunk(i, {"role": "assistant", "content": None, "refusal": None})
    async with aclosing(answer.pieces()) as pieces:
        async for piece in pieces:
            entry = chat_logprob(answer.tokenizer, piece.event)
            logprobs = {"content": [entry], "refusal": None} if entry else None
            for at, delta in enumerate(piece.deltas or [Delta()] * bool(entry)):
                told = delta_of(delta, answer.one_call)
                yield chunk(piece.choice, told, None if at else logprobs, None)
            reason = answer.finish_reason(piece)
            if reason is not None:
                yield chunk(piece.choice, {}, None, reason)
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": answer.running.usage()}


def delta_of(delta: Delta, one_call: bool) -> Dict[str, Any]:
    if delta.index is None:
        return {"content": delta.text}
    call: Dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
    if delta.name:
        call.update(id=delta.id, type="function")
        call["function"]["name"] = delta.name
    return {"function_call": call["function"]} if one_call else {"tool_calls": [call]}
