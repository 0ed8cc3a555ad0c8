"""Models that see quantized, in memory as announced, offloaded."""

from dataclasses import replace

import pytest
import torch
from conftest import random_weights, write_checkpoint
from vision import (
    ROWS,
    TINY_LLAMA4,
    TINY_VISION,
    llama4_ids,
    llama4_tiles,
    tiled,
    write_llama4_checkpoint,
)

from llama import Llama, checkpoint
from llama.backends import cpu as native
from llama.backends import memory, offloaded, quantized
from llama.backends.cpu import kernels
from llama.backends.cpu.vision import NativeImageAttention
from llama.checkpoint import InMemory
from llama.families.llama4 import Llama4Args
from llama.families.registry import build
from llama.families.vision_encoder import ImageAttention, Tokens
from llama.layers import parallel

WIDE = replace(TINY_VISION, head_dim=32)  # as the kernels take it


LLAMA4_ROWS, LLAMA4_IMAGES = [[3, *llama4_ids((2, 2)), 5, 6]], [[llama4_tiles((2, 2))]]


def dequantized(kind, args=WIDE):
    """Weights that have been quantized and dequantized, so that dense layers compute the same."""
    parallel.initialize(device="cpu")
    source = InMemory(args, random_weights(args))
    weights = dict(source.weights)
    for name in filter(quantized.is_quantizable, weights):
        blocks = quantized.read(source, name, kind)
        weights[name] = blocks.dense(torch.float32)[: len(weights[name])]
    return source, InMemory(args, weights)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_text_is_quantized_and_the_encoder_is_not(kind):
    source, dense = dequantized(kind)
    model = build(WIDE, device="meta")
    quantized.load(source, model, kind, dtype=torch.float32)
    whole = checkpoint.load(dense, build(WIDE, device="meta"))
    found = {name for name, m in model.named_modules() if isinstance(m, quantized.QuantizedLinear)}
    assert len(found) == 7 * (WIDE.n_layers + WIDE.vision_num_cross_attention_layers) + 1
    assert not any("vision" in name for name in found)
    images = tiled(ROWS)
    of_each = [
        m(torch.tensor(ROWS), images=[[m.encode(*one[:2]) for one in row] for row in images])
        for m in (model, whole)
    ]
    assert (of_each[0] - of_each[1]).abs().max() < 1e-4


@torch.inference_mode()
def test_llama4s_text_is_quantized_and_its_encoder_is_not():
    source, dense = dequantized("int8", TINY_LLAMA4)
    model = build(TINY_LLAMA4, device="meta")
    quantized.load(source, model, "int8", dtype=torch.float32)
    whole = checkpoint.load(dense, build(TINY_LLAMA4, device="meta"))
    found = {name for name, m in model.named_modules() if isinstance(m, quantized.QuantizedLinear)}
    assert len(found) == TINY_LLAMA4.n_layers * (4 + 3 * (1 + TINY_LLAMA4.num_experts)) + 1
    assert not any("vision" in name for name in found)
    tokens, [[one]] = torch.tensor(LLAMA4_ROWS), LLAMA4_IMAGES
    ours, theirs = (m(tokens, images=[[m.encode(*one[:2])]]) for m in (model, whole))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture
def bf16_kernels():
    if not kernels.library().attends_to_all():
        pytest.skip("a processor without products of bf16")


# Fewer and more queries and keys than tiles, caches and tasks hold, and no multiples of 32.
GROUPS = [[(1, 1), (1, 28)], [(100, 1), (30, 3), (1, 28)], [(600, 1), (0, 0), (4, 7), (1, 0)]]


