"""K-quants: blocks to the bit as llama.cpp's, and the types that its mixtures give each weight."""

import ctypes
import platform

import gguf
import pytest
import torch
import xllamacpp.xllamacpp
from conftest import random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import checkpoint
from llama.checkpoint import ggml, kquants
from llama.checkpoint.convert import convert
from llama.checkpoint.gguf import WRITABLE
from llama.checkpoint.mixtures import MIXTURES, kind_of
from llama.checkpoint.shapes import weight_shapes
from llama.checkpoint.source import InMemory
from llama.model import ModelArgs

KINDS = pytest.mark.parametrize("kind", kquants.BYTES)
LLAMA_CPP = ctypes.CDLL(xllamacpp.xllamacpp.__file__)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sparse(share):
    kept = torch.rand(64, 1024, generator=torch.Generator().manual_seed(1)) < share
    return torch.where(kept, normal(64, 1024), 0.0)


INPUTS = {
    "normal": normal(64, 1024) * 0.02,
    "bf16": normal(64, 1024).bfloat16(),
    "heavy tails": normal(64, 1024) / normal(1024, 64).T.abs(),
    "outliers": normal(64, 1024) * torch.where(torch.arange(1024) % 97 == 0, 50, 1),
    "positive": normal(64, 1024).abs(),
    "negative": -normal(64, 1024).abs() - 1,
    "one a group": sparse(1 / 32),
    "few": sparse(0.1),
    "integers": (normal(64, 1024) * 10).round(),
    "three values": normal(64, 1024).sign(),
    "many sizes": normal(64, 1024) * torch.logspace(-9, 4, 1024),
    "scales that fp16 rounds to 0": normal(64, 1024) * 1e-7,
    "tiny": normal(64, 1024) * 1e-28,
    "large": normal(64, 1024) * 1e5,
    "zero": torch.zeros(2, 512),
    "one value": torch.tensor([[-3.3], [3.3]]).expand(2, 512),
    "every other row": normal(64, 1024)[::2],
}


def llama_cpps(x, kind):
    x = x.float().contiguous()
    raw = torch.empty(len(x), x.shape[1] // 256 * kquants.BYTES[kind], dtype=torch.uint8)
    quantize = getattr(LLAMA_CPP, f"quantize_row_{kind.replace('Q', 'q')}_ref")
    quantize(*(ctypes.c_void_p(part.data_ptr()) for part in (x, raw)), ctypes.c_int64(x.numel()))
    return raw


same_arithmetic = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="compiled with fused multiply-adds, llama.cpp rounds otherwise",
)


@same_arithmetic
@KINDS
@pytest.mark.parametrize("name", INPUTS)
def test_to_the_bit_as_llama_cpp(name, kind):
    assert torch.equal(ggml.quantize(INPUTS[name], kind), llama_cpps(INPUTS[name], kind))


numbers = st.floats(-1e4, 1e4, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0)


@same_arithmetic
@KINDS
@settings(max_examples=100)
@given(values=st.lists(numbers, min_size=1, max_size=256), fill=numbers)
def test_to_the_bit_as_llama_cpp_whatever_the_values(kind, values, fill):
    x = torch.full((1, 256), fill)
    x[0, : len(values)] = torch.tensor(values)
    assert torch.equal(ggml.quantize(x, kind), llama_cpps(x, kind))


def off(x, kind):
    """Root mean square of what quantizing changes, relative to that of the values."""
    found = ggml.dequantize(ggml.quantize(x, kind), kind)
    return ((found - x).square().mean() / x.square().mean()).sqrt().item()


def test_errors_are_those_of_the_bits():
    """Of normal values, less than of the best uniform quantizer of as many levels (Max, 1960).

    A group's scale follows its own values, which does better than one for all.
    """
    x = normal(64, 1024)
    assert off(x, "Q4_K") < 0.01154**0.5 and off(x, "Q5_K") < 0.00349**0.5
    assert off(x, "Q6_K") < 0.00104**0.5
    assert off(x, "Q4_K") < off(x, "Q4_1") and off(x, "Q5_K") < off(x, "Q5_1")


@KINDS
def test_zero_and_constants_are_kept(kind):
    assert off(INPUTS["one value"], kind) < 0.01
    assert not ggml.dequantize(ggml.quantize(INPUTS["zero"], kind), kind).any()


# --- mistakes ------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e10])
def test_what_fp16_scales_cannot_hold_is_refused(kind, value):
    x = normal(2, 512)
    x[1, 300] = value
    limit = "2.6e8" if kind == "Q6_K" else "4e6"
    with pytest.raises(ValueError, match=f"{kind} can't hold the value .*at most about {limit}"):
        ggml.quantize(x, kind)
    x[1, 300] = float(limit)
    assert ggml.dequantize(ggml.quantize(x, kind), kind).isfinite().all()


