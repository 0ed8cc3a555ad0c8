"""Rows in blocks of a pool say what rows in a cache of their own say."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_weights

from llama import Transformer, checkpoint
from llama.backends.cpu import layers as native
from llama.checkpoint import InMemory
from llama.layers import parallel
from llama.layers.cache import Int8KVCache, KVCache
from llama.layers.ids import padded
from llama.layers.paged import PAGE, PagedRows, blocks_for, copy_block

SMALL = replace(TINY, head_dim=32)  # as the kernels take it


@pytest.fixture(scope="module", params=["plain", "kernels", "kernels-bf16"])
def model(request) -> Transformer:
    parallel.initialize(device="cpu")
    source = InMemory(SMALL, random_weights(SMALL))
    dtype = torch.bfloat16 if "bf16" in request.param else torch.float32
    loaded = checkpoint.load(source, Transformer(SMALL, device="meta"), dtype=dtype)
    return loaded if request.param == "plain" else native.swap(loaded)


def hidden(model: Transformer, new, cache: PagedRows) -> torch.Tensor:
    """All tokens' hidden states, row after row."""
    if isinstance(model, native.NativeTransformer):
        return model.hidden_of_rows(new, cache)
    starts = cache.lengths
    h = model.hidden(padded(new, torch.device("cpu")), starts, cache)
    cache.truncate([start + len(ids) for start, ids in zip(starts, new, strict=True)])
    return torch.cat([row[: len(ids)] for row, ids in zip(h, new, strict=True)])


def close(model: Transformer, a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit with the kernels; the plain layers' sums depend on the shape of a pass."""
    if isinstance(model, native.NativeTransformer):
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [KVCache, Int8KVCache])
@pytest.mark.parametrize("seed", range(4))
def test_ragged_passes_in_scattered_blocks_are_each_row_alone(model, kind, seed):
    """Rows of all lengths, some new tokens of each per pass, their blocks in any order."""
    chance = random.Random(seed)
    texts = [[chance.randrange(500) for _ in range(chance.randint(2, 127))] for _ in range(5)]
    pool = model.new_cache(1 + sum(blocks_for(len(text)) for text in texts), PAGE, cache_type=kind)
    free = chance.sample(range(1, pool.rows), pool.rows - 1)
    tables = [[free.pop() for _ in range(blocks_for(len(text)))] for text in texts]
    done, found = [0] * 5, [[] for _ in texts]
    while any(n < len(text) for n, text in zip(done, texts, strict=True)):
        rows = [i for i in range(5) if done[i] < len(texts[i]) and chance.random() < 0.8]
        if not rows:
            continue
        most = chance.choice([1, 7, 8, 40])
        new = [texts[i][done[i] : done[i] + chance.randint(1, most)] for i in rows]
        cache = PagedRows(pool, [tables[i] for i in rows], [done[i] for i in rows])
        parts = hidden(model, new, cache).split([len(ids) for ids in new])
        for i, ids, part in zip(rows, new, parts, strict=True):
            found[i].append(part)
            done[i] += len(ids)
    for text, parts in zip(texts, found, strict=True):
        alone = model.new_cache(1, len(text), cache_type=kind)
        if kind is KVCache:
            expected = model.hidden(torch.tensor([text]), 0, alone)[0]
            assert close(model, torch.cat(parts), expected)
        else:  # what is stored is rounded: the plain layers may round a value near a tie otherwise
            each = [model.hidden(torch.tensor([[id]]), i, alone)[0, 0] for i, id in enumerate(text)]
            expected = torch.stack(each)
            if isinstance(model, native.NativeTransformer):
                assert torch.equal(torch.cat(parts), expected)
            else:
                assert torch.allclose(torch.cat(parts), expected, rtol=0, atol=0.1)


@torch.inference_mode()
def test_rows_share_blocks_and_part_by_copying_one(model):
    text = [random.Random(1).randrange(500) for _ in range(PAGE + 20)]
    pool = model.new_cache(8, PAGE)
    first = PagedRows(pool, [[3, 5]], [0])
    hidden(model, [text], first)
    copy_block(pool, 5, 6)
    ends = ([7, 8, 9], [10, 11])
    fork = PagedRows(pool, [[3, 5], [3, 6]], [len(text)] * 2)
    parts = hidden(model, list(ends), fork).split([3, 2])
    for end, part in zip(ends, parts, strict=True):
        alone = model.new_cache(1, 2 * PAGE)
        expected = model.hidden(torch.tensor([[*text, *end]]), 0, alone)[0, -len(end) :]
        assert close(model, part, expected)


def test_more_positions_than_its_blocks_hold_are_refused(model):
    cache = PagedRows(model.new_cache(4, PAGE), [[1], [2]], [0, PAGE])
    with pytest.raises(ValueError, match="would reach 65 positions, and its 1 blocks hold 64"):
        cache.extend_each([1, 1])
