"""Calls of tools in a model's reply, read while it is generated. No tool is run here."""

import json
import re
import secrets
from typing import Any, Callable, Collection, Dict, List, NamedTuple, Optional, Sequence

from llama.text.scanner import Malformed, NotJSON, Scanner, Steps, loads
from llama.text.tool_calls import (
    PYTHONIC,
    NoCall,
    builtin_call,
    python_list,
    read_call,
    what_is_wrong,
)
from llama.text.tools import (
    BUILTINS,
    PYTHON_END,
    PYTHON_START,
    PYTHON_TAG,
    Tool,
    ToolCall,
    split_tools,
)


class Reply(NamedTuple):
    """A model's reply, parsed."""

    content: str  # the text outside of calls; with an error, the whole reply
    calls: List[ToolCall]
    error: Optional[str]  # what is wrong with an attempted call


class Delta(NamedTuple):
    """A further piece of a reply."""

    text: str = ""  # ordinary text; "" in a call's deltas
    # Which call this belongs to, from 0; None for text.
    index: Optional[int] = None  # type: ignore[assignment]  # tuples have a method index
    id: str = ""  # in the first delta of a call only
    name: str = ""  # in the first delta of a call only
    arguments: str = ""  # a further piece of the JSON text of its arguments


_TAG = re.compile(r"<function=([^<>]{1,200})>|<tool_call>|<\|tool_call\|>|\[TOOL_CALLS\]")
_TAGS = ("<function=", "<tool_call>", "<|tool_call|>", "[TOOL_CALLS]")
# Around reasoning, which the prompt may have opened already.
_THINK, _THOUGHT = "<think>", "</think>"
_TAG_OR_THOUGHT = re.compile(f"{_TAG.pattern}|{_THOUGHT}")
_CLOSING = {"<function=": "</function>", "<tool_call>": "</tool_call>"}
_MAY_BE_PYTHONIC = re.compile(r"\[\s*\w*")
_BETWEEN = re.compile(r"[\s;]*")


def parse_tool_calls(text: str, tools: Sequence[Tool] = ()) -> Reply:
    """The tool calls in a model's reply, in any of the usual spellings.

    As the whole reply; several calls also one after another, with spaces or ";" between, or in a
    list:

        {"name": ..., "parameters" or "arguments": {...}}
        [f(a=1), g(b="x")]
        brave_search.call(query="...")

    Among other text:

        <function=name>{...}</function>
        <tool_call>{...}</tool_call>
        <|tool_call|> [{...}]
        [TOOL_CALLS] [{...}]

    After a leading <|python_tag|> or <|python_start|>: any of these, or else code for
    code_interpreter.

    Reasoning, from a leading <think> or what the prompt ends with, up to </think>, is text; what
    follows it is read as a whole reply is, or, with a "strict" tool, tags in it are.

    Only the tools given and the built-in ones can be called; arguments aren't checked against the
    schemas. It is all or nothing: of a reply with a malformed call every call stays text.

    Returns:
        The remaining text, the calls, and what is malformed, if anything. No text raises.

    Raises:
        ValueError: what isn't a tool among tools.
    """
    stream = ToolCallStream(tools)
    deltas = [*stream.feed(text), *stream.finish()]
    if stream.error:
        return Reply(text, [], stream.error)
    return Reply("".join(delta.text for delta in deltas), stream.calls, None)


