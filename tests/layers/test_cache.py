"""The cache as its owner sees it: lengths, forgetting, dropping rows, memory."""

import pytest
import torch

from llama.layers.cache import GROWTH, Int8KVCache, KVCache

CPU = torch.device("cpu")


def filled(rows: int = 3, length: int = 5) -> KVCache:
    cache = KVCache(2, rows, 8, 2, 4, dtype=torch.float32, device=CPU)
    cache.extend([0] * rows, length)
    for layer in range(2):
        new = torch.randn(rows, length, 2, 4)
        cache.update(layer, torch.arange(length)[None], new, -new)
    return cache


def test_update_returns_what_was_stored_in_order():
    cache = KVCache(1, 2, 8, 2, 4, dtype=torch.float32, device=CPU)
    first, second = torch.randn(2, 3, 2, 4), torch.randn(2, 2, 2, 4)
    cache.extend([0, 0], 3)
    cache.update(0, torch.arange(3)[None], first, -first)
    cache.extend([3, 3], 2)
    keys, values = cache.update(0, torch.arange(3, 5)[None], second, -second)
    assert torch.equal(keys, torch.cat([first, second], 1).transpose(1, 2))
    assert torch.equal(values, -keys)


def test_rows_are_written_at_their_own_positions():
    cache = filled()
    cache.truncate([5, 2, 0])
    before, new = cache.k.clone(), torch.randn(3, 1, 2, 4)
    cache.extend([5, 2, 0], 1)
    keys, _ = cache.update(1, torch.tensor([[5], [2], [0]]), new, new)
    assert keys.shape == (3, 2, 6, 4)
    for row, position in enumerate([5, 2, 0]):
        assert torch.equal(keys[row, :, position], new[row, 0])
        before[1, row, :, position] = new[row, 0]
    assert torch.equal(cache.k, before)  # and nothing else was touched


def test_keep_moves_rows_up_with_what_they_hold():
    cache = filled(rows=4)
    cache.truncate([5, 3, 2, 4])
    k, v = cache.k.clone(), cache.v.clone()
    cache.keep([1, 3])
    assert cache.lengths == [3, 4] and cache.rows == 2
    assert torch.equal(cache.k[:, 0, :, :3], k[:, 1, :, :3])
    assert torch.equal(cache.v[:, 1, :, :4], v[:, 3, :, :4])
    cache.keep([1])
    assert torch.equal(cache.k[:, 0, :, :4], k[:, 3, :, :4])


def test_truncate_and_reset_only_shorten():
    cache = filled()
    cache.truncate(4)
    assert cache.lengths == [4, 4, 4]
    with pytest.raises(ValueError, match="row 1 holds 4 positions: it can't be truncated to 5"):
        cache.truncate([4, 5, 4])
    with pytest.raises(ValueError):
        cache.truncate(-1)
    with pytest.raises(ValueError):
        cache.truncate([1, 2])
    assert cache.lengths == [4, 4, 4]
    cache.reset()
    assert cache.lengths == [0, 0, 0]


def test_extend_refuses_gaps_and_overflow_and_changes_nothing():
    cache = filled()
    with pytest.raises(ValueError, match="start_pos 6 of row 2: the cache holds 5"):
        cache.extend([5, 5, 6], 1)
    with pytest.raises(ValueError, match="row 0 would reach 9 positions .* space for 8"):
        cache.extend([5, 5, 5], 4)
    assert cache.lengths == [5, 5, 5]


def test_nbytes_is_keys_and_values_of_all_layers():
    cache = KVCache(3, 2, 10, 4, 8, dtype=torch.bfloat16, device=CPU)
    assert cache.nbytes == 2 * 3 * 2 * 10 * 4 * 8 * 2


