"""Weights in blocks: what a dense model of the rounded weights computes, whoever rounded them."""

import math
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from conftest import TINY, random_weights, run_ranks, write_byte_tokenizer, write_checkpoint

from llama import Llama, Transformer, checkpoint
from llama.backends import memory
from llama.backends import quantized as quantize
from llama.backends.quantized import EDGES, QuantizedEmbedding, QuantizedLinear
from llama.checkpoint import InMemory, convert, ggml, local_shape, meta, read_shard, weight_shapes
from llama.checkpoint.gguf import write as write_gguf
from llama.families.names import GGUF
from llama.layers import parallel

TIED = replace(TINY, tied_embeddings=True)
WIDE = replace(TINY, dim=256, head_dim=32, hidden_dim=256)  # whole blocks on 1, 2 and 4 ranks
TOKENS = torch.arange(80).view(2, 40) * 6
PROMPTS = [[1, 2, 3], [7] * 20, [250, 0, 13, 99, 5], [42]]
KINDS = pytest.mark.parametrize("kind", quantize.KINDS)


def expected_kind(name, kind):
    return "Q4_1" if kind == "int4" and name not in EDGES else "Q8_0"


def rounded(args, kind):
    """The random weights, dense, after what quantize=kind should do to them."""
    weights = random_weights(args)
    for name, weight in weights.items():
        if weight.ndim == 2:
            target = expected_kind(name, kind)
            weights[name] = ggml.dequantize(ggml.quantize(weight, target), target)
    return weights


def load(source, kind=None, dtype=torch.float32):
    parallel.initialize(device="cpu")
    model = Transformer(source.args, device="meta")
    if kind is None:
        return checkpoint.load(source, model, dtype=dtype)
    return quantize.load(source, model, kind, dtype=dtype)


def blocks(model):
    """The blocks of each matrix, by Meta's names."""
    return {
        f"{name}.weight": module.blocks
        for name, module in model.named_modules()
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding))
    }


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(tokens)


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "world_size", lambda: world)


def test_blocks_that_ranks_would_share_are_counted_as_they_become(tmp_path, monkeypatch):
    """Of 256 values each; a rank of two has rows of 384 of them."""
    args = replace(TINY, dim=512, n_heads=8, n_kv_heads=4, head_dim=64, hidden_dim=768)
    path = write_gguf(InMemory(args, random_weights(args)), tmp_path / "m.gguf", "q4_k_m")
    source, shapes = checkpoint.open(path), weight_shapes(args)
    as_rank(monkeypatch, 1, 2)
    for kind in ("stored", "int8"):
        loaded = 0
        for name in shapes:
            found = quantize.read(source, name, kind) if quantize.is_quantizable(name) else None
            dense = 4 * math.prod(local_shape(args, name, 1, 2))
            loaded += dense if found is None else found.data.nbytes
        assert memory.estimate(args, 2, torch.float32, kind, source=source).weights == loaded
        assert quantize.cut(source, kind) == [name for name in shapes if name.endswith("w2.weight")]
    as_rank(monkeypatch, 0, 1)
    assert quantize.cut(source, "stored") == []


# --- what is computed ----------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("args", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_a_dense_model_of_the_rounded_weights_does(args, kind, dtype):
    model = load(InMemory(args, random_weights(args)), kind, dtype)
    dense = load(InMemory(args, rounded(args, kind)), dtype=dtype)
    assert torch.equal(logits(model), logits(dense))
    exact = load(InMemory(args, random_weights(args)), dtype=dtype)
    assert not torch.equal(logits(model), logits(exact))


