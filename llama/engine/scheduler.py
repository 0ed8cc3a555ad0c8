"""Decides what each forward pass computes: a number of tokens of each sequence in it.

All passes follow one rule, that of vLLM: a sequence has tokens that are known and not yet computed,
and a pass computes some of them, at most `max_tokens` of all sequences together. A decoding step is
one token, a prompt is many, in chunks; draft tokens are verified as a prompt's are computed.

Running sequences that decode come first, then running ones that are still being prefilled, then
waiting ones. Prompts may get less of a pass beside some that decode, whose readers wait for all of
it. Otherwise the order is that of arrival, where a level of priority is worth `PATIENCE` steps:
only requests that come within that time can overtake, so none waits for ever. When the cache is
full, the last sequence in this order is preempted: its blocks are freed and computed again later.

Nothing here depends on torch or on the time of day.
"""

import bisect
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

from llama.engine.blocks import Blocks, Node
from llama.layers.ids import common_length

PATIENCE = 100  # steps
HELD = 32  # tokens that another sequence is about to compute, worth waiting for


class Sequence:
    """A text being generated, as the scheduler sees it.

    Args:
        tokens: those known: the prompt's; those of the answer are appended as they are sampled.
        max_len: tokens that it may have in the end.
        priority: higher ones come earlier.
        reusable: how many of its first tokens may be taken from the cache; None: all.
        adapter: its number (`llama.layers.low_rank`); 0: none.
        extra: whether it doesn't count as one of the rows that run at once.

    Attributes:
        computed: positions in the cache.
        found: known tokens that were in the cache when it was first admitted; None before.
        table: the blocks that hold them.
    """

    def __init__(
        self,
        tokens: List[int],
        max_len: int,
        priority: int = 0,
        reusable: Optional[int] = None,
        adapter: int = 0,
        extra: bool = False,
    ):
        self.tokens, self.max_len, self.priority = tokens, max_len, priority
        self.reusable, self.adapter, self.computed = reusable, adapter, 0
        self.extra = extra
        self.found: Optional[int] = None
        self.table: List[int] = []
        self.nodes: List[Node] = []  # of its whole blocks
        self.left = 0  # see `Blocks.leave`
        self.draft: List[int] = []  # proposed after the known tokens
        self.place: Tuple[int, int] = (0, 0)  # in the order of all

    @property
    def remaining(self) -> int:
        """Known tokens that aren't computed."""
        return len(self.tokens) - self.computed


class Plan(NamedTuple):
    """A forward pass."""

    counts: Dict[Sequence, int]  # tokens of each sequence, with its draft
    copies: List[Tuple[int, int]]  # blocks to be copied before it, in order: from, to
    preempted: List[Sequence]


