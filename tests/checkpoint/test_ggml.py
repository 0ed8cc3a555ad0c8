"""ggml's blocks: to the bit what the gguf package makes of them, and how far rounding goes."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.checkpoint import ggml

Type = gguf.GGMLQuantizationType
KINDS = pytest.mark.parametrize("kind", ggml.BYTES)

# That the largest value is made of; with a least value, the range.
STEPS = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31}


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def halves(least, most, *, holding):
    """Multiples of a half; with the values that are held the scale is 1, so halves are ties."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2 * least, 2 * most + 1, (64, 96), generator=generator) / 2
    x.view(-1, 32)[:, : len(holding)] = torch.tensor(holding)
    return x


INPUTS = {
    "random": normal(64, 96),
    "bf16": normal(64, 96).bfloat16(),
    "every other row": normal(64, 96)[::2],
    "tiny": normal(64, 96) * 1e-9,  # scales that fp16 rounds to 0
    "large": normal(64, 96) * 1e4,
    "zero": torch.zeros(3, 64),
    "one value": torch.full((3, 64), -3.3),
    "integers": (normal(64, 96) * 50).round(),
    "two largest": torch.tensor([1.0, -1.0]).repeat(3, 16),
    "ties of Q8_0": halves(-127, 127, holding=[127.0]),
    "ties of Q4_0": halves(-8, 8, holding=[-8.0]),
    "ties of Q4_1": halves(0, 15, holding=[0.0, 15.0]),
    "ties of Q5_0": halves(-16, 16, holding=[-16.0]),
    "ties of Q5_1": halves(0, 31, holding=[0.0, 31.0]),
}  # fmt: skip


def same_as_gguf(x, kind):
    raw = ggml.quantize(x, kind)
    theirs = gguf.quantize(x.float().numpy(), Type[kind])
    values = ggml.dequantize(raw, kind)
    assert raw.numpy().tobytes() == theirs.tobytes()
    assert values.numpy().tobytes() == gguf.dequantize(theirs, Type[kind]).tobytes()
    assert raw.shape == theirs.shape and values.shape == x.shape


@KINDS
@pytest.mark.parametrize("name", INPUTS)
def test_to_the_bit_as_gguf(name, kind):
    same_as_gguf(INPUTS[name], kind)


# An fp32 scale's inverse must be finite: no weight is anywhere near these bounds.
numbers = st.floats(-1e4, 1e4, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0)


@KINDS
@settings(max_examples=200)
@given(values=st.lists(numbers, min_size=32, max_size=32))
def test_to_the_bit_as_gguf_whatever_the_values(kind, values):
    same_as_gguf(torch.tensor([values]), kind)


@KINDS
def test_any_bytes_are_dequantized_as_gguf_does(kind):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (64, 3 * ggml.BYTES[kind]), dtype=torch.uint8, generator=generator)
    with np.errstate(invalid="ignore"):  # some scales are infinite, and infinity less itself NaN
        theirs = torch.from_numpy(gguf.dequantize(raw.numpy(), Type[kind]))
    assert torch.equal(ggml.dequantize(raw, kind).nan_to_num(7), theirs.nan_to_num(7))


def test_just_below_a_half_is_rounded_down():
    below = torch.tensor(0.5).nextafter(torch.tensor(0.0)).item()
    same_as_gguf(torch.tensor([[127.0, below, -below, *[0.0] * 29]]), "Q8_0")


@KINDS
@pytest.mark.parametrize("name", INPUTS)
def test_rounding_is_by_half_a_step(name, kind):
    """And by what fp16 does to the scale, as often as it counts, and to the least value."""
    x = INPUTS[name].float().reshape(-1, 32).double()
    raw = ggml.quantize(INPUTS[name], kind).view(-1, ggml.BYTES[kind])
    error = (ggml.dequantize(raw, kind).double() - x).abs()
    span = x.amax(1) - x.amin(1) if kind.endswith("_1") else x.abs().amax(1)
    step = (span / STEPS[kind])[:, None]
    bound = step / 2
    if kind in ("Q4_0", "Q5_0"):  # the largest becomes -8, 4 bits end at 7: beyond that they clip
        most, extreme = STEPS[kind], x.gather(1, x.abs().argmax(1, keepdim=True))
        bound = step * (-most * x / extreme - most + 1).nan_to_num(0).clamp_min(0.5)
    bound = bound + STEPS[kind] * half_ulp(step)
    if kind.endswith("_1"):
        bound = bound + half_ulp(x.amin(1, keepdim=True))
    assert (error <= bound + x.abs().amax(1, keepdim=True) * 2**-22).all()  # 2**-22: fp32's own


def half_ulp(x):
    """How far fp16 rounds at most: 11 bits of a number, or a multiple of 2**-24."""
    return (x.abs() * 2**-11).clamp_min(2**-25)


@KINDS
@pytest.mark.parametrize("name", INPUTS)
def test_rounding_again_changes_nothing(name, kind):
    once = ggml.dequantize(ggml.quantize(INPUTS[name], kind), kind)
    assert torch.equal(ggml.dequantize(ggml.quantize(once, kind), kind), once)


@KINDS
def test_rows_that_are_not_whole_blocks_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} takes rows of .* 32 values, not of 48"):
        ggml.quantize(torch.zeros(2, 48), kind)


def test_other_kinds_go_through_gguf():
    x = 3 * normal(8, 512).sign()
    for kind in ("TQ1_0", "TQ2_0"):  # of three values
        raw = torch.from_numpy(gguf.quantize(x.numpy(), Type[kind]))
        assert torch.equal(ggml.dequantize(raw, kind), x)
    with pytest.raises(NotImplementedError):
        ggml.dequantize(torch.zeros(1, 32, dtype=torch.uint8), "Q8_1")
