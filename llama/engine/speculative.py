"""Speculative decoding (2211.17192): tokens that may follow are guessed cheaply, and one pass of
the model looks at all of them.

A guess changes the speed and nothing else. At each position a row draws its token from the model's
own logits with the random number that is that token's in any case (`sampling.Numbers`); where it
is the token that was guessed, the next position was computed in the same pass. So texts are those
of plain decoding, drawn ones too. A draft model draws with the same numbers, and therefore mostly
the same tokens, where rejection sampling would have to draw anew.
"""

import time
from bisect import bisect_left
from collections import defaultdict, deque
from typing import Deque, Dict, Hashable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import torch

from llama.engine.prefill import prefill
from llama.engine.rows import Row
from llama.engine.sampling import draw
from llama.layers import parallel
from llama.model import Transformer

WIDTHS = (0, 1, 3, 7, 15, 31)  # tokens guessed at a time
MOST = WIDTHS[-1]


class Speculator(Protocol):
    """Where guesses come from. Made for one call; all ranks call it alike."""

    def guess(self, batch: List[Row]) -> List[List[int]]:
        """What may follow each row's text: at most MOST tokens, the same on all ranks."""

    def learn(self, drawn: List[List[int]]) -> None:
        """What did follow, up to the first wrong guess and with what was drawn in its place."""


class Guess(NamedTuple):
    tokens: List[int]
    kinds: List[Hashable]  # of each: how often those of a kind are right is counted


