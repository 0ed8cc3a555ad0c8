"""The blocks of the key/value cache: which are free, which rows share them, and what they hold.

What a block holds stays known after its last row has left, so that a later text with the same
beginning needn't compute it again (prefix caching, as in vLLM). Least recently used blocks are
evicted first. This is bookkeeping only: the keys and values are in a `llama.layers.paged` pool.
"""

from collections import OrderedDict
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from llama.layers.ids import common_length


class Node:
    """A known block: its positions hold these tokens, after those of the node's ancestors.

    A node without a parent has been evicted.
    """

    def __init__(self, block: int, tokens: Tuple[int, ...], parent: Optional["Node"]):
        self.block, self.tokens, self.parent = block, tokens, parent
        self.children: Dict[int, List[Node]] = {}  # by the first token


class Match(NamedTuple):
    """What is known of a text: whole blocks, and positions of a further block to be copied."""

    nodes: List[Node]
    tail: Optional[Node]
    positions: int  # of both together


class Blocks:
    """The blocks 1 to n - 1 of a cache; block 0 is for padding.

    Args:
        size: positions of a block.
    """

    def __init__(self, n: int, size: int):
        self.size, self.total = size, n - 1
        self._roots: Dict[int, Node] = {}  # of each adapter
        self._node: Dict[int, Node] = {}  # of a known block
        self._users = [0] * n
        self._free = list(range(n - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and used by no row; oldest first
        self._kept: Optional[Set[int]] = None

    @property
    def available(self) -> int:
        """Blocks that no row uses."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.total - self.available

    @property
    def known(self) -> int:
        """Blocks whose content can be found."""
        return len(self._node)

    def allocate(self, n: int) -> List[int]:
        """Blocks for one row; least recently used known ones are evicted when no others are free.

        Raises:
            MemoryError: fewer are available. None is taken then.
        """
        if n > self.available:
            raise MemoryError(f"{n} blocks of the cache, and {self.available} are available")
        found = []
        for _ in range(n):
            if not self._free:
                self._forget(self._node[next(iter(self._idle))])
            block = self._free.pop()
            self._users[block] = 1
            found.append(block)
        return found

    def share(self, block: int) -> None:
        """Count one more row that uses a block."""
        self._users[block] += 1
        self._idle.pop(block, None)

    def release(self, blocks: Sequence[int], left: int = 0) -> None:
        """A row's blocks, in their order, are no longer used by it.

        Args:
            left: how many of them it had left, see `leave`.
        """
        for block in reversed(blocks):  # the end of a text is evicted before its beginning
            self._users[block] -= 1
            assert self._users[block] >= 0
            if not self._users[block]:
                if block in self._node:
                    self._idle[block] = None
                else:
                    self._add_free(block)

    def leave(self, blocks: Sequence[int], left: int, positions: int) -> int:
        """A row that uses these blocks has so many positions. Some layers may read but the last of
        them: of the first blocks, returned is how many, it reads other layers' part alone.

        Args:
            left: what this returned before, of the same row.
        """
        return left  # all layers read all

    def match(self, tokens: Sequence[int], adapter: int = 0) -> Match:
        """The longest known beginning of a text, as computed with an adapter; 0: with none."""
        node, at = self._root(adapter), 0
        nodes: List[Node] = []
        while True:
            best: Optional[Node] = None
            length = 0
            for child in node.children.get(tokens[at], []) if at < len(tokens) else []:
                n = common_length(child.tokens, tokens[at : at + self.size])
                if n > length:
                    best, length = child, n
            if best is None or length < self.size:
                return Match(nodes, best, at + length)
            nodes.append(best)
            node, at = best, at + length

    def publish(
        self, parent: Optional[Node], block: int, tokens: Sequence[int], adapter: int = 0
    ) -> Node:
        """Make a used block known, whose positions hold these tokens after the parent's.

        Args:
            adapter: that they were computed with; 0: none.

        Returns:
            Its node, or that of another block with the same tokens. If the parent has been
            evicted, nothing finds it.
        """
        if parent is not None and parent.parent is None:  # evicted: so is what follows it
            return Node(block, tuple(tokens), None)
        parent = parent or self._root(adapter)
        siblings = parent.children.setdefault(tokens[0], [])
        for sibling in siblings:
            if sibling.tokens == tuple(tokens):
                return sibling
        if block in self._node:  # by fewer of its positions
            self._forget(self._node[block])
            siblings = parent.children.setdefault(tokens[0], [])
        node = Node(block, tuple(tokens), parent)
        siblings.append(node)
        self._node[block] = node
        return node

    def users(self, block: int) -> int:
        """The number of rows that use a block."""
        return self._users[block]

    def forget(self, blocks: Sequence[int]) -> None:
        """Forget what some blocks hold, and what follows it."""
        for block in blocks:
            if block in self._node:
                self._forget(self._node[block])

    def keep_only_known(self) -> None:
        """From now on, `tidy` forgets what isn't known now."""
        self._kept = set(self._node)

    def tidy(self) -> None:
        """Forget what wasn't known when `keep_only_known` was called, if it was."""
        kept = self._node if self._kept is None else self._kept
        for block in [*self._node]:
            if block not in kept and block in self._node:
                self._forget(self._node[block])

    def clear(self) -> None:
        """Forget all known blocks; those in use stay in use."""
        for root in self._roots.values():
            for child in list(self._children(root)):
                self._forget(child)

    def _root(self, adapter: int) -> Node:
        return self._roots.setdefault(adapter, Node(0, (), None))

    def _children(self, node: Node) -> Iterator[Node]:
        for nodes in node.children.values():
            yield from nodes

    def _forget(self, node: Node) -> None:
        """Forget a known block, and those that follow it, which can't be found without it."""
        assert node.parent is not None
        siblings = node.parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del node.parent.children[node.tokens[0]]
        todo = [node]
        while todo:
            node = todo.pop()
            todo += self._children(node)
            node.children, node.parent = {}, None
            del self._node[node.block]
            if self._kept is not None:
                self._kept.discard(node.block)
            if node.block in self._idle:
                del self._idle[node.block]
                self._add_free(node.block)

    def _add_free(self, block: int) -> None:
        self._free.append(block)