@KINDS
def test_rows_that_are_not_whole_blocks_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} takes rows of .* 256 values, not of 288"):
        ggml.quantize(torch.zeros(2, 288), kind)


# --- mixtures ------------------------------------------------------------------------------------


def shape_of(n_layers, *, dim=256, n_kv_heads=2, tied=False):
    return ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=4, n_kv_heads=n_kv_heads, hidden_dim=512,
        vocab_size=300, tied_embeddings=tied, max_seq_len=32,
    )  # fmt: skip


def kinds(args, mixture):
    return {
        name: kind_of(name, shape, args, mixture)
        for name, shape in weight_shapes(args).items()
        if len(shape) == 2
    }


# Which layers llama.cpp gives more bits, read from files that llama_model_quantize wrote.
LAYERS = [
    (12, "Q4_K_M", "Q6_K", [0, 3, 6, 9, 10, 11], [0, 3, 6, 9, 10, 11]),
    (12, "Q5_K_M", "Q6_K", [0, 3, 6, 9, 10, 11], [0, 3, 6, 9, 10, 11]),
    (12, "Q4_K_S", "Q5_K", [0, 1, 2, 3], [0]),
    (12, "Q5_K_S", "Q6_K", [], []),
    (9, "Q4_K_M", "Q6_K", [0, 3, 6, 7, 8], [0, 3, 6, 7, 8]),
]


@pytest.mark.parametrize("n_layers, mixture, better, wv, w2", LAYERS)
def test_layers_that_get_more_bits_are_llama_cpps(n_layers, mixture, better, wv, w2):
    found = kinds(shape_of(n_layers), mixture)
    more = {"output.weight"} if better == "Q6_K" else set()
    more |= {f"layers.{i}.attention.wv.weight" for i in wv}
    more |= {f"layers.{i}.feed_forward.w2.weight" for i in w2}
    assert {name for name, kind in found.items() if kind == better} == more
    assert found.pop("output.weight") == "Q6_K"
    assert {kind for name, kind in found.items() if name not in more} == {mixture[:4]}


def test_a_tied_embedding_counts_as_the_output():
    assert kinds(shape_of(2, tied=True), "Q4_K_M")["tok_embeddings.weight"] == "Q6_K"
    assert kinds(shape_of(2), "Q4_K_M")["tok_embeddings.weight"] == "Q4_K"
    assert set(kinds(shape_of(2), "Q6_K").values()) == {"Q6_K"}


@pytest.mark.parametrize("n_kv_heads, kind", [(2, "Q5_K"), (4, "Q4_K")])
def test_values_of_70b_get_a_bit_more(n_kv_heads, kind):
    found = kinds(shape_of(80, n_kv_heads=n_kv_heads), "Q4_K_M")
    assert found["layers.10.attention.wv.weight"] == kind
    assert found["layers.12.attention.wv.weight"] == "Q6_K"
    assert found["layers.10.feed_forward.w2.weight"] == "Q4_K"


def test_rows_that_are_no_whole_blocks_get_smaller_blocks():
    for mixture, most in (("Q4_K_M", "Q5_0"), ("Q5_K_M", "Q5_1"), ("Q6_K", "Q8_0")):
        found = kinds(shape_of(12, dim=96), mixture)
        assert found["layers.1.attention.wq.weight"] == most
        assert found["output.weight"] == found["layers.0.attention.wv.weight"] == "Q8_0"
        assert found["layers.1.feed_forward.w2.weight"] == mixture[:4]  # 512 wide
    assert kinds(shape_of(1, dim=40), "Q4_K_M")["layers.0.attention.wq.weight"] == "F16"


@pytest.mark.parametrize("mixture", MIXTURES)
def test_files_have_these_types_and_llama_cpps_number(tmp_path, mixture):
    args = shape_of(2)
    source = InMemory(args, random_weights(args))
    path = convert(source, tmp_path / "q.gguf", "gguf", quant=mixture.lower(), verify=True)
    opened, reader = checkpoint.open(path), gguf.GGUFReader(path)
    for name, kind in kinds(args, mixture).items():
        assert opened.stored_as(name) == kind
        whole = source.read(name, 0, 0, weight_shapes(args)[name][0])
        raw = opened.read_blocks(name, 0, 0, len(whole))
        assert torch.equal(raw, ggml.quantize(whole, kind))
    numbers = {"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18}
    assert reader.fields["general.file_type"].contents() == numbers[mixture]
    assert mixture in WRITABLE and opened.stored_as("norm.weight") == "F32"


def test_a_weight_that_does_not_fit_is_named(tmp_path):
    args = shape_of(2)
    weights = random_weights(args)
    weights["layers.1.attention.wk.weight"][3, 7] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.wk\.weight: Q4_K can't .* nan"):
        convert(InMemory(args, weights), tmp_path / "q.gguf", "gguf", quant="q4_k_m")
    assert list(tmp_path.iterdir()) == []
