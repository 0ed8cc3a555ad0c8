"""Speculative decoding (arXiv 2211.17192): tokens are proposed cheaply, and one forward pass of the
model verifies all of them.

Proposed (draft) tokens change the speed only, not the text, sampled or greedy. At each position a
row samples its token from the model's own logits, with the random number that belongs to that
position (`sampling.RandomNumbers`). If that is the proposed token, it is accepted, and the same
pass has computed the next position. This replaces the rejection sampling of the paper. A draft
model samples with the same random numbers, so that it mostly proposes the same tokens.
"""

import time
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Deque, Dict, Hashable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np
import torch

from llama.engine.blocks import Blocks
from llama.engine.passes import hidden
from llama.engine.rows import Row
from llama.engine.sampling import sample_token
from llama.layers import parallel
from llama.layers.cache import KVCache
from llama.layers.ids import common_length
from llama.layers.paged import PAGE, PagedRows, blocks_for
from llama.model import Transformer

DRAFT_LENGTHS = (0, 1, 3, 7, 15, 31)  # tokens proposed per pass
MAX_DRAFT = DRAFT_LENGTHS[-1]


class Speculator(Protocol):
    """A source of draft tokens, for rows that come and go; all ranks make the same calls to it."""

    def propose(self, batch: List[Row]) -> List[List[int]]:
        """Draft tokens for each row, at most MAX_DRAFT, the same on all ranks."""

    def learn(self, sampled: List[List[int]], alone: bool = True) -> None:
        """The tokens sampled since: those accepted, and the one after the last of them.

        alone: whether the pass computed these rows with all of their draft tokens, and no others.
        """

    def forget(self, row: Row) -> None:
        """A row has ended."""


class Proposal(NamedTuple):
    """A row's draft tokens."""

    tokens: List[int]
    kinds: List[Hashable]  # of each token: acceptance rates are counted by kind


class DraftLength:
    """Decides how many tokens to propose per pass: as many as promise the most tokens per second.

    That keeps speculative decoding from being slower than plain decoding, which is proposing none:
    verifying more tokens takes longer, by how much depends on the machine, and how many of them are
    accepted depends on the text. So both are observed: seconds per pass by its number of tokens,
    and acceptance rates, of tokens proposed but not verified too. Lengths not tried yet are
    approached by doubling. Made once for a model: calls learn from those before.
    """

    def __init__(self) -> None:
        self._rates: Dict[Hashable, float] = {}  # of acceptance, by kind
        self._seconds: Dict[int, Deque[Tuple[int, float]]] = {}  # by tokens: (step, seconds)
        self._step = self._longest = 0
        self.drafting = 0.0  # seconds to make one draft token of each row
        self._idle, self._patience = 0, 16  # steps without proposals, and the limit to these

    def choose(self, proposals: Sequence[Proposal]) -> int:
        """How many tokens of each proposal to verify."""
        most = min(self._most(proposals), 2 * self._longest + 1)
        # A single measurement may be an outlier.
        known = sorted(
            (n, min(s for _, s in times))
            for n, times in list(self._seconds.items())  # threads may share a model
            if len(times) > 1 or n <= len(proposals)
        )
        if most < 1 or not known or known[0][0] > len(proposals):  # measure plain decoding first
            return 0
        accepted = [self._expected(proposal.kinds[:most]) for proposal in proposals]

        def speed(length: int) -> float:
            tokens = len(proposals) + sum(sum(rates[:length]) for rates in accepted)
            verifying = _interpolate(known, len(proposals) * (1 + length))
            return tokens / (verifying + length * self.drafting)

        best = max((length for length in DRAFT_LENGTHS if length <= most), key=speed)
        self._longest = max(self._longest, best)
        return best

    def choose_or_probe(self, proposals: Sequence[Proposal]) -> int:
        """`choose` for proposals that are made only once their length is chosen. While that is 0,
        no acceptance is observed, so one token is tried now and then, ever more rarely."""
        length = self.choose(proposals)
        if length:
            self._idle, self._patience = 0, 16
        elif self._idle >= self._patience and self._most(proposals) > 0:
            self._idle, self._patience, length = 0, min(2 * self._patience, 2048), 1
        else:
            self._idle += 1
        return length

    def _most(self, proposals: Sequence[Proposal]) -> int:
        """The longest proposal's length."""
        return max((len(proposal.kinds) for proposal in proposals), default=0)

    def _expected(self, kinds: Sequence[Hashable]) -> List[float]:
        """For each token of a proposal, the probability that it and all before it are accepted."""
        return list(accumulate((self._rates.get(kind, 0.5) for kind in kinds), mul))

    def learn(self, proposals: Sequence[Proposal], sampled: Sequence[Sequence[int]]) -> None:
        """Update the acceptance rates (exponential moving averages)."""
        for proposal, tokens in zip(proposals, sampled, strict=True):
            for kind, draft, token in zip(proposal.kinds, proposal.tokens, tokens, strict=False):
                old = self._rates.get(kind, 0.5)
                self._rates[kind] = old + ((draft == token) - old) / 8
                if draft != token:
                    break

    def passed(self, tokens: int, seconds: float) -> None:
        """Record how long a pass took. `choose` takes the shortest of the last four, since other
        processes can only make it longer; measurements expire after 256 steps."""
        self._step += 1
        self._seconds.setdefault(tokens, deque(maxlen=4)).append((self._step, seconds))
        for n, times in list(self._seconds.items()):
            if times[-1][0] < self._step - 256:
                del self._seconds[n]