class ToolCallStream(Scanner):
    """Reads what `parse_tool_calls` reads, in pieces.

    Text is handed on as soon as it can't be part of a call; white space at its end, when text
    follows. A call begins when its name is known, and its arguments are handed on as they come,
    JSON as it is written. Of calls in Python's syntax and of built-in tools other than code, all
    comes at the end.

    What was handed on can't be taken back: if a call turns out to be malformed after it began, the
    rest of the reply is text.

    Args:
        builtins: the names of built-in tools that can be called besides.
        make_id: makes the id of a call that has none before its arguments. By default it has nine
            letters and digits, as Mistral's templates ask of ids.

    Attributes:
        calls: the complete calls, as `parse_tool_calls` returns them.
        error: what is wrong with an attempted call, which is left as text.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        builtins: Collection[str] = BUILTINS,
        make_id: Callable[[], str] = lambda: secrets.token_hex(5)[:9],
    ):
        super().__init__()
        schemas, _ = split_tools(tools)
        self._names = {schema["function"]["name"] for schema in schemas} | set(builtins)
        self._strict = any(schema["function"].get("strict") is True for schema in schemas)
        self._queries = [f'{name}.call(query="' for name in self._names]
        self._queries += [f"{name}.call(" for name in builtins]
        self._make_id = make_id
        self.calls: List[ToolCall] = []
        self.error: Optional[str] = None
        self._done = 0  # up to here it is in deltas
        self._begun = 0  # calls whose first delta is out
        # Of the call that is being read: its keys so far (texts with their value), its name, the
        # pieces of its arguments that are out, and whether more of them follow from _done on.
        self._keys: Dict[str, Any] = {}
        self._name, self._streamed, self._open = "", [""], False
        self._held: List[str] = []  # white space that is text if more text follows
        self._said = False
        self._deltas: List[Delta] = []
        self._reader = self._read()

    @property
    def whole(self) -> bool:
        """Whether every call that has begun is complete."""
        return self._begun == len(self.calls)

    def feed(self, text: str) -> List[Delta]:
        """What is known with a further piece of the reply."""
        self.text += text.replace(PYTHON_END, "")
        return self._step()

    def finish(self) -> List[Delta]:
        """What is known with the end of the reply."""
        self.ended = True
        return self._step()

    def _step(self) -> List[Delta]:
        next(self._reader, None)
        self._flush()
        found, self._deltas = self._deltas, []
        return found

    # --- the whole reply -------------------------------------------------------------------------

    def _read(self) -> Steps:
        try:
            yield from self._reply()
        except Malformed as error:
            self.error = str(error)
            if not self._begun and not self._said:
                self._done, self._held = 0, []
        while True:
            self._say(len(self.text))
            if self.ended:
                break
            yield
        if not self._begun:
            self._deltas += [Delta(text) for text in self._held if text]

    def _reply(self) -> Steps:
        yield from self.next()
        if (yield from self.one_of([_THINK])):
            while self.text.find(_THOUGHT, self.at) < 0 and not self.ended:
                self._say(self._safe())
                yield
            end = self.text.find(_THOUGHT, self.at)
            self._say(end + len(_THOUGHT) if end >= 0 else len(self.text))
        elif not (yield from self._answer(_TAG_OR_THOUGHT)):
            return
        # Formats of strict tools have calls without tags at the beginning only.
        tagged = self._begun or self._strict
        yield from (self._tagged(_TAG) if tagged else self._answer(_TAG))

    def _answer(self, tags: "re.Pattern[str]") -> Steps:
        """What isn't reasoning, or may be: whether </think>, if it is among the tags, ended it."""
        whole = self.at
        yield from self.next()
        code = yield from self.one_of([PYTHON_TAG, PYTHON_START])
        self.at = begin = self.at + len(code)
        yield from self.next()
        start = self.at
        try:
            yield from self._calls()
            return False
        except NoCall:
            pass
        except Malformed:
            if self._begun or not code or self.text[start] != "[":  # Python may begin with [
                raise
        self.at = start
        if code and (yield from self.one_of(_TAGS)):
            self._done = self._done if self._said else start
        elif code and "code_interpreter" in self._names:
            yield from self._code(begin)
            return False
        else:
            self.at = whole
        return (yield from self._tagged(tags))

    def _calls(self) -> Steps:
        """Calls without tags. Raises NoCall, unless one has begun, for other text."""
        query = yield from self.one_of(self._queries)
        if query or (yield from self._is_pythonic()):
            while not self.ended:
                yield
            body = self.text[self.at :].strip()
            found = builtin_call(body, self._names) if query else python_list(body, self._names)
            if not found:
                raise NoCall
            self.at = len(self.text)
            for call in found:
                self._complete(call)
            return
        begin = self.at
        if (yield from self.next()) not in ("{", "["):
            raise NoCall
        try:
            while first := (yield from self.next(_BETWEEN)):
                yield from (self._list() if first == "[" else self._object())
        except NotJSON:
            if self._begun or {"name", "arguments"} <= self._keys.keys():
                why = what_is_wrong(self.text[begin:]) or "something follows it"
                raise Malformed(f"the call isn't JSON: {why}") from None
            raise NoCall from None
        except NoCall:
            raise Malformed(str(NoCall())) if self._begun else NoCall from None
        self._done = self.at

    def _is_pythonic(self) -> Steps:
        while not self.ended and _MAY_BE_PYTHONIC.fullmatch(self.text, self.at):
            yield
        begin = PYTHONIC.match(self.text, self.at)
        return begin is not None and begin[1] in self._names

    def _code(self, begin: int) -> Steps:
        """All of the rest, without spaces at its end."""
        self._begin("code_interpreter")
        self._argue('{"code": "')
        end = begin
        while True:
            piece = self.text[end:].rstrip(" ")
            end += len(piece)
            self._argue(json.dumps(piece, ensure_ascii=False)[1:-1])
            if self.ended:
                break
            yield
        self._argue('"}')
        self.at = len(self.text)
        self._complete({"name": self._name, "arguments": {"code": self.text[begin:end]}})

    # --- text and tags ---------------------------------------------------------------------------

    def _tagged(self, tags: "re.Pattern[str]") -> Steps:
        begin = self.at
        while True:
            while found := tags.search(self.text, self.at):
                if found[0] == _THOUGHT:
                    self._say(found.end())
                    return True
                self._say(found.start())
                self.at = found.end()
                yield from self._tag(found)
            self._say(self._safe())
            if self.ended:
                break
            yield
        if not self._begun:  # text that would call an unknown tool
            body = self.text[begin:].strip()
            builtin_call(body, self._names)
            python_list(body, self._names)
        return False

    def _safe(self) -> int:
        """Up to where the text holds no beginning of a tag."""
        for at in sorted(self.text.rfind(first, self.at) for first in "<["):
            rest = self.text[at : at + 300] if at >= 0 else "-"
            named = re.fullmatch(r"<function=[^<>]{1,200}", rest)
            if not self.ended and (named or any(t.startswith(rest) for t in (*_TAGS, _THOUGHT))):
                return at
        return len(self.text)

    def _tag(self, found: "re.Match[str]") -> Steps:
        """A call after a tag. Its JSON is read up to its own end, so that it may contain tags."""
        first = yield from self.next()
        begin, self._keys = self.at, {}
        try:
            if found[1]:
                if first not in ("{", '"'):
                    raise NotJSON
                yield from (self._arguments(found[1]) if first == "{" else self.value())
                value = loads(self.text[begin : self.at])
                self._complete(read_call({"name": found[1], "arguments": value}, self._names))
            elif first == "[":
                yield from self._list()
            else:
                yield from self._object()
        except NotJSON:
            why = what_is_wrong(self.text[begin:])
            where = f"after {found[0]} comes no JSON: {why}"
            raise (Malformed(where) if why else NoCall()) from None
        closing = next((end for tag, end in _CLOSING.items() if found[0].startswith(tag)), "")
        if closing and (yield from self.next()):
            if not (yield from self.one_of([closing])):
                raise Malformed(f"the call after {found[0]} isn't closed by {closing}")
            self.at += len(closing)
        self._done = self.at

    def _say(self, end: int) -> None:
        """The text up to here is text."""
        piece, self.at, self._done = self.text[self._done : end], end, end
        body = piece.rstrip()
        if body:
            text = "".join(self._held) + body
            self._deltas.append(Delta(text.lstrip() if self._begun and not self._said else text))
            self._said, self._held = True, []
        self._held.append(piece[len(body) :])

    # --- calls in JSON ---------------------------------------------------------------------------

    def _list(self) -> Steps:
        self.at += 1
        while (yield from self.next()) == "{":
            yield from self._object()
            if (yield from self.expect(",]")) == "]":
                self._done = self.at
                return
        raise NoCall

    def _object(self) -> Steps:
        begin, self._keys = self.at, {}
        yield from self._members(nested=False)
        self._complete(read_call(loads(self.text[begin : self.at]), self._names))

    def _members(self, nested: bool) -> Steps:
        """An object whose keys may be a call's."""
        yield from self.expect("{")
        end = (yield from self.next()) == "}"
        self.at += end
        while not end:
            key = yield from self.string()
            key = "arguments" if key == "parameters" else key
            self._keys.setdefault(key)
            yield from self.expect(":")
            first = yield from self.next()
            if key == "function" and first == "{" and not nested:
                yield from self._members(nested=True)
            elif first == '"':
                self._keys[key] = yield from self.string()
            elif key == "arguments" and first == "{":
                yield from self._arguments(self._keys.get("name"))
            else:
                yield from self.value()
            end = (yield from self.expect(",}")) == "}"

    def _arguments(self, name: Any) -> Steps:
        """An object, handed on as it comes if it is of a known tool's call."""
        begin = self.at
        self.at += 1
        if (yield from self.next()) not in ('"', "}"):
            raise NotJSON
        self.at = begin
        if name in self._names and self._begun == len(self.calls):
            self._begin(name, self._keys.get("id"))
            self._done, self._open = begin, True
        yield from self.value()
        self._flush()
        self._open = False

    def _begin(self, name: str, identifier: Optional[str] = None) -> None:
        """A call begins. White space before the first call is dropped, unless there is text."""
        self._held = self._held if self._said else []
        self._deltas.append(Delta("", self._begun, identifier or self._make_id(), name))
        self._begun += 1
        self._name, self._streamed = name, []

    def _argue(self, piece: str) -> None:
        if piece:
            self._deltas.append(Delta("", self._begun - 1, arguments=piece))
            self._streamed.append(piece)

    def _flush(self) -> None:
        if self._open:
            self._argue(self.text[self._done : self.at])
            self._done = self.at

    def _complete(self, call: ToolCall) -> None:
        """A call ends here; what was handed on of it must be what it says as a whole."""
        if self._begun == len(self.calls):
            self._begin(call["name"], call.get("id"))
            self._argue(json.dumps(call["arguments"], ensure_ascii=False))
        elif (self._name, loads("".join(self._streamed))) != (call["name"], call["arguments"]):
            raise Malformed("a call says its name or its arguments twice")
        self.calls.append(call)
        self._done = self.at