@KINDS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_generates_what_a_dense_model_of_the_rounded_weights_does(tmp_path, kind, dtype):
    paths = [write_checkpoint(tmp_path / "exact", TINY), tmp_path / "rounded"]
    meta.write(InMemory(TINY, rounded(TINY, kind)), paths[1], 1)
    write_byte_tokenizer(paths[1] / "tokenizer.model")
    options = {"max_seq_len": 128, "device": "cpu", "dtype": dtype}
    ours, dense = (
        Llama.build(path, quantize=chosen, **options)
        for path, chosen in zip(paths, (kind, None), strict=True)
    )
    found, expected = (
        llama.generate(PROMPTS, 16, temperature=0, logprobs=True, stop_tokens=set())
        for llama in (ours, dense)
    )
    assert found == expected and [len(row) for row in found[0]] == [16] * 4


@KINDS
def test_int8_is_nearer_than_int4(kind):
    """To the exact logits, relative to them; each bit halves a step of the rounding."""
    exact = logits(load(InMemory(TINY, random_weights(TINY))))
    found = logits(load(InMemory(TINY, random_weights(TINY)), kind))
    error = ((found - exact).norm() / exact.norm()).item()
    low, high = {"int8": (0.003, 0.02), "int4": (0.05, 0.2)}[kind]
    assert low < error < high


def test_rounding_in_pieces_changes_nothing(monkeypatch):
    source = InMemory(TINY, random_weights(TINY))
    whole = blocks(load(source, "int4"))
    monkeypatch.setattr(quantize, "ROWS", 6)  # 3 rows of 64 values, 2 of 96
    for name, found in blocks(load(source, "int4")).items():
        assert torch.equal(found.data, whole[name].data) and found.kind == whole[name].kind


# --- blocks of a file ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored, kind, matrices, edges",
    [
        ("f32", "int8", "Q8_0", "Q8_0"),
        ("bf16", "int4", "Q4_1", "Q8_0"),
        ("q8_0", "int8", "Q8_0", "Q8_0"),
        ("q8_0", "int4", "Q4_1", "Q8_0"),
        ("q4_0", "int8", "Q4_0", "Q4_0"),
        ("q4_0", "int4", "Q4_0", "Q4_0"),
        ("q4_1", "int8", "Q4_1", "Q4_1"),
        ("q4_1", "int4", "Q4_1", "Q4_1"),
    ],
)
def test_a_file_s_blocks_are_taken_and_the_rest_is_rounded(tmp_path, stored, kind, matrices, edges):
    path = write_gguf(InMemory(TINY, random_weights(TINY)), tmp_path / "m.gguf", stored)
    source = checkpoint.open(path)
    in_file = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    found = blocks(load(source, kind))
    assert found.keys() == {name for name, shape in weight_shapes(TINY).items() if len(shape) == 2}
    for name, weight in found.items():
        assert weight.kind == (edges if name in EDGES else matrices)
        assert weight.shape == weight_shapes(TINY)[name]
        if weight.kind == source.stored_as(name):
            expected = torch.from_numpy(in_file[GGUF.theirs(name)].copy())
        else:
            expected = ggml.quantize(read_shard(source, name, 0, 1), weight.kind)
        assert torch.equal(weight.data, expected), name


