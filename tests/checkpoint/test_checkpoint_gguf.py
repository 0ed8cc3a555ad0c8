"""GGUF weights: names, every quantization, slices, RoPE factors, what is refused."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from conftest import TINY, random_model, random_weights

from llama import Transformer, checkpoint
from llama.checkpoint.gguf import GGUFCheckpoint
from llama.families.names import GGUF
from llama.layers import parallel
from llama.model import rope_frequencies

ARGS = replace(TINY, dim=256, n_heads=8, n_kv_heads=2, hidden_dim=512, head_dim=32)
Type = gguf.GGMLQuantizationType


def write(path, args=ARGS, quantization=Type.F32, metadata=(), rope=None, drop=(), extra=(),
          split=0):  # fmt: skip
    """A .gguf file with random weights; metadata, a value of None deletes a key; split, in parts of
    at most so many tensors."""
    keys = {
        "llama.block_count": args.n_layers,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.rope.freq_base": args.rope_theta,
        "llama.rope.dimension_count": args.head_dim,
    } | dict(metadata)
    architecture = keys.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    names = {ours: theirs for theirs, ours in GGUF.to_meta.items()}
    for name, weight in random_weights(args).items():
        layer, stem = "", name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, i, stem = stem.split(".", 2)
            layer = f"blk.{i}."
        if name not in drop:
            kind = quantization if weight.ndim == 2 else Type.F32
            data = gguf.quantize(weight.numpy(), kind)
            writer.add_tensor(f"{layer}{names[stem]}.weight", data, raw_dtype=kind)
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope.numpy())
    for name in extra:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_float_weights_arrive_bit_for_bit(tmp_path):
    parallel.initialize(device="cpu")
    weights = random_weights(ARGS)
    for kind, dtype in ((Type.F32, torch.float32), (Type.F16, torch.float16),
                        (Type.BF16, torch.bfloat16)):  # fmt: skip
        source = checkpoint.open(write(tmp_path / f"{kind.name}.gguf", quantization=kind))
        assert source.args == replace(ARGS, max_seq_len=2048)
        model = checkpoint.load(source, Transformer(source.args, device="meta"))
        for name, weight in model.named_parameters():
            expected = weights[name].to(dtype) if weights[name].ndim == 2 else weights[name]
            assert torch.equal(weight, expected), (kind, name)


QUANTIZED = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_slices_along_either_axis_equal_the_whole_dequantized(tmp_path, kind):
    """Blocks run along the last axis, so a slice of columns may begin within one."""
    source = GGUFCheckpoint(write(tmp_path / "q.gguf", quantization=kind))
    for name, axis, start, stop in (
        ("tok_embeddings.weight", 0, 100, 205),
        ("layers.1.feed_forward.w2.weight", 1, 37, 251),
        ("layers.0.attention.wo.weight", 1, 128, 256),
        ("layers.0.attention.wk.weight", 0, 0, 64),
    ):
        whole = gguf.dequantize(gguf.quantize(random_weights(ARGS)[name].numpy(), kind), kind)
        expected = torch.from_numpy(whole).narrow(axis, start, stop - start)
        assert torch.equal(source.read(name, axis, start, stop), expected)


@pytest.mark.parametrize("kind", [k for k in Type if k in gguf.GGML_QUANT_SIZES])
def test_every_type_is_read_or_refused_by_name(tmp_path, kind):
    """Random bytes as blocks of every type that GGUF knows: equal to gguf's own, or one error."""
    source = GGUFCheckpoint(write(tmp_path / "q.gguf"))
    values, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 255, (4, 512 // values * size), dtype=np.uint8)
    (tmp_path / "raw").write_bytes(raw.tobytes())
    info = source._tensors["tok_embeddings.weight"]._replace(file=tmp_path / "raw", offset=0)
    source._tensors["w"] = info._replace(shape=(4, 512), type=int(kind))
    try:
        expected = torch.from_numpy(np.array(gguf.dequantize(raw, kind), dtype=np.float32))
    except NotImplementedError:
        with pytest.raises(ValueError, match=f"w is quantized as {kind.name}"):
            source.read("w", 0, 0, 4)
        return
    got = source.read("w", 0, 1, 3).float()
    assert torch.equal(got.nan_to_num(7), expected[1:3].nan_to_num(7))


def test_dimensions_the_metadata_leaves_out(tmp_path):
    path = write(
        tmp_path / "a.gguf",
        replace(ARGS, n_kv_heads=8),
        metadata={"llama.attention.head_count_kv": None, "llama.rope.freq_base": None},
    )
    args = checkpoint.open(path).args
    assert args.n_kv_heads == 8 and args.rope_theta == 10000.0
    wide = replace(ARGS, head_dim=64)
    args = checkpoint.open(
        write(tmp_path / "b.gguf", wide, metadata={"llama.attention.key_length": 64})
    ).args
    assert args.head_dim == 64


def test_tied_when_there_is_no_output(tmp_path):
    assert checkpoint.open(
        write(tmp_path / "tied.gguf", replace(ARGS, tied_embeddings=True))
    ).args.tied_embeddings
    assert not checkpoint.open(write(tmp_path / "not.gguf")).args.tied_embeddings


@pytest.mark.parametrize(
    "scaling",
    [
        {"scaling.type": "linear", "scaling.factor": 4.0},
        {"scaling.factor": 4.0},
        {"scale_linear": 4.0},
    ],
    ids=str,
)
def test_linear_scaling_of_rope_in_each_spelling(tmp_path, scaling):
    metadata = {f"llama.rope.{key}": value for key, value in scaling.items()}
    assert checkpoint.open(write(tmp_path / "a.gguf", metadata=metadata)).args == replace(
        checkpoint.open(write(tmp_path / "b.gguf")).args, rope_linear_factor=4.0
    )


def test_a_rope_theta_of_a_context_of_a_million_tokens(tmp_path):
    path = write(tmp_path / "a.gguf", replace(ARGS, rope_theta=3580165449.0))
    assert checkpoint.open(path).args.rope_theta == pytest.approx(3580165449.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_1_rope_factors_are_recognised_and_checked(tmp_path, factor):
    args = replace(ARGS, rope_theta=500000.0, use_scaled_rope=True, rope_scaling_factor=factor)
    plain = rope_frequencies(replace(args, use_scaled_rope=False))
    factors = plain / rope_frequencies(args)
    found = checkpoint.open(write(tmp_path / "a.gguf", args, rope=factors)).args
    assert found == replace(args, max_seq_len=2048)
    with pytest.raises(ValueError, match="isn't Llama 3.1's scaling"):
        checkpoint.open(write(tmp_path / "b.gguf", args, rope=factors.sqrt()))


@pytest.mark.parametrize(
    "how, message",
    [
        ({"metadata": {"general.architecture": "qwen2"}}, "architecture 'qwen2', and known are"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "method 'longrope'"),
        (
            {
                "metadata": {
                    "llama.rope.scaling.type": "yarn",
                    "llama.context_length": 64,
                    "llama.rope.scaling.yarn_ext_factor": 0.5,
                }
            },
            "yarn_ext_factor",
        ),
        ({"metadata": {"split.count": 2}}, "llama-gguf-split"),
        ({"metadata": {"split.count": "two"}}, "one of two parts"),
        (
            {"metadata": {"llama.rope.dimension_count": 16}},
            "dimension_count=16, but heads are 32 wide",
        ),
        ({"metadata": {"llama.block_count": None}}, "lacks the metadata key llama.block_count"),
        ({"metadata": {"llama.block_count": 5}}, "lacks layers.2"),
        ({"metadata": {"llama.feed_forward_length": 511}}, "asks for (511, 256)"),
        ({"drop": ["layers.1.attention.wk.weight"]}, "lacks layers.1.attention.wk.weight"),
        ({"drop": ["tok_embeddings.weight"]}, "lacks tok_embeddings.weight"),
        ({"extra": ["blk.0.attn_q.bias"]}, "lacks layers.0.attention.wk.bias"),
    ],
)
def test_what_this_model_is_not_is_refused_by_name(tmp_path, how, message):
    path = write(tmp_path / "model.gguf", **how)
    with pytest.raises(ValueError) as caught:
        checkpoint.check_shapes(checkpoint.open(path))
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("named", ["", "model-00001-of-00003.gguf", "model-00003-of-00003.gguf"])
def test_parts_are_read_as_the_whole(tmp_path, named):
    """As the gguf package and llama-gguf-split write them; whichever is named, or their folder."""
    whole = checkpoint.open(write(tmp_path / "whole.gguf", quantization=Type.Q8_0))
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "model.gguf", quantization=Type.Q8_0, split=8)
    found = checkpoint.open(tmp_path / "parts" / named)
    assert found.args == whole.args and found.shapes() == whole.shapes()
    assert found.path.name == "model-00001-of-00003.gguf"
    for name, (rows, *_) in whole.shapes().items():
        assert torch.equal(found.read(name, 0, 0, rows), whole.read(name, 0, 0, rows)), name
    assert checkpoint.fingerprint(found) == checkpoint.fingerprint(whole)


def test_parts_that_are_not_all_there_or_not_of_one_model(tmp_path):
    first, second, third = (tmp_path / f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3))
    write(tmp_path / "model.gguf", split=8)
    kept = second.read_bytes()
    second.write_bytes(kept[:-100])
    with pytest.raises(ValueError, match=f"{second} is cut off"):
        checkpoint.open(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ValueError, match="and another part hold .*: not of one model"):
        checkpoint.open(first)
    write(second, metadata={"split.count": 3}, drop=[*random_weights(ARGS)][1:])
    with pytest.raises(
        ValueError, match=r"hold \d+ tensors, not \d+: not of one model|hold token_embd"
    ):
        checkpoint.open(first)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"{second} is missing, one of 3 parts"):
        checkpoint.open(third)
    other = first.rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="one of 3 parts: give them the names"):
        checkpoint.open(other)


