"""Terminals to converse in: one for pipes, one with an editor and rendered markdown."""

import os
import select
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple

from llama.text.files import decode


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters become U+FFFD."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
_CONTROLS[ord("\r")] = ""


class Plain:
    """Lines in, text out: for pipes, files and terminals that can do no more."""

    _signals: Optional[Tuple[socket.socket, socket.socket]] = None

    def read(self) -> Optional[str]:
        """A message, or None at the end. A line that ends with a backslash goes on in the next.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        message = ""
        while True:
            line = self._prompted() if sys.stdin.isatty() else self._piped()
            if not line.removesuffix("\n").endswith("\\"):
                return message + line.removesuffix("\n") if message or line else None
            message += line.removesuffix("\n")[:-1] + "\n"

    def _piped(self) -> str:
        """A line from a pipe or a file; OSError, which ends the conversation, if it isn't UTF-8."""
        try:
            return decode(sys.stdin.buffer.readline(), "stdin")
        except ValueError as error:
            raise OSError(str(error)) from None

    def _prompted(self) -> str:
        """A line from a terminal.

        Python handles signals between its own instructions. One that arrives after the last of
        them and before the system's read() would be noticed at the end of the line only; the pair
        of sockets, to which each signal writes a byte, makes select() return for it.
        """
        if sys.platform == "win32":  # where select() takes sockets only
            print("> ", end="", file=sys.stderr, flush=True)
            return sys.stdin.readline()
        if self._signals is None:
            self._signals = socket.socketpair()
            for end in self._signals:
                end.setblocking(False)
        arrived, written = self._signals
        old = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            while sys.stdin not in select.select([sys.stdin, arrived], [], [])[0]:
                arrived.recv(4096)  # of some other signal, or an earlier Ctrl-C
            return sys.stdin.readline()
        finally:
            signal.set_wakeup_fd(old)

    def show(self, text: str) -> None:
        print(self._shown(text), flush=True)

    def preview(self, image: Any) -> None:
        """A small image, if the terminal has colors."""

    def complain(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    def answer(self, pieces: Iterator[str]) -> None:
        for piece in pieces:
            print(self._shown(piece), end="", flush=True)
        print()

    def _shown(self, text: str) -> str:
        return printable(text) if sys.stdout.isatty() else text

    @contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        """While an answer is made: whether Ctrl-C has been pressed. In a pipe, it ends all."""
        if not sys.stdin.isatty():
            yield lambda: False
            return
        pressed: List[int] = []
        old = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
        try:
            yield lambda: bool(pressed)
        finally:
            signal.signal(signal.SIGINT, old)


class Rich(Plain):
    """An editor with a history, and answers as rendered markdown."""

    def __init__(self, history: Optional[str | Path] = None):
        from markdown_it import MarkdownIt
        from prompt_toolkit import PromptSession
        from rich.console import Console

        self.console = Console(highlight=False)
        # What looks like HTML is part of the answer, and rich leaves HTML out.
        rules = MarkdownIt().enable(["strikethrough", "table"])
        self.parser = rules.disable(["html_block", "html_inline"])
        self.prompt: Any = PromptSession(
            "> ", multiline=True, prompt_continuation="  ", key_bindings=_keys(),
            history=_history(history),
        )  # fmt: skip

    def read(self) -> Optional[str]:
        try:
            return self.prompt.prompt()
        except EOFError:
            return None

    def show(self, text: str) -> None:
        self.console.print(printable(text), style="dim", markup=False, emoji=False)

    def preview(self, image: Any) -> None:
        from llama.apps.pictures import blocks

        self.console.print(blocks(image))

    def complain(self, text: str) -> None:
        self.console.print(printable(text), style="red", markup=False, emoji=False)

    def answer(self, pieces: Iterator[str]) -> None:
        """Finished blocks are printed for good; the one being written is drawn again and again.

        So an answer may be longer than the screen, and all of it can be scrolled back to.
        """
        from rich.live import Live

        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            tail, drawn = "", 0.0
            for piece in pieces:
                tail += printable(piece)
                if "\n" in piece:
                    done, tail = self.split(tail)
                    if done.strip():
                        live.update("")
                        self.console.print(self.markdown(done), "")
                        drawn = 0.0
                if piece and time.monotonic() - drawn > 0.1:
                    live.update(_LastLines(self.markdown(tail)), refresh=True)
                    drawn = time.monotonic()
        if tail.strip():
            self.console.print(self.markdown(tail), "")

    def split(self, text: str) -> Tuple[str, str]:
        """Cut a text before the last markdown block of its whole lines: only that can change."""
        lines = text.split("\n")
        tokens = self.parser.parse("\n".join(lines[:-1]))
        starts = [token.map[0] for token in tokens if token.map and token.level == 0]
        cut = starts[-1] if starts else 0
        return "\n".join(lines[:cut]), "\n".join(lines[cut:])

    def markdown(self, text: str) -> Any:
        """What rich prints for a markdown text. Line breaks stay: verses are common in answers."""
        from rich.markdown import Markdown

        rendered = Markdown("", hyperlinks=False)
        rendered.markup, rendered.parsed = text, self.parser.parse(text)
        for token in rendered.parsed:
            for child in token.children or []:
                if child.type == "softbreak":
                    child.type = "hardbreak"
        return rendered

    @contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        """As in a pipe, but with Ctrl-C as a key. Other keys are kept for the next prompt."""
        from prompt_toolkit.input.typeahead import store_typeahead
        from prompt_toolkit.keys import Keys

        source = self.prompt.input

        def pressed() -> bool:
            keys = source.read_keys()
            kept = [key for key in keys if key.key != Keys.ControlC]
            store_typeahead(source, kept)
            return len(kept) < len(keys) or signalled()

        with super().listening() as signalled, _ctrl_c_is_a_key():
            yield pressed


class _LastLines:
    """As much of the end of something as the screen has lines for."""

    def __init__(self, content: Any):
        self.content = content

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        for line in console.render_lines(self.content, options, pad=False)[2 - console.height :]:
            yield from line
            yield Segment.line()


@contextmanager
def _ctrl_c_is_a_key() -> Iterator[None]:
    """Have the terminal pass Ctrl-C on as a character, and echo nothing.

    As a signal it would also reach torchrun, which then ends all ranks. Ctrl-\\ still quits.
    """
    try:
        import termios
    except ImportError:  # Windows: the signal will have to do
        yield
        return
    old = termios.tcgetattr(sys.stdin)
    new = termios.tcgetattr(sys.stdin)
    new[0] &= ~(termios.ICRNL | termios.IXON)
    new[3] &= ~(termios.ECHO | termios.ICANON)
    off = os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE")
    new[6][termios.VINTR], new[6][termios.VMIN], new[6][termios.VTIME] = bytes([off]), 1, 0
    termios.tcsetattr(sys.stdin, termios.TCSANOW, new)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, old)


def _keys() -> Any:
    """Enter sends, after a backslash it doesn't; Esc-Enter is a new line. Pasting is no Enter."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(path: Optional[str | Path]) -> Any:
    """The lines of earlier sessions, or of this one alone where no file can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk ends no conversation
                super().store_string(string)

    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(os.path.expanduser(path or os.path.join(state, "llama", "history")))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # others needn't read it
        with path.open("r+b"):
            return Kept(path)
    except OSError:
        return InMemoryHistory()


def is_capable() -> bool:
    """Whether standard input and output are a terminal that can do more than lines."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def pick_terminal(history: Optional[str | Path] = None) -> Plain:
    """The one that standard input and output can serve."""
    return Rich(history) if is_capable() else Plain()
