"""Quantizations as others publish them: exact values, the peers' logits, ranks, damaged files."""

import json
import os
import random
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, random_weights, run_ranks, write_byte_tokenizer
from published import ARGS, INTEGERS, meaning, publish, publish_meta, rounded, words
from published_floats import FLOATS
from safetensors.torch import save_file
from test_checkpoint_huggingface import mutate
from test_model import TOLERANCE, gap, ids, to_hugging_face
from vision import ARGS as VISION
from vision import TINY_LLAMA4

from llama import Transformer, checkpoint
from llama.apps.inspect import inspect
from llama.backends import build, memory, quantized
from llama.checkpoint import InMemory, ggml, gguf, huggingface, meta, weight_shapes
from llama.checkpoint.convert import describe
from llama.checkpoint.listing import checkpoint_files
from llama.checkpoint.safetensors import index_safetensors
from llama.checkpoint.schemes import SCHEMES
from llama.checkpoint.schemes.compressed import FORMATS, CompressedTensors
from llama.families.names import HF
from llama.layers import parallel

ALL = {**INTEGERS, **FLOATS}
CASES = pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
MUTATIONS = int(os.environ.get("LLAMA_MUTATIONS", 12))  # `make soak` takes more


def load(path, dtype=torch.float32, **options) -> Transformer:
    device = parallel.initialize(device="cpu")
    source = checkpoint.open(path)
    checkpoint.check_shapes(source)
    return build.prepare(source, source.args, device=device, dtype=dtype, **options)


@CASES
def test_values_blocks_and_logits_are_the_peer_s(tmp_path, case):
    theirs = publish(tmp_path, case)
    source = checkpoint.open(tmp_path)
    checkpoint.check_shapes(source)
    state = theirs.state_dict()
    for name, shape in weight_shapes(ARGS).items():
        if not name.startswith("layers.") or len(shape) == 1:
            continue
        expected = state[HF.theirs(name)]
        if name.endswith(("wq.weight", "wk.weight")):
            expected = expected.view(-1, 2, ARGS.head_dim // 2, shape[1]).transpose(1, 2)
            expected = expected.reshape(shape)
        assert source.stored_as(name) == case.kind
        whole = source.read(name, 0, 0, shape[0])
        assert torch.allclose(whole, expected, rtol=3e-7, atol=0), name
        for axis, start, stop in ((0, 3, 30), (0, 16, 17), (1, 0, 64), (1, 33, 97)):
            part = whole.narrow(axis, start, stop - start)
            assert torch.equal(source.read(name, axis, start, stop), part)
        if case.kind in quantized.ALL:
            values, size = ggml.block(case.kind)
            raw = source.read_blocks(name, 0, 0, shape[0])
            assert raw.shape == (shape[0], shape[1] // values * size)
            assert torch.equal(ggml.dequantize(raw, case.kind), whole)
            assert torch.equal(source.read_blocks(name, 0, 5, 9), raw[5:9])
            last = source.read_blocks(name, 1, shape[1] - values, shape[1])
            assert torch.equal(last, raw[:, -size:])
    tokens = ids(2, 60)
    with torch.no_grad():
        expected = theirs(tokens).logits
        compressed, plain = load(tmp_path), load(tmp_path, quantize="dense", compile=False)
        assert gap(plain(tokens), expected) <= TOLERANCE
        found = compressed(tokens)
        # The kernels' activations are of 16 bits in blocks of 32.
        scale = expected.abs().max().item() if case.kind in quantized.ALL else 1
        assert gap(found, expected) <= TOLERANCE * scale
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


@CASES
def test_what_is_stored_in_files_is_named_and_stays_compressed(tmp_path, case):
    publish(tmp_path, case)
    source = checkpoint.open(tmp_path)
    about = describe(source)
    label = next(kind for kind in about.bytes if kind != "F32")
    assert case.config["quant_method"].split("sandbytes")[0] in label.lower() or "int8" in label
    assert sum(about.bytes.values()) <= (tmp_path / "model.safetensors").stat().st_size
    args = source.args
    dense = memory.estimate(args, 1, torch.float32, None, source=source).weights
    stored = memory.estimate(args, 1, torch.float32, "stored", source=source).weights
    assert (stored < dense) == (case.kind in quantized.ALL)


@pytest.mark.parametrize("name", ["AWQ, groups of 128", "GPTQ, activation order", "w8a8"])
def test_inspect_names_the_scheme_and_what_becomes_of_it(tmp_path, capsys, name):
    publish(tmp_path, INTEGERS[name])
    inspect(str(tmp_path))
    said, source = capsys.readouterr().out, checkpoint.open(tmp_path)
    kind = INTEGERS[name].kind
    becomes = f"in memory blocks of {kind}" if kind in quantized.ALL else "in memory always dense"
    assert f"{source.quantized['layers.0.attention.wq.weight'].label}: {becomes}" in said
    need = memory.estimate(source.args, 1, torch.bfloat16, "stored", source=source)
    assert f"as stored, bf16: {memory.size(need.weights)[:4]}" in said.replace("weights ", "")


def test_every_scheme_is_in_the_documentation():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    for name in (*SCHEMES, *FORMATS):
        assert f"`{name}`" in text, name


def files_of(path):
    has = {file.name for file in path.iterdir()}.__contains__
    return checkpoint_files("there", has, lambda name: (path / name).read_bytes())


def test_a_scheme_that_is_not_read_is_not_downloaded(tmp_path):
    publish(tmp_path, INTEGERS["GPTQ"])
    file = tmp_path / "config.json"
    assert files_of(tmp_path) == ["config.json", "model.safetensors"]
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"there: config.json: .*quant_method='hqq'"):
        files_of(tmp_path)


def test_older_files_of_modelopt_say_what_they_are_apart(tmp_path):
    """In hf_quant_config.json, as nvidia/Llama-3.1-8B-Instruct-FP8 does."""
    publish(tmp_path, FLOATS["ModelOpt FP8"])
    name = "layers.0.attention.wq.weight"
    expected = checkpoint.open(tmp_path).read(name, 0, 0, 64)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    apart = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(apart))
    source = checkpoint.open(tmp_path)
    assert source.stored_as(name) == "FP8"
    assert torch.equal(source.read(name, 0, 0, 64), expected)
    assert files_of(tmp_path) == ["config.json", "model.safetensors", "hf_quant_config.json"]
    apart["quantization"]["quant_algo"] = "W4A16_AWQ"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(apart))
    for refused in (files_of, checkpoint.open):
        with pytest.raises(ValueError, match=r"config.json: .*modelopt: quant_algo='W4A16_AWQ'"):
            refused(tmp_path)


