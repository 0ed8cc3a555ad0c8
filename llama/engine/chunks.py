"""The blocks of a cache of which some layers read but the last chunk (Llama 4: 8192 positions).

What these layers have stored in earlier chunks is dropped, and its memory is free, while the other
layers keep theirs. A text whose blocks were dropped in part can still be continued from the begin
of a chunk, of which nothing has to be known to those layers.
"""

from typing import Collection, List, Optional, Sequence, Set

from llama.engine.blocks import Blocks, Match, Node
from llama.families.registry import family_of
from llama.layers.cache import KVCache
from llama.layers.paged import PAGE, free_layers
from llama.model import ModelArgs


class ChunkedBlocks(Blocks):
    """`Blocks`, where those that all their rows have left lose a part.

    Args:
        chunk: its positions, a multiple of `size`.
        layers: that read no more.

    Attributes:
        dropped: blocks that have lost it, for the caller, who frees the memory.
    """

    def __init__(self, n: int, size: int, chunk: int, layers: Sequence[int] = ()):
        super().__init__(n, size)
        self.chunk, self.layers = chunk, layers
        self.dropped: List[int] = []
        self._left = [0] * n  # rows that use a block, and read but the other layers' part
        self._partial: Set[int] = set()  # used or known blocks that have lost it

    def _begin(self, positions: int) -> int:
        """The first block of the chunk that the next position belongs to."""
        return positions // self.chunk * self.chunk // self.size

    def leave(self, blocks: Sequence[int], left: int, positions: int) -> int:
        begin = self._begin(positions)
        for block in blocks[left:begin]:
            self._left[block] += 1
            self._drop_if_left(block)
        return max(left, begin)

    def release(self, blocks: Sequence[int], left: int = 0) -> None:
        for block in blocks[:left]:
            self._left[block] -= 1
        super().release(blocks)
        for block in blocks:
            self._drop_if_left(block)

    def match(self, tokens: Sequence[int], adapter: int = 0) -> Match:
        """The longest known beginning of a text that all layers can continue."""
        nodes, tail, positions = super().match(tokens, adapter)
        if tail and tail.parent and tail.block in self._partial:  # others may begin like it
            same = tail.tokens[: positions - len(nodes) * self.size]
            for other in tail.parent.children[same[0]]:
                if other.block not in self._partial and other.tokens[: len(same)] == same:
                    tail = other
        found = [*nodes, *([tail] if tail else [])]
        for at in range(self._begin(positions), len(found)):
            if found[at].block in self._partial:
                return Match(nodes[:at], None, at * self.size)
        return Match(nodes, tail, positions)

    def publish(
        self, parent: Optional[Node], block: int, tokens: Sequence[int], adapter: int = 0
    ) -> Node:
        """See `Blocks.publish`. A whole block takes the place of one that has lost a part."""
        node = super().publish(parent, block, tokens, adapter)
        old = node.block
        if old != block and old in self._partial and block not in self._partial:
            self.forget([block])  # by fewer of its positions
            node.block = block
            self._node[block] = self._node.pop(old)
            if old in self._idle:
                del self._idle[old]
                self._add_free(old)
        return node

    def _drop_if_left(self, block: int) -> None:
        if 0 < self._users[block] == self._left[block] and block not in self._partial:
            self._partial.add(block)
            self.dropped.append(block)

    def _add_free(self, block: int) -> None:
        super()._add_free(block)
        if block not in self._partial:
            self.dropped.append(block)
        self._partial.discard(block)


def make_blocks(pool: KVCache, args: ModelArgs) -> Blocks:
    """The blocks of a pool; on GPUs, whose memory can't be freed in part, they stay whole."""
    chunk, layers = family_of(args).chunks(args)
    if chunk and chunk % PAGE == 0 and pool.k.device.type == "cpu":
        return ChunkedBlocks(pool.rows, PAGE, chunk, layers)
    return Blocks(pool.rows, PAGE)


def free_dropped(pool: KVCache, blocks: Blocks, sources: Collection[int] = ()) -> None:
    """Free the memory of what was dropped; to be called before anything is written to blocks.

    Args:
        sources: blocks still to be copied, even if they were evicted for others meanwhile.
    """
    if isinstance(blocks, ChunkedBlocks) and blocks.dropped:
        free_layers(pool, blocks.layers, {*blocks.dropped}.difference(sources))
        blocks.dropped.clear()
