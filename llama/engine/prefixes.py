"""Prefix caching: reuses keys and values of earlier texts for texts with the same prefix.

A radix tree over tokens: each node holds a run of tokens with their keys and values, its children
the runs that follow; texts share the nodes of their common prefix. Its size is limited in bytes,
and least recently used entries are evicted first. (RadixAttention, arXiv 2312.07104, has such a
tree over pages of a GPU's cache. Here cached entries are copied to a row's cache, in milliseconds
where computing them takes seconds.)
"""

import pickle
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from llama.engine.prefill import prefill
from llama.layers import parallel
from llama.layers.cache import KVCache
from llama.layers.ids import common_length
from llama.layers.revision import revision
from llama.model import Transformer
from llama.text.files import beside

MIN_SHARED = 32  # tokens that prompts of a batch must share to be computed separately, once


class Node:
    """A run of tokens: ids, and keys and values by name, (n_layers, n_kv_heads, len(ids), ...)."""

    def __init__(self, ids: List[int], parts: Dict[str, torch.Tensor], parent: Optional["Node"]):
        self.ids, self.parts, self.parent = ids, parts, parent
        self.children: Dict[int, Node] = {}  # by the first token
        self.used = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


class PrefixCache:
    """A model's keys and values of earlier texts. Threads may share it.

    Args:
        limit: maximum size in bytes, on each rank.
        fingerprint: identifies the model, in files.

    Attributes:
        grows: whether prompts and answers are added; otherwise only calls of `add`, `share`,
            `compute` and `load` add to it.
    """

    def __init__(self, limit: int, fingerprint: Callable[[], str]):
        self.limit, self.fingerprint, self.grows = limit, fingerprint, True
        self._root = Node([], {}, None)
        self._revision = 0  # of the model's weights
        self._clock = 0
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        return sum(node.nbytes for node in self._nodes())

    def sync(self, model: Transformer) -> None:
        """Clear the cache if the model's weights have changed."""
        with self._lock:
            if revision(model) != self._revision:
                self._root, self._revision = Node([], {}, None), revision(model)

    def cached(self, ids: Sequence[int]) -> int:
        """Number of a prompt's tokens that are cached, without the last: its logits are needed."""
        with self._lock:
            return min(sum(n for _, n in self._path(ids)), len(ids) - 1)

    def fill(self, ids: Sequence[int], cache: KVCache, row: int) -> None:
        """Copy a prompt's cached keys and values to an empty row."""
        with self._lock:
            left = len(ids) - 1
            for node, n in self._path(ids):
                n = min(n, left)
                cache.write(row, {name: part[:, :, :n] for name, part in node.parts.items()})
                left -= n

    def add(self, ids: Sequence[int], cache: KVCache, row: int) -> None:
        """Add a text's keys and values from a row, unless the new ones alone exceed the limit."""
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
        """Compute the common prefixes of prompts once, and add them."""
        self.sync(model)
        per_token = model.new_cache(1, 1).nbytes
        for ids in common_prefixes(prompts):
            if self.cached([*ids, -1]) < len(ids) <= self.limit // per_token:
                self.compute(model, ids)

    @torch.inference_mode()
    def compute(self, model: Transformer, ids: Sequence[int]) -> KVCache:
        """Compute and add a text's keys and values; returns a KVCache of one row with them."""
        cache = model.new_cache(1, len(ids))
        cache.reserve(len(ids))
        self.fill(ids, cache, 0)
        prefill(model, [ids], cache)
        self.add(ids, cache, 0)
        return cache

    def _path(self, ids: Sequence[int]) -> List[Tuple[Node, int]]:
        """The nodes on a text's path, with the number of tokens of each that match it."""
        node, at, path = self._root, 0, []
        self._clock += 1
        while at < len(ids) and (child := node.children.get(ids[at])) is not None:
            n = common_length(child.ids, ids[at : at + len(child.ids)])
            path.append((child, n))
            child.used, at, node = self._clock, at + n, child
            if n < len(child.ids):
                break
        return path

    def _split(self, node: Node, n: int) -> Node:
        """Split a node after n tokens; returns the new parent, which has those. Tensors are copied,
        so that evicting one node frees its memory."""
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
        """Write a text's keys and values to a file, which any number of ranks can load.

        Raises:
            FileExistsError: the file exists and isn't a saved prefix.
            ValueError: the model's weights changed after it was built.
        """
        self._check_for_files(model)
        if parallel.broadcast_object(_is_taken(Path(path))):  # as rank 0 sees it
            raise FileExistsError(f"{path} exists and isn't a saved prefix: choose another name")
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
        """Add the prefix in a file that `save` wrote; returns the number of its tokens.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a saved prefix, or one of another model.
        """
        self._check_for_files(model)
        content = _read(path)
        fingerprint, ids = content.pop("fingerprint"), content.pop("tokens")
        if fingerprint != self.fingerprint():
            raise ValueError(
                f"{path} was saved with another model, dtype or quantization ({fingerprint}; this "
                f"is {self.fingerprint()}): save it again with save_prefix"
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
                "prefix files need the weights that the model was built with, and they have been "
                "changed (by training or an added adapter): build with adapter_dir instead"
            )


def _read(path: str | Path) -> Dict[str, Any]:
    """The content of a file that `PrefixCache.save` wrote; raises as `PrefixCache.load` does."""
    try:
        content = torch.load(path, weights_only=True, mmap=True)
        if content.pop("prefix") == 1 and {"fingerprint", "tokens"} <= content.keys():
            return content
    except FileNotFoundError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError, OSError,
            pickle.UnpicklingError):  # fmt: skip
        pass
    raise ValueError(f"{path} isn't a saved prefix: write one with save_prefix")


def _is_taken(path: Path) -> bool:
    try:
        _read(path)
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def common_prefixes(prompts: Sequence[Sequence[int]]) -> Iterator[List[int]]:
    """The prefixes that two or more prompts share, never a whole prompt.

    A prefix comes before those that extend it, each by MIN_SHARED tokens or more.
    """
    todo = [(sorted(map(list, prompts)), 0)]
    while todo:
        texts, known = todo.pop()
        # Sorted texts all share the prefix that the first and the last share.
        n = min(common_length(texts[0], texts[-1]), len(texts[0]) - 1)
        if len(texts) > 1 and n >= known + MIN_SHARED:
            yield texts[0][:n]
            known = n
        groups: Dict[int, List[List[int]]] = {}
        for text in texts:
            groups.setdefault(text[n] if n < len(text) else -1, []).append(text)
        todo += [(g, known) for g in groups.values() if 1 < len(g) < len(texts)]