def _interpolate(known: List[Tuple[int, float]], n: int) -> float:
    """The seconds of a pass of n tokens, from ascending measurements; constant beyond them."""
    return float(np.interp(n, [size for size, _ in known], [seconds for _, seconds in known]))


def _max_draft(row: Row) -> int:
    """Draft tokens that a row can use: its last token needs no further position."""
    return min(row.max_len - len(row.prompt) - len(row.answer) - 1, MAX_DRAFT)


def _allowed(row: Row, tokens: List[int]) -> List[int]:
    """The tokens up to the first that the row's constraint rules out."""
    return tokens if row.constraint is None else tokens[: row.constraint.valid(tokens)]


class _Timed:
    """What speculators share: they time passes and count accepted tokens."""

    def __init__(self, length: DraftLength) -> None:
        self._length = length
        self._proposals: List[Proposal] = []

    def _begin_pass(self, drafts: List[List[int]]) -> List[List[int]]:
        self._tokens = len(drafts) * (1 + max(map(len, drafts)))
        self._began = time.perf_counter()
        return drafts

    def learn(self, sampled: List[List[int]], alone: bool = True) -> None:
        if self._proposals:
            if alone:
                self._length.passed(self._tokens, time.perf_counter() - self._began)
            self._length.learn(self._proposals, sampled)


class PromptLookup(_Timed):
    """Proposes what followed earlier occurrences of the row's last tokens in its own text.

    (Prompt lookup decoding: github.com/apoorvumang/prompt-lookup-decoding.) It costs almost
    nothing, so it is done for each token. Where a constraint leaves one continuation, it proposes
    that.
    """

    def __init__(self, length: DraftLength) -> None:
        super().__init__(length)
        self._texts: Dict[int, _Text] = {}  # by the row's id

    def propose(self, batch: List[Row]) -> List[List[int]]:
        if parallel.rank() == 0:
            self._proposals = [self._of(row) for row in batch]
            n = self._length.choose(self._proposals)
            found = [proposal.tokens[:n] for proposal in self._proposals]
        else:
            found = [[] for _ in batch]
        return self._begin_pass(parallel.share_lists(found, MAX_DRAFT))

    def _of(self, row: Row) -> Proposal:
        text = self._texts.get(id(row))
        if text is None:
            self._texts[id(row)] = text = _Text(row.prompt)
        text.extend(row.answer[len(text.ids) - len(row.prompt) :])
        if row.constraint is not None:
            forced = row.constraint.forced()[: _max_draft(row)]
            if forced:
                return Proposal(forced, ["forced"] * len(forced))
        match, tokens = text.find(_max_draft(row))
        tokens = _allowed(row, tokens)
        return Proposal(tokens, [min(match + i, MAX_MATCH) for i in range(len(tokens))])

    def forget(self, row: Row) -> None:
        self._texts.pop(id(row), None)


MAX_MATCH = 16  # tokens compared; longer matches count the same
MAX_PLACES = 16  # occurrences compared, the latest first


class _Text:
    """A row's tokens, with an index of where each pair of them occurs."""

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
        """The length of the longest earlier match of the text's end, and the tokens after it."""
        ids, end = self.ids, len(self.ids)
        best, at = 0, 0
        for place in self._after[ids[-2], ids[-1]][-2 : -2 - MAX_PLACES : -1] if end > 1 else ():
            match = 2
            while match < min(MAX_MATCH, place) and ids[place - match - 1] == ids[end - match - 1]:
                match += 1
            if match > best:
                best, at = match, place
        if not best:
            return 0, []
        # Where the match reaches the end, it repeats itself.
        return best, [ids[at + i % (end - at)] for i in range(max(most, 0))]


@dataclass
class _Held:
    """What the draft model's cache holds of a row."""

    table: List[int]  # its blocks
    length: int = 0  # positions computed: of its text, of which it then had `of_text` tokens, ...
    of_text: int = 0
    draft: List[int] = field(default_factory=list)  # ... and of this draft

    def known(self, text: List[int]) -> int:
        """Positions that hold what the text has become, without its last token."""
        accepted = common_length(self.draft, text[self.of_text : self.of_text + len(self.draft)])
        return min(self.length, self.of_text + accepted, len(text) - 1)


