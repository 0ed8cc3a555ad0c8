"""`llama chat`: a conversation in the terminal.

`Session` is what was said and what the commands do to it; it knows no terminal. On several ranks,
rank 0 alone has one and a terminal, and tells the others what to compute.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Literal, NamedTuple, Optional, Sequence

from llama.apps.pictures import Picture, pasted, picture
from llama.apps.terminal import Plain, is_capable
from llama.engine.params import SamplingParams
from llama.engine.predictions import Speculation
from llama.engine.seeing import check_sees, sees
from llama.generation import Llama
from llama.layers import parallel
from llama.text.chat import Message, check_dialog, content_of, read_calls
from llama.text.files import beside, write_json
from llama.text.messages import parts_of
from llama.text.tool_stream import Delta
from llama.text.tools import Tool, split_tools

COMMANDS = {
    "help": "this list",
    "system": "[TEXT]  show the system message, or set it; - takes it away",
    "image": "PATH  an image for the next message; a path or a data URI alone is one, too",
    "reset": "forget what was said; the system message stays",
    "undo": "take back the last message and its answer",
    "regenerate": "another answer to the last message",
    "save": "FILE  write the dialog as JSON",
    "load": "FILE  go on with a dialog from a file",
    "params": "[NAME=VALUE ...]  show the sampling parameters, or change them",
    "stats": "speed of the last answer, and how full the context is",
    "exit": "leave, as Ctrl-D does",
}

# --- the conversation ----------------------------------------------------------------------------


class Reply(NamedTuple):
    """Result of a line."""

    text: str = ""  # to be shown
    wants_answer: bool = False  # the dialog ends with a message that is to be answered
    leaves: bool = False
    image: Optional[Any] = None  # to be shown


class Turn(NamedTuple):
    """What every rank needs to know to compute the same answer."""

    dialog: List[Message]
    params: SamplingParams
    max_gen_len: Optional[int]
    speculate: Optional[Literal["lookup", "draft", "off"]]
    tools: List[Tool]


@dataclass
class Stats:
    """Statistics of the last answer."""

    prompt_tokens: int
    tokens: int = 0
    first: float = 0.0  # seconds until the first token
    total: float = 0.0  # seconds until the last one
    speculation: Optional[Speculation] = None

    def __str__(self) -> str:
        speed = f"{(self.tokens - 1) / (self.total - self.first):.1f}" if self.tokens > 1 else "-"
        text = f"{self.tokens} tokens: first after {self.first:.2f} s, then {speed} tokens/s"
        if self.speculation is None:
            return text
        accepted, proposed = self.speculation["accepted"], self.speculation["proposed"]
        return f"{text}; {accepted} of {proposed} proposed tokens accepted"


class Session:
    """A dialog, how it is answered, and the commands.

    Args:
        send: called with each Turn before it is computed; on several ranks, it tells the others.
        speculate: how draft tokens are proposed; see `llama.engine.speculative`.
        max_gen_len: tokens of an answer; None fills the context.
        tools: what the model may call; the line after a call is the tool's result.
        images: paths, addresses or data URIs of those of the first message.

    Attributes:
        dialog: what was said, a system message included.
        params: how tokens are sampled.
        stats: of the last answer, or None.
        note: why the last answer isn't whole, or "".
    """

    def __init__(
        self,
        llama: Llama,
        params: Optional[SamplingParams] = None,
        system: Optional[str] = None,
        max_gen_len: Optional[int] = None,
        send: Callable[[Turn], object] = lambda turn: None,
        speculate: Optional[Literal["lookup", "draft", "off"]] = None,
        tools: Sequence[Tool] = (),
        images: Sequence[str] = (),
    ):
        if llama.formatter is None:
            raise ValueError("this checkpoint has no chat format: use an instruct checkpoint")
        self.llama, self._format = llama, llama.formatter
        self.params = params or SamplingParams()
        self.max_gen_len = max_gen_len
        self.send, self.speculate, self.tools = send, speculate, [*tools]
        self.dialog: List[Message] = []
        self.stats: Optional[Stats] = None
        self.note = ""
        self._before: List[Message] = []  # the dialog, should its answer fail
        self._images: List[Picture] = []  # of the next message
        if system:
            self._system(system)
        for image in images:
            self._image(image)

    def take(self, line: str) -> Reply:
        """Do what a line says: run a command, or add a message that `answer` is to answer.

        Raises:
            ValueError: a command that doesn't exist or can't be followed; nothing has changed.
        """
        line = line.encode("utf-8", "replace").decode().strip()  # a terminal may send lone bytes
        if not line:
            return Reply()
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in COMMANDS:
                known = ", ".join(f"/{known}" for known in COMMANDS)
                raise ValueError(
                    f"no command /{name.split(chr(10))[0]}: there are {known}; "
                    "a message that begins with / is written with //"
                )
            try:
                return getattr(self, f"_{name}")(rest.strip())
            except OSError as error:
                raise ValueError(f"/{name} {rest.strip()}: {error.strerror or error}") from None
        image = pasted(line) if sees(self.llama.model) else None
        if image is not None:
            return self._image(image)
        self._before = [*self.dialog]
        text = line[1:] if line.startswith("//") else line
        calls = bool(self.dialog) and self.dialog[-1].get("tool_calls")
        parts = [{"type": "image", "image": one.source} for one in self._images]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        self.dialog.append({"role": "tool" if calls else "user", "content": content})
        self._images = []
        return Reply(wants_answer=True)

    def answer(self, interrupted: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer to the dialog, piece by piece; at the end it is part of the dialog.

        Args:
            interrupted: asked after each token; True ends the answer there.

        Raises:
            ValueError: the dialog can't be answered; it is what it was before the last message.
        """
        text, self.note, was_interrupted = "", "", False

        def should_stop() -> bool:
            nonlocal was_interrupted
            was_interrupted = was_interrupted or interrupted()
            return was_interrupted

        try:
            check_sees(self.llama.model, [self.dialog])
            stats = Stats(len(self._format.encode_dialog_prompt(self.dialog, self.tools)))
            turn = Turn([*self.dialog], self.params, self.max_gen_len, self.speculate, self.tools)
            self.send(turn)
            begin, reason = time.monotonic(), None
            for event in _events(self.llama, turn, should_stop):
                stats.total = time.monotonic() - begin
                if event.token is not None:
                    stats.first = stats.first or stats.total
                    stats.tokens += 1
                text += event.text
                reason, stats.speculation = event.finish_reason, event.speculation
                yield event.text if event.deltas is None else _shown(event.deltas)
            if not stats.tokens and stats.prompt_tokens >= self._context:
                raise ValueError(
                    f"the dialog's {stats.prompt_tokens} tokens fill the context: /undo, /reset, "
                    "or start with a larger --max_seq_len"
                )
        except (ValueError, FileNotFoundError):
            self.dialog = self._before
            raise
        self.dialog.append({"role": "assistant", "content": text})
        error = read_calls(self.dialog[-1], self.tools) if self.tools else None
        self.stats = stats
        if was_interrupted:
            self.note = "interrupted"
        elif not stats.tokens:
            self.note = "an empty answer"
        elif reason == "length":
            full = stats.prompt_tokens + stats.tokens >= self._context
            self.note = "cut off: " + ("the context is full" if full else "max_gen_len is reached")
        elif error:
            self.note = f"a call that can't be read: {error}"
        elif "tool_calls" in self.dialog[-1]:
            self.note = "a call: write its result"

    @property
    def _context(self) -> int:
        return self.llama.model.params.max_seq_len

    def _help(self, rest: str) -> Reply:
        lines = [f"/{name:<11} {about}" for name, about in COMMANDS.items()]
        keys = "Esc-Enter, or a \\ before Enter: a new line. Ctrl-C: stop the answer."
        return Reply("\n".join([*lines, keys, "//...         a message that begins with /"]))

    def _system(self, rest: str) -> Reply:
        has_one = bool(self.dialog) and self.dialog[0]["role"] == "system"
        if not rest:
            return Reply(content_of(self.dialog[0]) if has_one else "no system message")
        said = self.dialog[1:] if has_one else self.dialog
        self.dialog = [*said] if rest == "-" else [{"role": "system", "content": rest}, *said]
        return Reply("no system message" if rest == "-" else "system message set")

    def _image(self, rest: str) -> Reply:
        if not rest:
            raise ValueError("/image takes the path of an image: /image photo.jpg")
        if not sees(self.llama.model):
            raise ValueError("this model reads only text: images are for Llama 3.2 Vision and 4")
        self._images.append(picture(os.path.expanduser(pasted(rest) or rest)))
        text = f"{len(self._images)} image(s) for the next message"
        return Reply(text, image=self._images[-1].shown)

    def _reset(self, rest: str) -> Reply:
        self.dialog = [message for message in self.dialog[:1] if message["role"] == "system"]
        self.stats, self._images = None, []
        return Reply("a new dialog")

    def _last_user(self) -> int:
        places = [i for i, message in enumerate(self.dialog) if message["role"] == "user"]
        if not places:
            raise ValueError("nothing has been said yet: write a message first")
        return places[-1]

    def _undo(self, rest: str) -> Reply:
        last = self._last_user()
        parts = parts_of(self.dialog[last])
        text = "".join(part if isinstance(part, str) else "[image] " for part in parts)
        self.dialog = self.dialog[:last]
        return Reply(f"taken back: {text}")

    def _regenerate(self, rest: str) -> Reply:
        last = self._last_user()
        self._before, self.dialog = self.dialog, self.dialog[: last + 1]
        return Reply(wants_answer=True)

    def _save(self, rest: str) -> Reply:
        path = _path(rest, "save")
        if not self.dialog:
            raise ValueError("nothing to save: the dialog is empty")
        if path.exists():
            try:
                _read(path)
            except ValueError:
                raise ValueError(f"{path} exists and is no dialog: choose another name") from None
        path.parent.stat()  # raises OSError for a directory that doesn't exist
        with beside(path, force=True) as partial:
            write_json(partial, self.dialog)
        return Reply(f"{len(self.dialog)} messages saved to {path}")

    def _load(self, rest: str) -> Reply:
        path = _path(rest, "load")
        self.dialog = _read(path)
        self.stats = None
        return Reply(f"{len(self.dialog)} messages loaded from {path}")

    def _params(self, rest: str) -> Reply:
        known = {name: v for name, v in asdict(self.params).items() if type(v) in (int, float)}
        changes: Dict[str, Any] = {}
        for pair in rest.split():
            name, _, value = pair.partition("=")
            if name not in known:
                raise ValueError(f"no parameter {name!r}: there are {', '.join(known)}")
            try:
                changes[name] = type(getattr(SamplingParams(), name))(value)
            except ValueError:
                example = f"{name}=NUMBER, {known[name]} for example"
                raise ValueError(f"{pair}: write {example}") from None
        self.params = replace(self.params, **changes)
        return Reply(" ".join(f"{name}={getattr(self.params, name)}" for name in known))

    def _stats(self, rest: str) -> Reply:
        if self.stats is None:
            return Reply("no answer yet")
        used = self.stats.prompt_tokens + self.stats.tokens
        return Reply(f"{self.stats}; context {used} / {self._context}")

    def _exit(self, rest: str) -> Reply:
        return Reply(leaves=True)