@pytest.mark.parametrize(
    "case, file, about",
    [
        ("GPTQ", "quantize_config.json", {"bits": 4, "group_size": 64, "damp_percent": 0.01}),
        ("AWQ, groups of 32", "quant_config.json", {"w_bit": 4, "q_group_size": 32}),
        ("AWQ, groups of 32", "quant_config.json", {"bits": 4, "group_size": 32}),
        ("AWQ, groups of 32", "quantize_config.json", {"w_bit": 4, "q_group_size": 32}),
    ],
)
def test_older_files_of_auto_gptq_and_auto_awq_say_what_they_are_apart(tmp_path, case, file, about):
    publish(tmp_path, INTEGERS[case])
    name = "layers.0.attention.wq.weight"
    expected = checkpoint.open(tmp_path).read(name, 0, 0, 64)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"not a float; .* or a quantize_config.json beside it"):
        checkpoint.open(tmp_path)
    (tmp_path / file).write_text(json.dumps(about))
    source = checkpoint.open(tmp_path)
    assert source.stored_as(name) == INTEGERS[case].kind
    assert torch.equal(source.read(name, 0, 0, 64), expected)
    assert files_of(tmp_path) == ["config.json", "model.safetensors", file]
    for wrong in ({"bits": 3}, {"w_bit": 3}, {"is_marlin_format": True, "bits": 4, "version": 1}):
        (tmp_path / file).write_text(json.dumps(wrong))
        for refused in (files_of, checkpoint.open):
            with pytest.raises(ValueError, match=rf"(awq|gptq): .*; read .* \(in {file}\)"):
                refused(tmp_path)