def mapped_file(tensor):
    """The file whose mapping a tensor's bytes lie in, or what else the system calls that."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, *_, name = line.split(maxsplit=5)
        low, high = (int(bound, 16) for bound in area.split("-"))
        if low <= begin and end <= high:
            return name.strip()
    return None


@pytest.fixture(scope="module")
def int4_smollm2(smollm2_path):
    return Llama.build(smollm2_path, device="cpu", dtype="fp32", quantize="int4", compile=False)


def test_the_demo_model_is_held_as_its_file_has_it(int4_smollm2, smollm2_path, parity):
    """Its matrices are Q4_1 and its embedding Q8_0: nothing is rounded, and nothing copied."""
    model = int4_smollm2.model
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    held = blocks(model)
    assert len(held) == 2 + 7 * model.params.n_layers
    for name, weight in held.items():
        if name == "output.weight":
            name = "tok_embeddings.weight"  # tied
        tensor = tensors[GGUF.theirs(name)]
        assert weight.kind == tensor.tensor_type.name
        assert torch.equal(weight.data, torch.from_numpy(tensor.data.copy())), name
        assert mapped_file(weight.data) == str(smollm2_path.resolve())
    tokens = torch.tensor([parity["completions"][0]["ids"]])
    dense = Llama.build(smollm2_path, device="cpu", dtype="fp32", compile=False, quantize="dense")
    assert torch.equal(logits(model, tokens), logits(dense.model, tokens))


def test_the_demo_model_answers_as_the_reference_does(int4_smollm2, parity):
    cases = parity["completions"]
    found, _ = int4_smollm2.generate(
        [case["ids"] for case in cases], 6, temperature=0, stop_tokens=set()
    )
    assert found == [case["greedy"][:6] for case in cases]


def test_int8_of_the_demo_model_is_int4_of_it(int4_smollm2, smollm2_path):
    found = blocks(load(checkpoint.open(smollm2_path), "int8"))
    for name, weight in blocks(int4_smollm2.model).items():
        assert found[name].kind == weight.kind and torch.equal(found[name].data, weight.data)


def test_what_was_rounded_can_be_saved(tiny_dir, tmp_path):
    """convert --quant rounds as loading would; the file's 4 bits count for its edges, too."""

    def build(path, kind):
        tokenizer = tiny_dir / "tokenizer.model"
        return Llama.build(path, tokenizer, device="cpu", dtype="fp32", quantize=kind).model

    for quant, kind in (("q8_0", "int8"), ("q4_1", "int4")):
        path = convert.convert(tiny_dir, tmp_path / quant, "gguf", quant=quant, quiet=True)
        saved, loaded = build(path, kind), build(tiny_dir, kind)
        if kind == "int8":
            assert torch.equal(logits(saved), logits(loaded))
        for name, weight in blocks(saved).items():
            if name in EDGES and kind == "int4":
                expected = ggml.quantize(random_weights(TINY)[name], "Q4_1")
            else:
                expected = blocks(loaded)[name].data
            assert torch.equal(weight.data, expected)


# --- ranks ---------------------------------------------------------------------------------------


def assert_ranks_have_the_whole_s_blocks(source, kind, world, monkeypatch):
    names = [name for name, shape in weight_shapes(source.args).items() if len(shape) == 2]
    as_rank(monkeypatch, 0, 1)
    whole = {name: quantize.read(source, name, kind).dense(torch.float32) for name in names}
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        for name in names:
            expected = read_shard(InMemory(source.args, whole), name, rank, world)
            found = quantize.read(source, name, kind)
            assert found.shape == expected.shape
            assert torch.equal(found.dense(torch.float32), expected), (name, rank)


@KINDS
@pytest.mark.parametrize("stored", ["f32", "q8_0", "q4_1"])
@pytest.mark.parametrize(
    "args, world",
    [
        (WIDE, 2),
        (WIDE, 4),  # key/value heads replicated
        # a head twice on one rank
        (replace(WIDE, dim=384, n_heads=12, hidden_dim=384, vocab_size=510), 3),
    ],
    ids=["plain", "replicated", "twice"],
)
def test_a_rank_s_blocks_are_cut_from_the_whole(tmp_path, monkeypatch, args, world, stored, kind):
    path = write_gguf(InMemory(args, random_weights(args)), tmp_path / "m.gguf", stored)
    assert_ranks_have_the_whole_s_blocks(checkpoint.open(path), kind, world, monkeypatch)


@KINDS
@pytest.mark.parametrize("stored", ["f32", "q8_0", "q4_1"])
def test_zeros_fill_up_the_last_rank(tmp_path, monkeypatch, stored, kind):
    args = replace(WIDE, vocab_size=510)
    path = write_gguf(InMemory(args, random_weights(args)), tmp_path / "m.gguf", stored)
    assert_ranks_have_the_whole_s_blocks(checkpoint.open(path), kind, 4, monkeypatch)


