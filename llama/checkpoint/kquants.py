"""ggml's K-quants: blocks of 256 neighbours in a row, in groups whose scales are quantized as well.

The search for scales is that of github.com/ggml-org/ggml, ggml-quants.c, without an importance
matrix. Every product and sum is rounded to fp32, and sums are taken in the order of its loops, so
that blocks are bit-identical to llama.cpp's, where it is compiled without fused multiply-adds.
Layouts: ggml-common.h. d and dmin are fp16.

    Q4_K, Q5_K    8 groups of 32; value = d · scale · q - dmin · minimum, both of 6 bits
    Q6_K          16 groups of 16; value = d · scale · (q - 32), scale a signed byte

In NumPy, on one thread: torch's sums have another order, and its threads would wait for each other
after each of many small operations.
"""

from typing import Dict, Tuple

import numpy as np
import torch

VALUES = 256  # of a block
BYTES: Dict[str, int] = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}

# The largest q, and of the scales that are tried: what is added to it at first, and their number.
SEARCH = {"Q4_K": (15, -1.0, 21), "Q5_K": (31, -0.5, 16)}

PIECE = 1024  # blocks at once: few enough for the caches, enough for calls to cost little
TINY = 1e-36  # a smaller range is 0: its inverse may be infinite, and fp16 scales end at 6e-8
EMPTY = 1e-15  # a group of Q6_K without a larger value is 0


def quantize(values: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, values of a row) -> (rows, bytes of a row).

    Raises:
        ValueError: rows that aren't whole blocks, values that aren't finite or too large.
    """
    rows, width = values.shape
    if width % VALUES:
        raise ValueError(f"{kind} takes rows of whole blocks of {VALUES} values, not of {width}")
    encode = _six_bits if kind == "Q6_K" else _with_minima
    pieces = values.detach().cpu().reshape(-1, VALUES).split(PIECE)
    with np.errstate(all="ignore"):  # quotients by 0 and of what isn't finite: neither is used
        blocks = [torch.from_numpy(encode(piece.float().numpy(), kind)) for piece in pieces]
    return torch.cat(blocks).view(rows, -1)


def _with_minima(x: np.ndarray, kind: str) -> np.ndarray:
    """Q4_K and Q5_K: (blocks, 256) -> (blocks, bytes)."""
    most = SEARCH[kind][0]
    scale, least, found = _fit(np.ascontiguousarray(x.reshape(-1, 32).T), *SEARCH[kind])
    (d, scales), (dmin, minima) = _shared(scale.reshape(-1, 8)), _shared(-least.reshape(-1, 8))
    _check(x, kind, d, dmin)
    x = x.reshape(-1, 8, 32)
    step, low = (
        (factor.astype(np.float32) * each)[:, :, None]
        for factor, each in ((d, scales), (dmin, minima))
    )
    # Where the scale became 0 there is nothing to divide by: ggml keeps what the search found.
    q = np.where(step == 0, found.T.reshape(x.shape), _nearest((x + low) / step, 0, most))
    q = q.astype(np.uint8)
    packed = [
        d.view(np.uint8),
        dmin.view(np.uint8),
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        minima[:, :4] | minima[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | minima[:, 4:] << 4,
    ]
    if kind == "Q5_K":
        packed.append(_side_by_side(q >> 4, 1))
    packed.append((q[:, ::2] & 15 | q[:, 1::2] << 4).reshape(len(x), -1))
    return np.concatenate(packed, 1)


def _fit(x: np.ndarray, most: int, first: float, tries: int) -> Tuple[np.ndarray, ...]:
    """(32, groups) -> scale and least value of each group, and q (32, groups).

    make_qkx2_quants: for each number of levels, weighted least squares of x = scale · q + least.
    """
    weight = np.abs(x) + np.sqrt(_sum(x * x) / 32)
    wx = weight * x
    sum_w, sum_x = _sum(weight), _sum(wx)
    least, greatest = np.minimum(x.min(0), 0), x.max(0)
    flat = greatest - least < TINY
    buffer = np.empty_like(x)  # memory for what is only summed

    def error(q: np.ndarray, scale: np.ndarray, least: np.ndarray) -> np.ndarray:
        off = np.multiply(q, scale, out=buffer)
        off += least
        off -= x
        off *= off
        off *= weight
        return _sum(off)

    inverse = most / (greatest - least)
    best = (error(_nearest((x - least) * inverse, 0, most), 1 / inverse, least), 1 / inverse, least)
    origin = (least, inverse)
    for levels in np.arange(tries, dtype=np.float32) * np.float32(0.1) + first + most:
        least_yet = best[2]
        tried = levels / (greatest - least_yet)
        q = _nearest((x - least_yet) * tried, 0, most)
        wq = np.multiply(q, weight, out=buffer)
        sum_q, sum_xq = _sum(wq), _sum(wq * x)
        sum_qq = _sum(np.multiply(wq, q, out=buffer))
        determinant = sum_w * sum_qq - sum_q * sum_q
        scale = (sum_w * sum_xq - sum_x * sum_q) / determinant
        low = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        # Minima have no sign: where it would be positive, the line goes through 0.
        scale, low = np.where(low > 0, sum_xq / sum_qq, scale), np.minimum(low, 0)
        new = (error(q, scale, low), scale, low)
        better = (determinant > 0) & (new[0] < best[0])
        best, origin = (
            tuple(np.where(better, a, b) for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in ((new, best), ((least_yet, tried), origin))
        )
    _, scale, low = best
    found = np.where(flat, 0, _nearest((x - origin[0]) * origin[1], 0, most))
    return np.where(flat, 0, scale), np.where(flat, least, low), found


def _shared(each: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Numbers of the groups, none negative -> fp16 factor of a block, and 6 bits for each group."""
    most = each.max(1, keepdims=True)
    inverse = np.where(most > TINY, 63 / most, 0)
    factor = np.where(most > 0, most / 63, 0).astype(np.float16)
    return factor, np.minimum(np.rint(inverse * each), 63).astype(np.uint8)


