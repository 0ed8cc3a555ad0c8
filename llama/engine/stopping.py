"""Stop strings: end a stream of text before the first of them."""

from typing import Any, Iterable, List, Sequence


def stop_strings(stops: Any) -> List[str]:
    """Stop strings as a list, whatever they come in; None: there are none.

    Raises:
        ValueError: one string, or anything but strings that aren't empty.
    """
    several = isinstance(stops, Iterable) and not isinstance(stops, str)
    found = list(stops) if several else []
    if not (several or stops is None) or not all(isinstance(s, str) and s for s in found):
        raise ValueError(f"stop={found or stops!r}: pass a list of strings that aren't empty")
    return found


class StopStrings:
    """Passes on pieces of text up to the first stop string, holding back what may become one.

    The first is the one that ends first; of those that end at the same place, the longest. So where
    a text is cut doesn't depend on how it is split into pieces.

    Attributes:
        stopped: whether one was found; nothing more is passed on then.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stop_strings(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Add a piece; returns the text that can be passed on."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            _, at = min(found)
            shown, self._held, self.stopped = self._held[:at], "", True
            return shown
        held = max((_overlap(self._held, s) for s in self._stops), default=0)
        at = len(self._held) - held
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def finish(self) -> str:
        """The text held back, once no more comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
