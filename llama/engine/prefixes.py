"""Prefix reuse: keys and values of texts that were computed before, for texts that begin alike.

A tree over tokens. Each node holds a run of them with their keys and values, and below it the runs
that came after; texts that begin alike share nodes. It is bounded in bytes, and what was used least
recently goes first. (RadixAttention, 2312.07104, has such a tree over pages of a GPU's cache; here
what is known is copied, which takes milliseconds where computing takes seconds.)
"""

import pickle
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from llama.checkpoint.writing import beside
from llama.engine.prefill import prefill
from llama.layers import parallel
from llama.layers.cache import KVCache
from llama.layers.revision import revision
from llama.model import Transformer

# Tokens that a batch has in common are worth a pass of their own from here on.
SHARED = 32


class Node:
    """A run of tokens: ids, and parts (n_layers, n_kv_heads, len(ids), ...) by name."""

    def __init__(self, ids: List[int], parts: Dict[str, torch.Tensor], parent: Optional["Node"]):
        self.ids, self.parts, self.parent = ids, parts, parent
        self.children: Dict[int, Node] = {}  # by the first token
        self.used = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


class PrefixCache:
    """What a model computed of earlier texts. Threads may share it.

    Args:
        limit: bytes that it takes at most, on each rank.
        fingerprint: tells models apart, for files.

    Attributes:
        grows: whether what is generated is added; else there is what was added by hand.
    """

    def __init__(self, limit: int, fingerprint: Callable[[], str]):
        self.limit, self.fingerprint, self.grows = limit, fingerprint, True
        self._root = Node([], {}, None)
        self._revision = 0  # of the model that this is of
        self._clock = 0
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        return sum(node.nbytes for node in self._nodes())

    def follow(self, model: Transformer) -> None:
        """Forget everything if the model's weights have changed since."""
        with self._lock:
            if revision(model) != self._revision:
                self._root, self._revision = Node([], {}, None), revision(model)

    def known(self, ids: Sequence[int]) -> int:
        """How many of a prompt's tokens needn't be computed; its last one always is."""
        with self._lock:
            return min(sum(n for _, n in self._path(ids)), len(ids) - 1)

    def fill(self, ids: Sequence[int], cache: KVCache, row: int) -> None:
        """Put what is known of a prompt into an empty row."""
        with self._lock:
            left = len(ids) - 1
            for node, n in self._path(ids):
                n = min(n, left)
                cache.write(row, {name: part[:, :, :n] for name, part in node.parts.items()})
                left -= n

    def add(self, ids: Sequence[int], cache: KVCache, row: int) -> None:
        """Keep what a row holds of a text, as far as there is memory for it."""
        with self._lock:
            path = self._path(ids)
            at, node = sum(n for _, n in path), path[-1][0] if path else self._root
            if at == len(ids):
                return
            if path and path[-1][1] < len(node.ids):
                node = self._split(node, path[-1][1])
            leaf = Node(list(ids[at:]), cache.read(row, at, len(ids)), node)
            if leaf.nbytes <= self.limit:
                self._clock += 1
                leaf.used, node.children[leaf.ids[0]] = self._clock, leaf
                self._evict()

    def share(self, model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
        """Compute once what several of the prompts begin with."""
        self.follow(model)
        per_token = model.new_cache(1, 1).nbytes
        for ids in common_beginnings(prompts):
            if self.known([*ids, -1]) < len(ids) <= self.limit // per_token:
                self.compute(model, ids)

    @torch.inference_mode()
    def compute(self, model: Transformer, ids: Sequence[int]) -> KVCache:
        """Keep a text's keys and values; a cache of one row that holds them."""
        cache = model.new_cache(1, len(ids))
        cache.reserve(len(ids))
        self.fill(ids, cache, 0)
        prefill(model, [ids], cache)
        self.add(ids, cache, 0)
        return cache

    def _path(self, ids: Sequence[int]) -> List[Tuple[Node, int]]:
        """The nodes along a text, and how many of each one's tokens are the text's."""
        node, at, path = self._root, 0, []
        self._clock += 1
        while at < len(ids) and (child := node.children.get(ids[at])) is not None:
            n = _alike(child.ids, ids[at : at + len(child.ids)])
            path.append((child, n))
            child.used, at, node = self._clock, at + n, child
            if n < len(child.ids):
                break
        return path

    def _split(self, node: Node, n: int) -> Node:
        """Cut a node after n tokens; the new node with those. Copies, so that each can go alone."""
        parts = {name: part[:, :, :n].clone() for name, part in node.parts.items()}
        head = Node(node.ids[:n], parts, node.parent)
        assert node.parent is not None
        node.parent.children[head.ids[0]] = head
        node.ids, node.parent, head.used = node.ids[n:], head, node.used
        node.parts = {name: part[:, :, n:].clone() for name, part in node.parts.items()}
        head.children[node.ids[0]] = node
        return head

    def _nodes(self) -> Iterator[Node]:
        todo = [*self._root.children.values()]
        while todo:
            node = todo.pop()
            yield node
            todo += node.children.values()

    def _evict(self) -> None:
        excess = self.nbytes - self.limit
        while excess > 0:
            leaf = min((n for n in self._nodes() if not n.children), key=lambda n: n.used)
            assert leaf.parent is not None
            del leaf.parent.children[leaf.ids[0]]
            excess -= leaf.nbytes

    # --- on disk ---------------------------------------------------------------------------------

    def save(self, path: str | Path, model: Transformer, ids: Sequence[int]) -> None:
        """Write a text's keys and values, of all ranks, into a file that any number can load.

        Raises:
            FileExistsError: something else is there.
            ValueError: a model that changed since it was built.
        """
        self._check_for_files(model)
        if parallel.broadcast_object(_is_taken(Path(path))):  # as rank 0 sees it
            raise FileExistsError(f"{path} exists and holds no prefix: choose another name")
        cache = self.compute(model, ids)
        args, world = model.params, parallel.world_size()
        whole: Dict[str, torch.Tensor] = {}
        for name, mine in cache.read(0, 0, len(ids)).items():
            of_ranks = parallel.all_gather(mine)
            shape = (mine.shape[0], args.n_kv_heads, *mine.shape[2:])
            whole[name] = mine.new_empty(shape)
            for rank, part in enumerate(of_ranks):
                whole[name][:, parallel.kv_heads(rank, world, args.n_heads, args.n_kv_heads)] = part
        content = {"prefix": 1, "fingerprint": self.fingerprint(), "tokens": list(ids), **whole}
        if parallel.is_rank_zero():
            with beside(path, force=True) as partial:
                torch.save(content, partial)

    def load(self, path: str | Path, model: Transformer) -> int:
        """Take in a file that `save` wrote; the number of its tokens.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else, or of another model.
        """
        self._check_for_files(model)
        content = _read(path)
        fingerprint, ids = content.pop("fingerprint"), content.pop("tokens")
        if fingerprint != self.fingerprint():
            raise ValueError(
                f"{path} was made by another model, or one with another dtype or quantization "
                f"({fingerprint}; this is {self.fingerprint()}): make it again with save_prefix"
            )
        args, device = model.params, model.norm.weight.device
        heads = parallel.kv_heads(
            parallel.rank(), parallel.world_size(), args.n_heads, args.n_kv_heads
        )
        cache = model.new_cache(1, len(ids))
        cache.reserve(len(ids))
        cache.write(0, {name: part[:, heads].to(device) for name, part in content.items()})
        self.add(ids, cache, 0)
        return len(ids)

    def _check_for_files(self, model: Transformer) -> None:
        if revision(model):
            raise ValueError(
                "prefix files are of a model as it was built, and this one has changed since: "
                "build with adapter_dir"
            )


def _read(path: str | Path) -> Dict[str, Any]:
    """What `PrefixCache.save` wrote. Raises what `PrefixCache.load` does of a file of another."""
    try:
        content = torch.load(path, weights_only=True, mmap=True)
        if content.pop("prefix") == 1 and {"fingerprint", "tokens"} <= content.keys():
            return content
    except FileNotFoundError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError, OSError,
            pickle.UnpicklingError):  # fmt: skip
        pass
    raise ValueError(f"{path} holds no prefix: save_prefix writes what is read")


def _is_taken(path: Path) -> bool:
    try:
        _read(path)
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def common_beginnings(prompts: Sequence[Sequence[int]]) -> Iterator[List[int]]:
    """What two or more of the prompts begin with, SHARED tokens or more beyond the one before.

    Shorter ones come before longer ones that begin with them. A prompt's last token isn't among it.
    """
    todo = [(sorted(map(list, prompts)), 0)]
    while todo:
        texts, known = todo.pop()
        # What the first and the last of sorted texts begin with, all between begin with.
        n = min(_alike(texts[0], texts[-1]), len(texts[0]) - 1)
        if len(texts) > 1 and n >= known + SHARED:
            yield texts[0][:n]
            known = n
        groups: Dict[int, List[List[int]]] = {}
        for text in texts:
            groups.setdefault(text[n] if n < len(text) else -1, []).append(text)
        todo += [(g, known) for g in groups.values() if 1 < len(g) < len(texts)]


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    if list(a) == list(b):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905