def _events(llama: Llama, turn: Turn, should_stop: Callable[[], bool]) -> Iterator[Any]:
    """The call that is the same on every rank."""
    return llama.stream_chat(
        [turn.dialog], max_gen_len=turn.max_gen_len, params=turn.params, should_stop=should_stop,
        speculate=turn.speculate, tools=turn.tools,
    )  # fmt: skip


def _shown(deltas: List[Delta]) -> str:
    """Text as it is; a call as a block of code."""
    return "".join(
        delta.text + (f"\n\n    {delta.name} " if delta.name else "")
        + delta.arguments.replace("\n", "\n    ")
        for delta in deltas
    )  # fmt: skip


def _path(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"/{command} takes the name of a file: /{command} dialog.json")
    return Path(os.path.realpath(os.path.expanduser(text)))


def read_tools(path: str) -> List[Tool]:
    """Schemas of tools from a file. Raises ValueError and FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; write a JSON list of tools' schemas there")
    try:
        tools = json.loads(Path(path).read_text("utf-8"))
        return [*split_tools(tools if isinstance(tools, list) else [tools])[0]]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no list of tools' JSON schemas: {error}") from None


def _read(path: Path) -> List[Message]:
    """A dialog from a file. Raises ValueError for one that holds none, and OSError."""
    try:
        dialog = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} isn't JSON: /save writes what /load reads") from None
    if not isinstance(dialog, list):
        raise ValueError(f"{path} holds no list of messages: /save writes what /load reads")
    try:
        check_dialog(0, dialog)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dialog


# --- the command ---------------------------------------------------------------------------------


def check_packages() -> None:
    """Raises ValueError if a terminal lacks the packages that edit lines and render markdown."""
    if is_capable():  # a pipe needs neither
        try:
            import prompt_toolkit  # noqa: F401
            import rich  # noqa: F401
        except ImportError as error:
            raise ValueError(f"llama chat needs {error.name}: pip install {error.name}") from None


def talk(session: Session, terminal: Plain) -> int:
    """Read and answer until the user leaves. At a terminal, Ctrl-C doesn't.

    Returns:
        How many messages couldn't be answered.
    """
    unanswered = 0
    while True:
        reply = Reply()
        try:
            line = terminal.read()
            if line is None:
                return unanswered
            reply = session.take(line)
            if reply.leaves:
                return unanswered
            if reply.image is not None:
                terminal.preview(reply.image)
            if reply.text:
                terminal.show(reply.text)
            if reply.wants_answer:
                with terminal.listening() as interrupted:
                    terminal.answer(session.answer(interrupted))
                if session.note:
                    terminal.complain(f"({session.note})")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            terminal.show("/exit or Ctrl-D leaves")
        except (ValueError, FileNotFoundError) as error:
            terminal.complain(str(error))
            unanswered += reply.wants_answer


def follow(llama: Llama) -> None:
    """What the ranks without a terminal do: compute what rank 0 says, until it says None."""
    while (turn := parallel.broadcast_object(None)) is not None:
        try:
            for _ in _events(llama, turn, lambda: False):
                pass
        except (ValueError, FileNotFoundError):
            pass  # raised on all ranks alike, and shown by rank 0