@pytest.mark.parametrize("world, kind, stored", [(2, "int8", None), (4, "int4", "q4_1")])
def test_ranks_give_the_tokens_of_one(tmp_path, world, kind, stored):
    path = write_checkpoint(tmp_path / "meta", WIDE)
    build = {"tokenizer_path": str(path / "tokenizer.model"), "max_seq_len": 128, "quantize": kind}
    build["compile"] = False  # for the kernels see test_native.py
    if stored is not None:
        path = convert.convert(path, tmp_path / "m.gguf", "gguf", quant=stored, quiet=True)
    llama = Llama.build(path, device="cpu", dtype="fp32", **build)
    expected, logprobs = llama.generate(PROMPTS, 16, temperature=0, logprobs=True)
    report = run_ranks(
        world, "generate", tmp_path / "out", ckpt=str(path), prompts=PROMPTS, build=build
    )
    assert report["all_ranks"] == [expected] * world
    for row, reference in zip(report["logprobs"], logprobs, strict=True):
        assert max(abs(a - b) for a, b in zip(row, reference, strict=True)) <= 1e-4


# --- what is refused -----------------------------------------------------------------------------


@KINDS
def test_a_part_that_is_not_whole_blocks_is_refused(monkeypatch, kind):
    source, name = InMemory(TINY, random_weights(TINY)), "layers.0.feed_forward.w2.weight"
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(ValueError) as caught:
        quantize.read(source, name, kind)
    assert f"quantize='{kind}': {name} is 48 wide on each of 2 rank(s)" in str(caught.value)


def test_a_width_that_is_not_whole_blocks_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "m", replace(TINY, hidden_dim=100))
    with pytest.raises(ValueError, match=r"layers.0.feed_forward.w2.weight is 100 wide .* 1 rank"):
        Llama.build(path, device="cpu", quantize="int8")


def test_an_unknown_kind_is_refused(tiny_dir):
    for kind in ("int3", "", "INT8"):
        message = f"quantize='{kind}': choose one of int8, int4, dense, or N"
        with pytest.raises(ValueError, match=message):
            Llama.build(tiny_dir, device="cpu", quantize=kind)
        with pytest.raises(ValueError, match=message):
            load(InMemory(TINY, random_weights(TINY)), kind)
    with pytest.raises(ValueError, match="draft_quantize='int8': there is no draft model"):
        Llama.build(tiny_dir, device="cpu", draft_quantize="int8")


# --- memory --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("args", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimate_is_what_is_allocated(args, kind, dtype):
    model = load(InMemory(args, random_weights(args)), kind, dtype)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert memory.estimate(args, 1, dtype, kind).weights == held
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_fewer_bits_are_fewer_bytes():
    four, eight, dense = (
        memory.estimate(WIDE, 2, torch.bfloat16, kind).weights for kind in ("int4", "int8", None)
    )
    assert four < eight < dense
    norms = (2 * WIDE.n_layers + 1) * WIDE.dim * 2
    assert (eight - norms) * 16 == (dense - norms) * 8.5  # a block's scale is half a bit a value


def test_estimate_is_printed_with_the_kind(tiny_dir, capfd):
    Llama.build(tiny_dir, device="cpu", dtype="bf16", quantize="int4", max_seq_len=64)
    need, err = memory.estimate(TINY, 1, torch.bfloat16, "int4").weights, capfd.readouterr().err
    assert f"weights {memory.size(need)} + cache" in err
    assert "as int4 and bfloat16" in err


@KINDS
def test_weights_that_are_no_numbers_are_told(tmp_path, kind):
    weights = random_weights(WIDE)
    weights["layers.1.feed_forward.w2.weight"][3, 40] = float("nan")
    source = InMemory(WIDE, weights)
    parallel.initialize(device="cpu")
    with pytest.warns(UserWarning, match=r"layers.1.feed_forward.w2.weight holds NaN"):
        quantize.load(source, Transformer(WIDE, device="meta"), kind, dtype=torch.float32)