def test_a_cache_takes_what_is_used_and_a_block():
    """10 short rows where 8192 positions are allowed: 300 of them, in blocks of 256."""
    rows, per_position = 10, 2 * 4 * 8 * 128 * 2  # keys and values, layers, heads, width, bytes
    cache = KVCache(4, rows, 8192, 8, 128, dtype=torch.bfloat16, device=CPU)
    assert cache.nbytes == rows * per_position * GROWTH
    cache.extend([0] * rows, 300)
    assert cache.nbytes == rows * per_position * 2 * GROWTH <= rows * per_position * (300 + GROWTH)
    cache.extend(cache.lengths, 8192 - 300)
    assert cache.nbytes == rows * per_position * 8192
    with pytest.raises(ValueError, match="8193 positions and the cache has space for 8192"):
        cache.extend(cache.lengths, 1)


def test_growing_keeps_what_was_there():
    cache = KVCache(2, 3, 5 * GROWTH, 2, 4, dtype=torch.float32, device=CPU)
    whole = torch.randn(2, 3, 700, 2, 4)
    done = 0
    for n in (1, 200, 55, 1, 300, 143):
        cache.extend([done] * 3, n)
        positions = torch.arange(done, done + n)[None]
        for layer in range(2):
            part = whole[layer, :, done : done + n]
            keys, values = cache.update(layer, positions, part, -part)
            assert torch.equal(keys.transpose(1, 2), whole[layer, :, : done + n])
            assert torch.equal(values.transpose(1, 2), -whole[layer, :, : done + n])
        done += n


def test_spread_copies_rows():
    cache = KVCache(1, 5, 8, 1, 1, dtype=torch.float32, device=CPU)
    cache.extend([0] * 5, 4)
    cache.k[0, :, 0, :4, 0] = torch.arange(5.0)[:, None]
    cache.truncate([4, 3, 2, 1, 0])
    cache.spread([0, 0, 1, 1, 2])
    assert cache.lengths == [4, 4, 3, 3, 2]
    assert cache.k[0, :, 0, 0, 0].tolist() == [0, 0, 1, 1, 2]


def test_room_that_is_not_written_to_costs_no_memory():
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache(32, 16, 8192, 8, 128, dtype=torch.bfloat16, device=CPU)
    cache.reserve(8192)
    assert cache.nbytes == 16 * 2**30
    assert process.memory_info().rss - before < 64 * 2**20


def test_bytes_with_scales_are_within_half_a_step():
    """An int8 cache gives back each value to 1/254 of its row's largest, whatever is done to it."""
    args = dict(dtype=torch.float32, device=CPU)
    plain, small = KVCache(2, 3, 600, 2, 32, **args), Int8KVCache(2, 3, 600, 2, 32, **args)
    generator = torch.Generator().manual_seed(0)
    done = 0
    for n in (1, 300, 40):
        new = torch.randn(2, 2, 3, n, 2, 32, generator=generator) * 5
        for cache in (plain, small):
            cache.extend([done] * 3, n)
            positions = torch.arange(done, done + n)[None]
            found = [cache.update(i, positions, *new[i]) for i in range(2)]
        done += n
    for cache in (plain, small):
        cache.keep([0, 2])
        cache.gather([1, 0])
        cache.truncate([200, 341])
        cache.extend([200, 341], 1)
        positions = torch.tensor([[200], [341]])
        found.append(cache.update(1, positions, *new[1][:, :2, :1]))
    exact, rounded = found[-2:]
    for a, b in zip(exact, rounded, strict=True):
        assert ((a - b).abs() <= a.abs().amax(-1, keepdim=True) / 253).all()
    assert small.nbytes < plain.nbytes * (32 + 4) / (32 * 4) + 1


def test_an_int8_cache_of_zeros_is_zeros():
    cache = Int8KVCache(1, 1, 8, 1, 32, dtype=torch.float32, device=CPU)
    cache.extend([0], 2)
    keys, values = cache.update(0, torch.arange(2)[None], *torch.zeros(2, 1, 2, 1, 32))
    assert not keys.any() and not values.any()
