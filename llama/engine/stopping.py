"""Where a text stops: at the first of some strings, of which a stream shows nothing."""

from typing import Sequence


class StopStrings:
    """Passes a text on as it comes, up to the first stop string.

    The first is the one that ends first, and of those that end together the longest. So where a
    text is cut doesn't depend on the pieces in which it came. What may yet become a stop string is
    held back.

    Attributes:
        stopped: whether one was found; nothing is passed on any more.
    """

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop={stops!r}: pass a list of strings that aren't empty")
        self._stops = list(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What can be shown, now that this came."""
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
        """What was held back, now that no more will come."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning, and not all, of the stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