class Scheduler:
    """The sequences that wait and those that run.

    Args:
        blocks: of the cache.
        max_tokens: of a pass.
        max_rows: sequences that run at once.
        max_prefill: of a pass, tokens of prompts beside sequences that decode; None: any number.

    Attributes:
        computed, queried, reused, preemptions: tokens planned, tokens looked up and found in the
            cache, and times that a sequence lost its blocks, so far.
    """

    def __init__(
        self, blocks: Blocks, *, max_tokens: int, max_rows: int, max_prefill: Optional[int] = None
    ):
        self.blocks, self.max_tokens, self.max_rows = blocks, max_tokens, max_rows
        self.max_prefill = max_tokens if max_prefill is None else max_prefill
        self.waiting: List[Sequence] = []
        self.running: List[Sequence] = []
        self.computed = self.queried = self.reused = self.preemptions = 0
        self._step = self._arrivals = 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raises ValueError if sequences wouldn't fit into the whole cache together."""
        size, total = self.blocks.size, self.blocks.total
        lengths = [sequence.max_len for sequence in sequences]
        if sum(-(-length // size) for length in lengths) > total:
            raise ValueError(
                f"a request of up to {sum(lengths)} tokens, and the cache holds "
                f"{total * size}: shorten it, or give the engine a larger cache_tokens"
            )

    def add(self, sequence: Sequence, beside: Optional[Sequence] = None) -> None:
        """Queue a sequence, at the place of another if given; raises what `check` raises."""
        self.check([sequence])
        self._arrivals += 1
        sequence.place = (self._step - PATIENCE * sequence.priority, self._arrivals)
        if beside is not None:
            sequence.place = beside.place
        bisect.insort(self.waiting, sequence, key=lambda s: s.place)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended or was cancelled: its blocks are released at once."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def discard(self, sequence: Sequence) -> List[int]:
        """`remove` a running sequence whose keys and values are broken: nobody may find them.

        Returns:
            Its blocks that no other sequence uses.
        """
        self.blocks.forget(sequence.table)
        self.running.remove(sequence)
        before, sequence.computed = set(sequence.table), 0
        self._release(sequence)
        return [block for block in before if not self.blocks.users(block)]

    def restart(self) -> None:
        """A pass has failed: what it wrote isn't known, so all running sequences are computed again
        and nothing is known to the cache."""
        for sequence in self.running:
            sequence.computed = 0  # nothing to publish
            self._release(sequence)
            bisect.insort(self.waiting, sequence, key=lambda s: s.place)
        self.running.clear()
        self.blocks.clear()

    def plan(self) -> Plan:
        """The next pass. `advance` is to be called when it has been computed."""
        self._step += 1
        plan, budget = Plan({}, [], []), self.max_tokens
        if decoding := sum(sequence.remaining == 1 for sequence in self.running):
            budget = min(budget, decoding + self.max_prefill)
        self.running.sort(key=lambda s: s.place)
        for sequence in sorted(self.running, key=lambda s: s.remaining > 1):
            n = min(sequence.remaining, budget)
            if n and sequence not in plan.preempted and self._make_room(sequence, n, plan):
                plan.counts[sequence] = n
                budget -= n
        if not plan.preempted:
            budget = self._admit_all(plan, budget)
        while not plan.counts and self.running:  # these wait for others that have no room
            self._preempt(self.running[-1], plan)
            budget = self._admit_all(plan, budget)
        budget = self.max_tokens - sum(plan.counts.values())
        for sequence in self.running:
            budget -= self._plan_draft(sequence, plan, budget) if sequence.draft else 0
        self.computed += sum(plan.counts.values())
        return plan

    def advance(self, sequence: Sequence, n: int) -> None:
        """n further known tokens of a sequence have been computed: others can find them."""
        begun = sequence.computed > 0 and sequence.remaining == 1
        sequence.computed += n
        sequence.left = self.blocks.leave(sequence.table, sequence.left, sequence.computed)
        size, nodes = self.blocks.size, sequence.nodes
        while (len(nodes) + 1) * size <= sequence.computed:
            nodes.append(self._publish(sequence, (len(nodes) + 1) * size))
        if not begun and not sequence.remaining:
            self._publish_end(sequence)

    # --- running sequences ------------------------------------------------------------------------

    def _needed(self, sequence: Sequence, n: int) -> int:
        """The blocks that a sequence lacks for n more positions."""
        return max(-(-(sequence.computed + n) // self.blocks.size) - len(sequence.table), 0)

    def _make_room(self, sequence: Sequence, n: int, plan: Plan) -> bool:
        """Give a sequence the blocks for n tokens; others lose theirs if need be."""
        needed = self._needed(sequence, n)
        while needed > self.blocks.available:
            last = max(self.running, key=lambda s: s.place)
            self._preempt(last, plan)
            if last is sequence:
                return False
        if needed:
            sequence.table += self.blocks.allocate(needed)
        return True

    def _plan_draft(self, sequence: Sequence, plan: Plan, budget: int) -> int:
        """Add what there is room for of a sequence's draft; returns how much."""
        known = plan.counts.get(sequence, 0)
        whole = known and known == sequence.remaining
        sequence.draft = sequence.draft[:budget] if whole else []
        needed = self._needed(sequence, known + len(sequence.draft))
        if needed > self.blocks.available:
            sequence.draft, needed = [], 0
        if sequence.draft:
            sequence.table += self.blocks.allocate(needed)
            plan.counts[sequence] += len(sequence.draft)
        return len(sequence.draft)

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        self.running.remove(sequence)
        plan.counts.pop(sequence, None)
        plan.preempted.append(sequence)
        self.preemptions += 1
        self._release(sequence)
        bisect.insort(self.waiting, sequence, key=lambda s: s.place)

    def _release(self, sequence: Sequence) -> None:
        self._publish_end(sequence)
        self.blocks.release(sequence.table, sequence.left)
        sequence.table, sequence.nodes, sequence.draft = [], [], []
        sequence.computed = sequence.left = 0

    def _publish(self, sequence: Sequence, end: int) -> Node:
        """The positions of a block, up to `end`."""
        at = (end - 1) // self.blocks.size
        tokens = sequence.tokens[at * self.blocks.size : end]
        parent = sequence.nodes[at - 1] if at else None
        return self.blocks.publish(parent, sequence.table[at], tokens, sequence.adapter)

    def _publish_end(self, sequence: Sequence) -> None:
        if sequence.computed > len(sequence.nodes) * self.blocks.size:
            self._publish(sequence, sequence.computed)

    # --- waiting sequences ------------------------------------------------------------------------

    def _admit_all(self, plan: Plan, budget: int) -> int:
        """Admit what fits, in order; returns what is left of the budget."""
        rows = sum(not sequence.extra for sequence in self.running) if self.waiting else 0
        for sequence in self.waiting[: 2 * self.max_rows]:
            if not budget or (rows == self.max_rows and not sequence.extra):
                break
            if self._is_about_to_be_known(sequence):
                continue
            if not self._admit(sequence, plan):
                break  # and none behind it, or it might wait for ever
            self.waiting.remove(sequence)
            self.running.append(sequence)
            rows += not sequence.extra
            plan.counts[sequence] = min(sequence.remaining, budget)
            budget -= plan.counts[sequence]
        return budget

    def _is_about_to_be_known(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing what this one begins with."""
        tokens = sequence.tokens[: sequence.reusable]
        last = len(sequence.tokens) - 1  # whose hidden state is needed
        for other in self.running if tokens else ():
            if (
                other.computed < last
                and other.remaining
                and other.adapter == sequence.adapter
                and other.tokens[:HELD] == tokens[:HELD]
            ):
                shared = common_length(tokens[:last], other.tokens)
                match = self.blocks.match(tokens, sequence.adapter)
                known = min(match.positions, last)
                if shared >= known + HELD and other.computed < shared:
                    return True
        return False

    def _admit(self, sequence: Sequence, plan: Plan) -> bool:
        """Give a sequence the blocks for its known tokens, those known to the cache among them."""
        known = sequence.tokens[:-1][: sequence.reusable]  # the last one's hidden state is needed
        nodes, tail, positions = self.blocks.match(known, sequence.adapter)
        if positions == len(nodes) * self.blocks.size:
            tail = None
        shared = [node.block for node in nodes]
        kept = [*shared, tail.block] if tail else shared
        for block in kept:
            self.blocks.share(block)
        needed = -(-len(sequence.tokens) // self.blocks.size) - len(shared)
        if tail and needed > self.blocks.available:  # as its own block it may be what is missing
            self.blocks.release([tail.block])
            kept, tail, positions = shared, None, len(nodes) * self.blocks.size
        if needed > self.blocks.available:
            self.blocks.release(kept)
            return False
        new = self.blocks.allocate(needed)
        if tail:
            plan.copies.append((tail.block, new[0]))
            self.blocks.release([tail.block])  # copied before anything is written to it
        sequence.table, sequence.nodes, sequence.computed = shared + new, list(nodes), positions
        sequence.left = self.blocks.leave(sequence.table, 0, positions)
        self.queried += len(sequence.tokens)
        self.reused += positions
        if sequence.found is None:
            sequence.found = positions
        return True
