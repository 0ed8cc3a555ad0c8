"""Prefix caching: texts whose keys and values an engine keeps, from call to call and in files."""

import pickle
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import torch

from llama.engine.chunks import ChunkedBlocks, free_dropped
from llama.engine.engine import Engine
from llama.layers import parallel
from llama.layers.ids import common_length
from llama.layers.paged import read_blocks, write_blocks
from llama.layers.revision import revision
from llama.model import Transformer
from llama.text.files import beside

MIN_SHARED = 32  # tokens that prompts must share to be computed separately, once


class Prefixes:
    """What the cache of an engine knows of texts.

    Args:
        fingerprint: identifies the model, in files.
    """

    def __init__(self, engine: Engine, model: Transformer, fingerprint: Callable[[], str]):
        self._engine, self._model, self.fingerprint = engine, model, fingerprint

    def cached(self, ids: Sequence[int]) -> int:
        """Number of a prompt's tokens that are cached, without the last: its logits are needed."""
        with self._engine.lock:
            return self._engine.scheduler.blocks.match(ids[:-1]).positions

    def share(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the common prefixes of prompts once, and keep these alone from now on: what is
        generated then depends on nothing that was generated before."""
        for ids in common_prefixes(prompts):
            self.compute(ids)
        self._engine.scheduler.blocks.keep_only_known()

    def compute(self, ids: Sequence[int]) -> None:
        """Compute a text's keys and values, unless they are known."""
        for _ in self._engine.events(self._engine.add(ids, 0, speculate="off")):
            pass

    # --- on disk ---------------------------------------------------------------------------------

    def save(self, path: str | Path, ids: Sequence[int]) -> None:
        """Write a text's keys and values to a file, which any number of ranks can load.

        Raises:
            FileExistsError: the file exists and isn't a saved prefix.
            ValueError: the model's weights changed after it was built; the cache can't hold it.
        """
        self._check_for_files()
        if parallel.broadcast_object(_is_taken(Path(path))):  # as rank 0 sees it
            raise FileExistsError(f"{path} exists and isn't a saved prefix: choose another name")
        args, world = self._model.params, parallel.world_size()
        whole: Dict[str, torch.Tensor] = {}
        for name, mine in self._computed(ids).items():
            of_ranks = parallel.all_gather(mine)
            shape = (mine.shape[0], args.n_kv_heads, *mine.shape[2:])
            whole[name] = mine.new_empty(shape)
            for rank, part in enumerate(of_ranks):
                whole[name][:, parallel.kv_heads(rank, world, args.n_heads, args.n_kv_heads)] = part
        blocks = self._engine.scheduler.blocks
        chunk = blocks.chunk if isinstance(blocks, ChunkedBlocks) else len(ids) + 1
        content = {
            "prefix": 1,
            "fingerprint": self.fingerprint(),
            "tokens": list(ids),
            "dropped": len(ids) // chunk * chunk,  # positions of which layers may lack their part
            **whole,
        }
        if parallel.is_rank_zero():
            with beside(path, force=True) as partial:
                torch.save(content, partial)

    def _computed(self, ids: Sequence[int]) -> Dict[str, torch.Tensor]:
        """A text's keys and values, by name: (n_layers, n_kv_heads, len(ids), ...)."""
        with self._engine.lock:
            self.compute(ids)
            nodes, tail, known = self._engine.scheduler.blocks.match(ids)
            assert known == len(ids), "evicted at once"
            blocks = [node.block for node in [*nodes, *([tail] if tail else [])]]
            return read_blocks(self._engine.pool, blocks, known)

    def load(self, path: str | Path) -> int:
        """Add the prefix in a file that `save` wrote; returns the number of its tokens.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a saved prefix, one of another model, or too long for the cache.
        """
        self._check_for_files()
        content = _read(path)
        fingerprint, ids = content.pop("fingerprint"), content.pop("tokens")
        if fingerprint != self.fingerprint():
            raise ValueError(
                f"{path} was saved with another model, dtype or quantization ({fingerprint}; this "
                f"is {self.fingerprint()}): save it again with save_prefix"
            )
        args, world = self._model.params, parallel.world_size()
        heads = parallel.kv_heads(parallel.rank(), world, args.n_heads, args.n_kv_heads)
        blocks, pool = self._engine.scheduler.blocks, self._engine.pool
        dropped = content.pop("dropped", 0)
        if dropped and not isinstance(blocks, ChunkedBlocks):
            raise ValueError(
                f"{path} lacks what some layers computed of the first {dropped} of its {len(ids)} "
                "tokens: a CPU's cache drops it, and this device's needs it. Save it again on "
                "this device with save_prefix"
            )
        with self._engine.lock:
            self._engine.sync()
            needed = -(-len(ids) // blocks.size)
            if needed > blocks.available:
                raise ValueError(
                    f"{path} has {len(ids)} tokens, and the cache has room for "
                    f"{blocks.available * blocks.size}: build with more prefix_cache_mb"
                )
            table, node = blocks.allocate(needed), None
            free_dropped(pool, blocks)
            parts = {name: part[:, heads].to(pool.k.device) for name, part in content.items()}
            write_blocks(pool, table, parts)
            for i, block in enumerate(table):
                node = blocks.publish(node, block, ids[i * blocks.size : (i + 1) * blocks.size])
            blocks.release(table, blocks.leave(table, 0, len(ids)))
        return len(ids)

    def _check_for_files(self) -> None:
        if revision(self._model):
            raise ValueError(
                "prefix files need the weights that the model was built with, and they have been "
                "changed (by training or an added adapter): build with adapter_dir instead"
            )


def _read(path: str | Path) -> Dict[str, Any]:
    """The content of a file that `Prefixes.save` wrote; raises as `Prefixes.load` does."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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