def _six_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Q6_K: (blocks, 256) -> (blocks, 210)."""
    scale, found = _fit_signed(np.ascontiguousarray(x.reshape(-1, 16).T))
    scale = scale.reshape(-1, 16)
    largest = _extreme(scale, 1)  # with its sign, becomes -128
    empty = np.abs(largest) < EMPTY
    inverse = -128 / largest
    d = np.where(empty, 0, 1 / inverse).astype(np.float16)
    _check(x, kind, d)
    scales = np.where(empty, 0, np.minimum(np.rint(inverse * scale), 127))
    step = (d.astype(np.float32) * scales)[:, :, None]
    x = x.reshape(-1, 16, 16)
    q = np.where(step == 0, found.T.reshape(x.shape), _nearest(x / step, -32, 31) + 32)
    q = np.where(empty[:, None], 0, q).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = q[:, :, :2] & 15 | q[:, :, 2:] << 4
    packed = [
        low,
        _side_by_side(q >> 4, 2),
        scales.astype(np.int8).view(np.uint8),
        d.view(np.uint8),
    ]
    return np.concatenate([part.reshape(len(x), -1) for part in packed], 1)


def _fit_signed(x: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """(16, groups) -> scale of each group, and q + 32 (16, groups).

    make_qx_quants: the scale of least squares, weighted by x², for each of 19 numbers of levels.
    """
    extreme = _extreme(x, 0)[0]
    zero = np.abs(extreme) < EMPTY
    weight = x * x
    wx = weight * x

    def sums(inverse: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        q = _nearest(x * inverse, -32, 31)
        return _sum(wx * q), _sum(weight * q * q)

    inverse = -32 / extreme
    sum_xq, sum_qq = sums(inverse)
    scale = np.where(sum_qq == 0, 0, sum_xq / sum_qq)
    best = scale * sum_xq
    for i in (*range(-9, 0), *range(1, 10)):
        tried = -(np.float32(0.1) * np.float32(i) + 32) / extreme
        sum_xq, sum_qq = sums(tried)
        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        scale = np.where(better, sum_xq / sum_qq, scale)
        best = np.where(better, scale * sum_xq, best)
        inverse = np.where(better, tried, inverse)
    return np.where(zero, 0, scale), np.where(zero, 0, _nearest(x * inverse, -32, 31) + 32)


def _nearest(x: np.ndarray, least: int, most: int) -> np.ndarray:
    """The nearest integers, halves to even, in [least, most]; in place."""
    return np.clip(np.rint(x, out=x), least, most, out=x)


def _extreme(x: np.ndarray, axis: int) -> np.ndarray:
    """The value furthest from 0, with its sign."""
    return np.take_along_axis(x, np.expand_dims(np.abs(x).argmax(axis), axis), axis)


def _sum(terms: np.ndarray) -> np.ndarray:
    """Of the rows, added one after the other."""
    return np.add.reduce(terms, 0)


def _side_by_side(numbers: np.ndarray, width: int) -> np.ndarray:
    """(..., n, 32) of `width` bits -> (..., 32) bytes, the first lowest."""
    places = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(numbers << places, -2)


def _check(x: np.ndarray, kind: str, *factors: np.ndarray) -> None:
    """Whether values and the fp16 factors made of them are finite."""
    values = (x, *factors)
    if not all(np.isfinite(part).all() for part in values):
        worst = np.abs(x).max()  # NaN, where there is one
        limit = "4e6" if kind in SEARCH else "2.6e8"
        raise ValueError(
            f"{kind} can't hold the value {worst:g}: weights have to be finite and, for its fp16 "
            f"scales, at most about {limit}; write them as f32 instead (--dtype fp32)"
        )