@torch.inference_mode()
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("heads, head_dim", [(3, 80), (2, 16), (1, 64), (2, 96)])
def test_the_encoders_attention_by_the_kernels(bf16_kernels, groups, heads, head_dim):
    """As exact as torch's in bf16; the same on any number of threads."""
    tokens, before = Tokens.counted(*groups), torch.get_num_threads()
    attention = ImageAttention(heads * head_dim, heads)
    generator = torch.Generator().manual_seed(head_dim)
    shape = (3, 1, len(tokens.times), heads * head_dim)
    given = (2 * torch.randn(shape, generator=generator)).bfloat16()
    exact, torchs = attention.attend(*given.float(), tokens), attention.attend(*given, tokens)
    attention.__class__ = NativeImageAttention
    ours = attention.attend(*given, tokens)
    error, torchs_error = ((one - exact).square().mean().sqrt() for one in (ours, torchs))
    assert error < 1.1 * torchs_error < 0.02 * exact.square().mean().sqrt()
    try:
        torch.set_num_threads(3)
        assert torch.equal(attention.attend(*given, tokens), ours)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_the_encoder_on_the_kernels(bf16_kernels):
    args = replace(WIDE, vision_width=64)  # heads of 16
    model = build(args, device="cpu", dtype=torch.bfloat16)
    model.load_state_dict(random_weights(args, dtype=torch.bfloat16))
    [images] = tiled([[WIDE.vocab_size] * 8])
    before = [model.vision_model(*one[:2]) for one in images]
    exact = build(args, device="cpu", dtype=torch.float32)
    exact.load_state_dict(random_weights(args, dtype=torch.bfloat16))
    native.swap(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, ImageAttention)}
    assert kinds == {NativeImageAttention}
    for one, torchs in zip(images, before, strict=True):
        ours, expected = model.vision_model(*one[:2]), exact.vision_model(*one[:2])
        assert not torch.equal(ours, torchs)
        assert (ours - expected).square().mean() < 1.2 * (torchs - expected).square().mean()


def test_memory_is_that_of_weights_and_images():
    args = replace(WIDE, max_batch_size=6)
    held = sum(weight.nbytes for weight in random_weights(args).values())
    found = memory.estimate(args, 1, torch.float32)
    assert found.weights == held
    model = build(args, device="cpu", dtype=torch.float32)
    [[one]] = tiled([[WIDE.vocab_size]], 3)
    image = sum(part.nbytes for part in model.encode(*one[:2]))
    text = model.new_cache(args.max_batch_size)
    text.reserve(args.max_seq_len)
    assert found.cache == text.nbytes + 6 * image


@pytest.mark.parametrize(
    "args, write, rows, images",
    [
        (WIDE, write_checkpoint, ROWS, tiled(ROWS)),
        (TINY_LLAMA4, lambda path, _: write_llama4_checkpoint(path), LLAMA4_ROWS, LLAMA4_IMAGES),
    ],
    ids=["Llama 3.2", "Llama 4"],
)
def test_text_layers_are_streamed_and_images_read(tmp_path, monkeypatch, args, write, rows, images):
    path = write(tmp_path / "model", args)
    build_ = dict(device="cpu", dtype="fp32", max_seq_len=128, max_batch_size=4)
    options = dict(images=images, temperature=0, stop_tokens=set(), logprobs=True)
    expected = Llama.build(path, compile=False, **build_).generate(rows, 6, **options)
    args = replace(args, max_seq_len=128, max_batch_size=4)
    if isinstance(args, Llama4Args):  # of experts, too
        held = sum(weight.nbytes for weight in random_weights(args).values())
        assert memory.estimate(args, 1, torch.float32).weights == held
    block, output = offloaded._nbytes(args, 1, torch.float32)
    monkeypatch.setattr(memory, "working", lambda *_: 0)  # more than all of this model
    rest = memory.estimate(args, 1, torch.float32).cache
    rest += offloaded._rest(args, 1, torch.float32)
    monkeypatch.setattr(memory, "available", lambda _: rest + output + 3 * block)
    llama = Llama.build(path, offload="auto", **build_)
    kinds = [isinstance(layer, offloaded.StreamedBlock) for layer in llama.model.layers]
    assert sum(kinds) == args.n_layers - 1
    assert llama.generate(rows, 6, **options) == expected