def test_weights_of_another_name_are_named(tmp_path):
    publish(tmp_path, INTEGERS["GPTQ"])
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(ValueError, match=r"if gptq_model-4bit-128g.safetensors has all weights"):
        checkpoint.open(tmp_path)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "name",
    ["AWQ, groups of 32", "GPTQ, activation order", "w8a8", "FP8 in blocks", "NF4", "NVFP4A16"],
)
def test_ranks_share_it(tmp_path, world, name):
    publish(tmp_path / "ckpt", ALL[name])
    prompts = [[1, 2, 3], [200] * 9]
    write_byte_tokenizer(tmp_path / "ckpt" / "tokenizer.model")
    build_options = {"max_seq_len": 64, "compile": True}
    found = [
        run_ranks(
            n,
            "generate",
            tmp_path / f"{n}.json",
            ckpt=str(tmp_path / "ckpt"),
            prompts=prompts,
            build=build_options,
            no_stops=True,
        )
        for n in (1, world)
    ]
    assert found[0]["tokens"] == found[1]["tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["AWQ, groups of 128", "w8a8, zero points", "FP8 in blocks", "FP4", "NVFP4A16"]
)
def test_a_row_is_the_same_in_every_batch(tmp_path, name, dtype):
    publish(tmp_path, ALL[name])
    model, tokens = load(tmp_path, dtype=dtype), ids(5, 20)
    with torch.no_grad():
        together = model(tokens)
        for row in range(5):
            assert torch.equal(model(tokens[row : row + 1]), together[row : row + 1])
        assert torch.equal(model(tokens[:, :7]), together[:, :7])


SMALL = replace(
    ARGS, dim=128, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=128, vocab_size=24
)


def mutations(path):
    """Damaged bytes end as a ValueError or load as other numbers; never another way."""
    originals = {file: file.read_bytes() for file in sorted(path.iterdir())}
    load(path)
    rng, refused = random.Random(0), 0
    for number in range(MUTATIONS):
        file = rng.choice([*originals])
        file.write_bytes(mutate(originals[file], rng, ends=2500))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(path)
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                assert str(path) in str(error), (number, error)
                assert len(str(error)) < 2000
        file.write_bytes(originals[file])
    load(path)
    assert refused > 0 and (refused < MUTATIONS or MUTATIONS < 100)


@CASES
def test_mutated_files_load_or_are_one_error(tmp_path, case):
    publish(tmp_path, case, SMALL)
    mutations(tmp_path)


LLAMA4_TEXT = replace(
    TINY_LLAMA4, vision_layers=None, expert_dim=128, num_experts=16, attention_chunk_size=8192,
    floor_scale=8192.0, attn_scale=0.1,
)  # fmt: skip


@pytest.mark.parametrize(
    "write, args, name",
    [
        (huggingface.write, TINY_LLAMA4, "model"),
        (meta.write, TINY_LLAMA4, "model"),
        (gguf.write, LLAMA4_TEXT, "model.gguf"),
        (huggingface.write, VISION, "model"),
        (meta.write, VISION, "model"),
    ],
    ids=["llama 4 hf", "llama 4 meta", "llama 4 gguf", "vision hf", "vision meta"],
)
def test_mutated_files_of_families(tmp_path, write, args, name):
    path = write(InMemory(args, random_weights(args)), tmp_path / name)
    mutations(path if path.is_dir() else tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quant_method": "quip"}, "quant_method='quip'; read here"),
        ({"quant_method": "awq", "version": "gemv"}, "version='gemv'"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "x"}, "group_size='x'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"a": 1}}, "dynamic"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {}}}, "format None"),
        ({"quant_method": "compressed-tensors"}, "config_groups=None"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo='NVFP4_AWQ'; read"),
        ([1], "quant_method=[1]"),
    ],
)
def test_what_cannot_be_read_is_refused_before_weights_are(tmp_path, config, message):
    theirs = publish(tmp_path, INTEGERS["GPTQ"])
    del theirs
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    with pytest.raises(ValueError, match="quantization_config") as caught:
        checkpoint.open(tmp_path)
    assert message in str(caught.value)