class DraftModel(_Timed):
    """Proposes what a smaller model with the same vocabulary generates.

    Its cache follows the rows': it computes the tokens sampled since its last call, in place of
    draft tokens that were rejected.

    Args:
        blocks: of its cache; rows that don't fit get no draft.
    """

    def __init__(self, model: Transformer, length: DraftLength, blocks: int):
        super().__init__(length)
        self._model, self._blocks = model, Blocks(1 + blocks, PAGE)
        self._pool: Optional[KVCache] = None
        self._held: Dict[int, _Held] = {}  # by the row's id

    def propose(self, batch: List[Row]) -> List[List[int]]:
        limits = [_max_draft(row) for row in batch]
        possible = [Proposal([], ["draft"] * limit) for limit in limits]
        [[length]] = parallel.share_lists([[self._length.choose_or_probe(possible)]], 1)
        found: List[List[int]] = [[] for _ in batch]
        fitting = [i for i in range(len(batch)) if length and self._fits(batch[i], limits[i])]
        if fitting:
            drafts = self._draft([batch[i] for i in fitting], length)
            for i, draft in zip(fitting, drafts, strict=True):
                found[i] = draft[: limits[i]]
        if parallel.rank() == 0:
            found = [_allowed(row, ids) for row, ids in zip(batch, found, strict=True)]
        found = parallel.share_lists(found, MAX_DRAFT)
        self._proposals = [Proposal(ids, ["draft"] * len(ids)) for ids in found]
        return self._begin_pass(found)

    def _fits(self, row: Row, limit: int) -> bool:
        """Give a row the blocks for all of its text and a draft, if it can use one."""
        if limit < 1:
            return False
        held = self._held.setdefault(id(row), _Held([]))
        needed = blocks_for(row.max_len + MAX_DRAFT) - len(held.table)
        if needed > self._blocks.available:
            return False
        held.table += self._blocks.allocate(needed)
        return True

    def forget(self, row: Row) -> None:
        held = self._held.pop(id(row), None)
        if held is not None:
            self._blocks.release(held.table)

    def _draft(self, batch: List[Row], length: int) -> List[List[int]]:
        began = time.perf_counter()
        if self._pool is None:
            self._pool = self._model.new_cache(1 + self._blocks.total, PAGE)
        held = [self._held[id(row)] for row in batch]
        texts = [[*row.prompt, *row.answer] for row in batch]
        known = [h.known(text) for h, text in zip(held, texts, strict=True)]
        new = [text[n:] for text, n in zip(texts, known, strict=True)]
        drafts: List[List[int]] = [[] for _ in batch]
        for _ in range(length):
            cache = PagedRows(self._pool, [h.table for h in held], known)
            known = [n + len(ids) for n, ids in zip(known, new, strict=True)]
            ends = torch.tensor([*accumulate(map(len, new))], device=self._model.norm.weight.device)
            h = hidden(self._model, new, cache)[ends - 1]
            tokens = self._sample(self._model.logits(h), batch, drafts)
            for draft, token in zip(drafts, tokens, strict=True):
                draft.append(token)
            new = [[token] for token in tokens]
        for each, n, text, draft in zip(held, known, texts, drafts, strict=True):
            each.length, each.of_text, each.draft = n, len(text), draft
        took, old = (time.perf_counter() - began) / length, self._length.drafting
        self._length.drafting = took if not old else 0.75 * old + 0.25 * took
        return drafts

    def _sample(self, logits: torch.Tensor, batch: List[Row], drafts: List[List[int]]) -> List[int]:
        """A token for each row, sampled as the row will sample its own. Where that fails, the
        likeliest: the row's own sampling fails, too, and says so."""
        found = [[token] for token in logits.argmax(-1).tolist()]
        if parallel.rank() == 0:
            for i, (row, draft) in enumerate(zip(batch, drafts, strict=True)):
                if not row.is_argmax:
                    answer = [*row.answer, *draft]
                    with suppress(Exception):  # of the caller's own code, too: other rows go on
                        found[i] = [
                            sample_token(logits[i], row.params, row.prompt, answer, row.numbers)
                        ]
        return [ids[0] for ids in parallel.share_lists(found, 1)]


class Speculators:
    """A model's speculators, and what they have learned.

    Args:
        draft: a smaller model, or None.
        blocks: of the draft model's cache.
    """

    def __init__(self, draft: Optional[Transformer], blocks: int):
        self._draft, self._blocks = draft, blocks
        self._made: Dict[str, Speculator] = {}

    def __call__(self, speculate: Optional[str], images: bool = False) -> Optional[Speculator]:
        """The speculator of that name; by default "draft" if there is a draft model.

        Args:
            images: whether a prompt has some, of which draft models see nothing.

        Raises:
            ValueError: another name, or "draft" without a draft model or with images.
        """
        if speculate is None:
            speculate = "off" if self._draft is None or images else "draft"
        if speculate == "off":
            return None
        if speculate not in ("lookup", "draft"):
            raise ValueError(f"speculate={speculate!r}: choose 'lookup', 'draft' or 'off'")
        if speculate == "lookup":
            return self._made.setdefault(speculate, PromptLookup(DraftLength()))
        if images:
            raise ValueError("a draft model sees no images: speculate='lookup' or 'off'")
        if self._draft is None:
            raise ValueError("speculate='draft' needs a draft model: build with draft_ckpt_dir")
        return self._made.setdefault(
            speculate, DraftModel(self._draft, DraftLength(), self._blocks)
        )