def test_a_file_cut_off_within_the_weights_is_refused(tmp_path):
    parallel.initialize(device="cpu")
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is cut off: it has"):
        checkpoint.open(path)


def test_the_demo_model_is_read_as_gguf_itself_reads_it(smollm2_path):
    source = GGUFCheckpoint(smollm2_path)
    reader = gguf.GGUFReader(smollm2_path)
    for tensor in reader.tensors[:12]:
        expected = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        assert torch.equal(source.read(GGUF.meta(tensor.name), 0, 0, len(expected)), expected)


def test_written_as_metas_shards_it_gives_the_same_logits(smollm2_path, tmp_path):
    """GGUF -> 3 shards of Meta's format -> one rank: the same numbers, q and k included."""
    from llama.checkpoint import meta

    original = checkpoint.open(smollm2_path)
    shards = checkpoint.open(meta.write(original, tmp_path / "meta", 3))
    one, two = (
        checkpoint.load(source, Transformer(source.args, device="meta"))
        for source in (original, shards)
    )
    tokens = torch.arange(100)[None] * 7
    with torch.inference_mode():
        assert torch.equal(one(tokens), two(tokens))


def test_random_model_from_gguf_equals_the_same_weights_in_memory(tmp_path):
    source = checkpoint.open(write(tmp_path / "m.gguf"))
    model = checkpoint.load(source, Transformer(source.args, device="meta"))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens), random_model(ARGS)(tokens))