def packed(path, zero_points=False, order=None):
    """An open compressed-tensors file with a module m of w4a16 in groups of 32; what it means."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) + 0.7
    order = torch.arange(128) if order is None else order
    q, scale, zero = rounded(weight[:, order], 4, 4, zero_points, torch.float32)
    back = order.argsort()
    tensors = {
        "m.weight_packed": words(q[:, back], 4),
        "m.weight_scale": scale.contiguous(),
        "m.weight_shape": torch.tensor([16, 128]),
        "m.weight_g_idx": (torch.arange(128, dtype=torch.int32) // 32)[back].contiguous(),
    }
    if zero_points:
        tensors["m.weight_zero_point"] = words(zero.T, 4).T.contiguous()
    save_file(tensors, path)
    parts = {name[2:]: stored for name, stored in index_safetensors(path, codes=True).items()}
    return parts, meaning(q, scale, zero)[:, back]


def config_of(**targets):
    """A config of groups in their order, each a list of targets and its settings."""
    usual = dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    return {
        "format": "pack-quantized",
        "config_groups": {
            name: {"targets": those, "weights": usual | about}
            for name, (those, about) in targets.items()
        },
        "sparsity_config": {"format": "dense", "ignore": [], "targets": []},
    }


@pytest.mark.parametrize("named", ["group", "dynamic", True])
def test_activation_order_by_each_of_its_names(tmp_path, named):
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    parts, expected = packed(tmp_path / "a.safetensors", order=order)
    scheme = CompressedTensors(config_of(a=(["Linear"], {"actorder": named})))
    assert torch.equal(scheme.weight("m", parts).dense(0, 16), expected)


@pytest.mark.parametrize("names", [("m", "Linear"), ("re:.*m$", "Linear"), ("m", "re:m")])
def test_the_most_specific_target_decides_whatever_the_order_of_groups(tmp_path, names):
    from compressed_tensors.utils.match import match_targets

    assert match_targets("m", torch.nn.Linear(2, 2), list(names))[0] == names[0]
    right, wrong = ([names[0]], {"symmetric": False}), ([names[1]], {})
    for groups in ({"a": right, "b": wrong}, {"a": wrong, "b": right}):
        parts, expected = packed(tmp_path / "a.safetensors", zero_points=True)
        found = CompressedTensors(config_of(**groups)).weight("m", parts)
        assert torch.allclose(found.dense(0, 16), expected, rtol=3e-7, atol=0)


# --- Meta's own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spinquant, lora", [(True, False), (False, False), (False, True)])
def test_metas_int4_releases(tmp_path, spinquant, lora):
    dense = publish_meta(tmp_path, spinquant, lora)
    source = checkpoint.open(tmp_path)
    checkpoint.check_shapes(source)
    for name, expected in dense.items():
        found = source.read(name, 0, 0, len(expected))
        assert torch.allclose(found, expected, rtol=3e-7, atol=2e-6), name
        is_dense = (lora and name.startswith("layers.")) or (spinquant and "w2" in name)
        if expected.dim() == 2:
            assert (source.stored_as(name) in quantized.ALL) == (not is_dense), name
    assert source.stored_as("output.weight") == "I8_128"
    theirs = to_hugging_face(ARGS, dense)
    tokens = ids(2, 60)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert gap(load(tmp_path, quantize="dense", compile=False)(tokens), expected) <= TOLERANCE
        found = load(tmp_path)(tokens)
        assert gap(found, expected) <= TOLERANCE * expected.abs().max()
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_mutated_files_of_meta_load_or_are_one_error(tmp_path):
    small = replace(SMALL, dim=128, hidden_dim=128)
    publish_meta(tmp_path, True, True, small)
    mutations(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantization_args": {"group_size": 0}}, "group_size=0"),
        ({"quantization_args": {"group_size": 32, "scheme": "int3"}}, "scheme='int3'"),
        ({"quantization_args": None, "lora_args": {"rank": 16}}, "quantization_args=None"),
        ({"lora_args": {"rank": 16, "scale": "x"}}, "scale='x'"),
    ],
)
def test_what_metas_params_say_is_checked(tmp_path, settings, message):
    publish_meta(tmp_path, False, True)
    file = tmp_path / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        checkpoint.open(tmp_path)
