"""Text read while it comes, with the parts of JSON's grammar that calls of tools need."""

import json
import re
from typing import Any, Generator, Sequence

Steps = Generator[None, None, Any]  # yields where more text is needed; returns what was read

_SPACES = re.compile(r"\s*")
_IN_TEXT, _IN_JSON = re.compile(r'[^"\\]*'), re.compile(r'[^"{}\[\],]*')


class Malformed(Exception):
    """A reply tries to call a tool and fails."""


class NotJSON(Malformed):
    """Where a call's JSON is wrong or ends too early."""


def loads(text: str) -> Any:
    """Raises NotJSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotJSON(str(error)) from None


class Scanner:
    """A place in a text that grows. Its methods are generators, resumed when there is more.

    Attributes:
        text: all of it so far.
        at: up to here it is read.
        ended: there will be no more.
    """

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False

    def next(self, between: "re.Pattern[str]" = _SPACES) -> Steps:
        """Skip white space; the character after it, "" at the end."""
        while True:
            self.at = between.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            yield

    def expect(self, chars: str) -> Steps:
        char = yield from self.next()
        if not char or char not in chars:
            raise NotJSON
        self.at += 1
        return char

    def one_of(self, texts: Sequence[str]) -> Steps:
        """Which of these texts comes next; "" if none does."""
        while True:
            rest = self.text[self.at : self.at + max(map(len, texts))]
            found = next((text for text in texts if rest.startswith(text)), "")
            if found or self.ended or not any(text.startswith(rest) for text in texts):
                return found
            yield

    def string(self) -> Steps:
        begin = self.at
        if (yield from self.next()) != '"':
            raise NotJSON
        yield from self.value()
        return loads(self.text[begin : self.at].strip())

    def value(self) -> Steps:
        """Move behind a value. Only its strings and brackets are looked at: `loads` is strict."""
        depth, quoted = 0, False
        while True:
            found = (_IN_TEXT if quoted else _IN_JSON).match(self.text, self.at)
            self.at = found.end()  # type: ignore[union-attr]  # it always matches
            char = self.text[self.at : self.at + 1]
            if not char or (char == "\\" and len(self.text) < self.at + 2):
                if self.ended:
                    raise NotJSON
                yield
                continue
            if not (depth or quoted) and char in ",]}":
                return
            self.at += 1 + (char == "\\")
            quoted ^= char == '"'
            depth += not quoted and (char in "{[") - (char in "]}")
            if not (depth or quoted) and char in '"]}':
                return