class Pace:
    """How many tokens to guess at a time: as many as promise the most tokens a second, or none.

    Made once for a model: what was learned in a call is of use in the next.

    That takes the chance of a guess to be right, which is counted (of guesses that weren't put
    before the model too), and the seconds that a pass takes, which are measured by its number of
    tokens. What isn't known yet is approached by doubling.
    """

    def __init__(self, limit: Optional[int] = None) -> None:
        self._limit = limit  # tokens in a pass: so many give the bits of single ones
        self._chances: Dict[Hashable, float] = {}
        self._seconds: Dict[int, Deque[Tuple[int, float]]] = {}  # by tokens: (step, seconds)
        self._step = self._widest = 0
        self.drafting = 0.0  # seconds that each token of a guess takes to make
        self._idle, self._patience = 0, 16  # steps without guesses, and how many there may be

    def width(self, guesses: Sequence[Guess]) -> int:
        """How many tokens of each guess to look at."""
        most = min(self._most(guesses), 2 * self._widest + 1)
        # What was measured once may have been slow for another reason.
        known = sorted(
            (n, min(s for _, s in times))
            for n, times in list(self._seconds.items())  # threads may share a model
            if len(times) > 1 or n <= len(guesses)
        )
        if most < 1 or not known or known[0][0] > len(guesses):  # plain decoding is the measure
            return 0
        chances = [self._right(guess.kinds[:most]) for guess in guesses]

        def speed(width: int) -> float:
            tokens = len(guesses) + sum(sum(right[:width]) for right in chances)
            passing = _between(known, len(guesses) * (1 + width))
            return tokens / (passing + width * self.drafting)

        best = max((width for width in WIDTHS if width <= most), key=speed)
        self._widest = max(self._widest, best)
        return best

    def width_or_trial(self, guesses: Sequence[Guess]) -> int:
        """The same, for guesses that aren't made unless they pay, of which nothing is learned
        otherwise: now and then, ever more rarely, one is tried."""
        width = self.width(guesses)
        if width:
            self._idle, self._patience = 0, 16
        elif self._idle >= self._patience and self._most(guesses) > 0:
            self._idle, self._patience, width = 0, min(2 * self._patience, 2048), 1
        else:
            self._idle += 1
        return width

    def _most(self, guesses: Sequence[Guess]) -> int:
        """The longest guess, as far as a pass may hold it for each."""
        longest = max((len(guess.kinds) for guess in guesses), default=0)
        return longest if self._limit is None else min(longest, self._limit // len(guesses) - 1)

    def _right(self, kinds: Sequence[Hashable]) -> List[float]:
        """For each token of a guess, the chance that it and all before it are right."""
        chance, found = 1.0, []
        for kind in kinds:
            chance *= self._chances.get(kind, 0.5)
            found.append(chance)
        return found

    def learn(self, guesses: Sequence[Guess], drawn: Sequence[Sequence[int]]) -> None:
        """Count which guesses were right."""
        for guess, tokens in zip(guesses, drawn, strict=True):
            for kind, guessed, token in zip(guess.kinds, guess.tokens, tokens, strict=False):
                old = self._chances.get(kind, 0.5)
                self._chances[kind] = old + ((guessed == token) - old) / 8
                if guessed != token:
                    break

    def passed(self, tokens: int, seconds: float) -> None:
        """Remember how long a pass took; the shortest of a few, as others have other causes."""
        self._step += 1
        self._seconds.setdefault(tokens, deque(maxlen=4)).append((self._step, seconds))
        for n, times in list(self._seconds.items()):  # an old measurement may be wrong by now
            if times[-1][0] < self._step - 256:
                del self._seconds[n]


def _between(known: List[Tuple[int, float]], n: int) -> float:
    """The seconds of a pass of n tokens, from ascending ones that are known; flat beyond them."""
    at = bisect_left(known, (n, 0.0))
    if at == len(known) or at == 0:
        return known[min(at, len(known) - 1)][1]
    (low, fast), (high, slow) = known[at - 1], known[at]
    return fast + (slow - fast) * (n - low) / (high - low)


def _room(row: Row) -> int:
    """Guesses beyond this would never be drawn: the last token needs no pass of its own."""
    return min(row.max_len - len(row.prompt) - len(row.answer) - 1, MOST)


def _allowed(row: Row, tokens: List[int]) -> List[int]:
    """As many as the row's constraint lets follow."""
    return tokens if row.constraint is None else tokens[: row.constraint.valid(tokens)]


class _Timed:
    """What speculators share: passes are timed, and their guesses counted."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._guesses: List[Guess] = []

    def _looked_at(self, guesses: List[List[int]]) -> List[List[int]]:
        """The pass over these begins."""
        self._tokens = len(guesses) * (1 + max(map(len, guesses)))
        self._began = time.perf_counter()
        return guesses

    def learn(self, drawn: List[List[int]]) -> None:
        if self._guesses:
            self._pace.passed(self._tokens, time.perf_counter() - self._began)
            self._pace.learn(self._guesses, drawn)


class Lookup(_Timed):
    """Guesses that what followed the row's last tokens earlier in its text follows again.

    (Prompt lookup decoding: github.com/apoorvumang/prompt-lookup-decoding.) It costs next to
    nothing, so it is done for each token. Where a constraint leaves no choice, that is the guess.
    """

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace)
        self._texts: Dict[Tuple[int, int], _Text] = {}

    def guess(self, batch: List[Row]) -> List[List[int]]:
        if parallel.rank() == 0:
            self._guesses = [self._of(row) for row in batch]
            self._width = self._pace.width(self._guesses)
        found = [guess.tokens[: self._width] for guess in self._guesses] or [[] for _ in batch]
        return self._looked_at(parallel.share_lists(found, MOST))

    def _of(self, row: Row) -> Guess:
        key = row.index, row.sample
        if key not in self._texts:
            self._texts[key] = _Text(row.prompt)
        text = self._texts[key]
        text.extend(row.answer[len(text.ids) - len(row.prompt) :])
        if row.constraint is not None:
            forced = row.constraint.forced()[: _room(row)]
            if forced:
                return Guess(forced, ["forced"] * len(forced))
        match, tokens = text.find(_room(row))
        tokens = _allowed(row, tokens)
        return Guess(tokens, [min(match + i, LONGEST) for i in range(len(tokens))])


LONGEST = 16  # tokens that a match is compared over
PLACES = 16  # at which one is looked for, the latest first


class _Text:
    """A text, and where in it each pair of tokens stands."""

    def __init__(self, ids: Sequence[int]):
        self.ids: List[int] = []
        self._after: Dict[Tuple[int, int], List[int]] = defaultdict(list)
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            if self.ids:
                self._after[self.ids[-1], token].append(len(self.ids) + 1)
            self.ids.append(token)

    def find(self, most: int) -> Tuple[int, List[int]]:
        """The length of the longest match with the text's end, and what comes after it there."""
        ids, end = self.ids, len(self.ids)
        best, at = 0, 0
        for place in self._after[ids[-2], ids[-1]][-2 : -2 - PLACES : -1] if end > 1 else ():
            match = 2
            while match < min(LONGEST, place) and ids[place - match - 1] == ids[end - match - 1]:
                match += 1
            if match > best:
                best, at = match, place
        if not best:
            return 0, []
        # Where the match overlaps with the end, the text goes round in circles.
        return best, [ids[at + i % (end - at)] for i in range(max(most, 0))]


class Draft(_Timed):
    """Guesses by a smaller model with the same vocabulary.

    Its own cache follows the rows: it takes in what was drawn since it was last asked, and forgets
    what was guessed and not drawn.
    """

    def __init__(self, model: Transformer, pace: Pace):
        super().__init__(pace)
        self._model = model
        self._rows: List[Row] = []

    def guess(self, batch: List[Row]) -> List[List[int]]:
        rooms = [_room(row) for row in batch]
        possible = [Guess([], ["draft"] * room) for room in rooms]
        [[width]] = parallel.share_lists([[self._pace.width_or_trial(possible)]], 1)
        found = self._draft(batch, width) if width > 0 else [[] for _ in batch]
        found = [ids[: max(room, 0)] for ids, room in zip(found, rooms, strict=True)]
        if parallel.rank() == 0:
            found = [_allowed(row, ids) for row, ids in zip(batch, found, strict=True)]
        found = parallel.share_lists(found, MOST)
        self._guesses = [Guess(ids, ["draft"] * len(ids)) for ids in found]
        return self._looked_at(found)

    def _draft(self, batch: List[Row], width: int) -> List[List[int]]:
        texts = [[*row.prompt, *row.answer] for row in batch]
        began = time.perf_counter()
        if not self._rows:
            room = max(row.max_len for row in batch) + MOST
            self._cache, self._rows = self._model.new_cache(len(batch), room), batch
        elif len(batch) < len(self._rows):
            staying = {id(row) for row in batch}
            self._cache.keep([i for i, row in enumerate(self._rows) if id(row) in staying])
            self._rows = batch
        cached = zip(self._cache.lengths, texts, strict=True)
        self._cache.truncate([min(length, len(text) - 1) for length, text in cached])
        h, _ = prefill(self._model, texts, self._cache)
        guesses: List[List[int]] = [[] for _ in batch]
        for i in range(width):
            tokens = self._draw(self._model.logits(h), batch, guesses)
            for guess, token in zip(guesses, tokens, strict=True):
                guess.append(token)
            if i < width - 1:
                fed = torch.tensor(tokens, device=h.device)[:, None]
                h = self._model.hidden(fed, self._cache.lengths, self._cache)[:, -1]
        took = (time.perf_counter() - began) / width
        pace = self._pace
        pace.drafting = took if not pace.drafting else 0.75 * pace.drafting + 0.25 * took
        return guesses

    def _draw(self, logits: torch.Tensor, batch: List[Row], guesses: List[List[int]]) -> List[int]:
        """A token for each row, as the row will draw its own."""
        found: List[List[int]] = [[] for _ in batch]
        if parallel.rank() == 0:
            likeliest = logits.argmax(-1).tolist()
            for i, (row, guess) in enumerate(zip(batch, guesses, strict=True)):
                answer = [*row.answer, *guess]
                found[i] = [
                    likeliest[i]
                    if row.is_argmax
                    else draw(logits[i], row.params, row.prompt, answer, row.numbers)
                ]
        return [ids[0] for ids in parallel.share_lists(found, 1)]


class Speculators:
    """A model's ways to guess, and what was learned of each.

    Args:
        draft: a smaller model, or None.
    """

    def __init__(self, model: Transformer, draft: Optional[Transformer]):
        self._draft = draft
        # Of a backend that promises it: passes of so many tokens give the bits of single tokens.
        exact_tokens = getattr(model, "exact_tokens", None)
        self._paces = {name: Pace(exact_tokens) for name in ("lookup", "draft")}

    def __call__(self, speculate: Optional[str]) -> Optional[Speculator]:
        """The speculator of that name, for one call; by default the draft, if there is one.

        Raises:
            ValueError: another name, or "draft" without a draft model.
        """
        if speculate is None:
            speculate = "off" if self._draft is None else "draft"
        if speculate not in ("off", "lookup", "draft"):
            raise ValueError(f"speculate={speculate!r}: choose 'lookup', 'draft' or 'off'")
        if speculate == "lookup":
            return Lookup(self._paces["lookup"])
        if speculate == "draft" and self._draft is None:
            raise ValueError("speculate='draft' needs a draft model: build with draft_ckpt_dir")
        if self._draft is None or speculate == "off":
            return None
        return Draft(self._draft, self._paces["draft"])
