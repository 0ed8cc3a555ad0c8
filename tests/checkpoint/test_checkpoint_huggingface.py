"""Hugging Face's format against transformers: what it writes, what it reads, what is broken."""

import copy
import json
import math
import pickle
import random
import struct
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_weights, run_ranks, write_byte_tokenizer, write_checkpoint
from safetensors.torch import load_file, save_file
from test_model import SHAPES, TOLERANCE, gap, ids, to_hugging_face
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from llama import Llama, Tokenizer, Transformer, checkpoint
from llama.checkpoint import InMemory, gguf, huggingface, mapped, weight_shapes
from llama.checkpoint.safetensors import interleave, split_halves
from llama.families.names import HF
from llama.layers import parallel

LINEAR = {"rope_linear_factor": 4.0}
SHAPES = {**SHAPES, "linear": LINEAR}
PROMPTS = [[1, 2, 3], [200] * 9]


def args_of(shape):
    return replace(TINY, **{"head_dim": TINY.head_dim, **shape})


def peer(args=TINY, seed=0) -> LlamaForCausalLM:
    """transformers' model of a shape, with random weights that make outputs differ clearly."""
    model = to_hugging_face(args, random_weights(args, seed))
    if args.rope_linear_factor != 1.0:
        config = copy.deepcopy(model.config)
        config.rope_parameters = {
            "rope_type": "linear",
            "rope_theta": args.rope_theta,
            "factor": args.rope_linear_factor,
        }
        linear = LlamaForCausalLM(config).eval()
        linear.load_state_dict(model.state_dict())
        return linear
    return model


def edit_json(file: Path, drop=(), **keys) -> None:
    value = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


def load(path, dtype=None) -> Transformer:
    parallel.initialize(device="cpu")
    source = checkpoint.open(path)
    checkpoint.check_shapes(source)
    return checkpoint.load(source, Transformer(source.args, device="meta"), dtype=dtype)


def assert_same_logits(path, theirs, vocab_size=512) -> None:
    tokens = ids(2, 90, vocab_size=vocab_size)
    with torch.no_grad():
        assert gap(load(path, torch.float32)(tokens), theirs.float()(tokens).logits) <= TOLERANCE


# --- what transformers writes --------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_what_transformers_saves_gives_its_logits(tmp_path, shape):
    args = args_of(shape)
    theirs = peer(args)
    theirs.save_pretrained(tmp_path)
    found = checkpoint.open(tmp_path).args
    assert found == replace(args, max_seq_len=found.max_seq_len)
    assert_same_logits(tmp_path, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("files", ["one file", "shards", "bin", "bin shards"])
def test_files_of_every_kind(tmp_path, dtype, files):
    theirs = peer().to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=100_000 if "shards" in files else "50GB")
    if "bin" in files:
        to_bin(tmp_path)
    suffix = "bin" if "bin" in files else "safetensors"
    assert (len(list(tmp_path.glob(f"*.{suffix}"))) > 1) == ("shards" in files)
    source = checkpoint.open(tmp_path)
    name = "layers.1.attention.wq.weight"
    assert (
        source.stored_as(name)
        == {4: "F32", 2: "F16" if dtype == torch.float16 else "BF16"}[dtype.itemsize]
    )
    weights = random_weights(TINY)
    for name, shape in weight_shapes(TINY).items():
        assert torch.equal(source.read(name, 0, 0, shape[0]), weights[name].to(dtype)), name
    assert_same_logits(
        tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    )


def to_bin(path: Path) -> None:
    """The older files: pickles by other names."""
    for file in sorted(path.glob("*.safetensors")):
        stem = file.stem.replace("model", "pytorch_model")
        torch.save(load_file(file), path / f"{stem}.bin")
        file.unlink()
    index = path / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (path / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def test_tied_weights_may_be_in_the_file_twice(tmp_path):
    """pytorch_model.bin holds lm_head beside the embedding; transformers ignores it."""
    args = args_of({"tied_embeddings": True})
    theirs = peer(args)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(dict(theirs.state_dict()), tmp_path / "pytorch_model.bin")
    assert "lm_head.weight" in torch.load(tmp_path / "pytorch_model.bin")
    assert_same_logits(tmp_path, theirs)


def test_frequencies_in_old_files_are_ignored(tmp_path):
    theirs = peer()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(load_file(file) | old, file)
    assert_same_logits(tmp_path, theirs)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "old",
    [
        {},
        {"rope_theta": 500000},
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}},
        {"rope_scaling": {"rope_type": "default"}},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_older_spellings_of_rope_are_understood_as_transformers_does(tmp_path, old):
    peer().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", drop=["rope_parameters"], **old)
    assert_same_logits(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_keys_and_values_of_published_configs(tmp_path):
    """unsloth's, decapoda's, Gradient's; those of generation are of the first Llama 2."""
    peer().save_pretrained(tmp_path)
    edit_json(
        tmp_path / "config.json", drop=["rope_parameters"], rope_theta=3580165449.0,
        unsloth_fixed=True, unsloth_version="2024.9", max_sequence_length=2048,
        max_length=4096, do_sample=False, temperature=1.0, top_p=1.0, pruned_heads={},
        _flash_attn_2_enabled=False,
    )  # fmt: skip
    assert_same_logits(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path))


def mistral(path, **config) -> MistralForCausalLM:
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=16, head_dim=8, initializer_range=0.2, **config,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(path)
    return model


def test_a_mistral_without_a_sliding_window_is_a_llama(tmp_path):
    theirs = mistral(tmp_path, sliding_window=None, num_key_value_heads=4)
    assert_same_logits(tmp_path, theirs)


def test_what_a_mistrals_config_leaves_out_is_not_what_a_llamas_does(tmp_path):
    theirs = mistral(tmp_path, sliding_window=None)
    edit_json(tmp_path / "config.json", drop=["num_key_value_heads"])
    assert checkpoint.open(tmp_path).args.n_kv_heads == theirs.config.num_key_value_heads == 8
    edit_json(tmp_path / "config.json", drop=["sliding_window"])
    assert checkpoint.open(tmp_path).args.sliding_window == 4096


def test_defaults_are_transformers(tmp_path):
    """A config that says as little as it may."""
    theirs = peer(replace(TINY, n_kv_heads=8, norm_eps=1e-6, rope_theta=10000.0))
    theirs.save_pretrained(tmp_path)
    keep = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "vocab_size"}  # fmt: skip
    config = tmp_path / "config.json"
    edit_json(config, drop=json.loads(config.read_text()).keys() - keep)
    assert_same_logits(tmp_path, theirs)
    edit_json(config, num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6)
    assert_same_logits(tmp_path, theirs)


@pytest.mark.parametrize("head_dim, heads", [(8, 2), (8, 8), (16, 1), (64, 3), (2, 4)])
@pytest.mark.parametrize("columns", [(), (5,)])
def test_interleave_and_split_halves_are_inverses(head_dim, heads, columns):
    rows = torch.arange(heads * head_dim * math.prod(columns)).view(heads * head_dim, *columns)
    there, back = split_halves(rows, head_dim), interleave(rows, head_dim)
    assert torch.equal(interleave(there, head_dim), rows)
    assert torch.equal(split_halves(back, head_dim), rows)
    if head_dim > 2:
        assert not torch.equal(there, rows) and there.shape == rows.shape
    # Row i of a half and row i of the other are neighbours, and no row leaves its head.
    for head in range(heads):
        for i in range(head_dim // 2):
            a, b = head * head_dim + i, head * head_dim + head_dim // 2 + i
            assert torch.equal(back[head * head_dim + 2 * i], rows[a])
            assert torch.equal(back[head * head_dim + 2 * i + 1], rows[b])


@pytest.mark.parametrize("name", ["wq", "wk", "wv"])
def test_parts_of_a_head_are_read_as_of_the_whole(tmp_path, name):
    """q and k have their own numbers of heads; rows and columns asked for may cut one."""
    peer().save_pretrained(tmp_path)
    source, name = checkpoint.open(tmp_path), f"layers.0.attention.{name}.weight"
    whole = random_weights(TINY)[name]
    for axis, start, stop in ((0, 0, 8), (0, 3, 4), (0, 5, 15), (0, 8, 16), (1, 3, 21)):
        expected = whole.narrow(axis, start, stop - start)
        assert torch.equal(source.read(name, axis, start, stop), expected)


def test_names_are_translated_both_ways():
    for name in weight_shapes(TINY):
        assert HF.meta(HF.theirs(name)) == name != HF.theirs(name)
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.rotary.weight", "x"):
        assert HF.meta(name) == name
    assert HF.meta("layers.0.attention.wq.weight") not in weight_shapes(TINY)


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"attention_bias": "yes"}, "attention_bias='yes'"),
        ({"mlp_bias": 1}, "mlp_bias=1"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 0.0}}, "factor=0.0"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor=None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": math.inf}}, "factor=inf"),
        ({"rope_parameters": {"rope_type": "default", "beta_fast": 1}}, "beta_fast"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, "rope_parameters=[1]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradicts"),
        ({"rope_parameters": None, "rope_theta": 0}, "rope_theta=0"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quant_method='mlx'"),
        ({"logit_scale": 0.0625}, "logit_scale"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads={'1': [0]}"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
        ({"architectures": None, "model_type": "qwen2"}, "model_type='qwen2'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"hidden_size": 64.0}, "hidden_size=64.0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_cannot_be_honoured_is_named(tmp_path, keys, named):
    peer().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **keys)
    with pytest.raises(ValueError) as caught:
        checkpoint.open(tmp_path)
    assert named in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


# --- what transformers reads ---------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 100_000])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_what_is_written_is_what_transformers_loads(tmp_path, shape, max_shard_bytes):
    args, path = args_of(shape), tmp_path / "hf"
    weights = random_weights(args)
    huggingface.write(InMemory(args, weights), path, max_shard_bytes=max_shard_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, report = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, attn_implementation="eager"
        )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        tokens = ids(2, 90)
        assert torch.equal(theirs(tokens).logits, peer(args)(tokens).logits)
    assert checkpoint.open(path).args == args
    found = load(path).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    files = sorted(path.glob("*.safetensors"))
    assert all(file.stat().st_size <= max(max_shard_bytes, 140_000) for file in files)
    if max_shard_bytes == 100_000:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        held = {name: file.name for file in files for name in load_file(file)}
        assert index["weight_map"] == held and len(files) > 2
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    else:
        assert [file.name for file in files] == ["model.safetensors"]
    edit_json(path / "config.json", drop=["rope_parameters"])  # as transformers before 5 reads it
    assert checkpoint.open(path).args == args


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_written_dtype(tmp_path, dtype):
    huggingface.write(InMemory(TINY, random_weights(TINY)), tmp_path / "hf", dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert_same_logits(tmp_path / "hf", theirs)


def test_written_tokenizer_is_what_auto_tokenizer_loads(tmp_path):
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path / "tokenizer.model"))
    source = InMemory(TINY, random_weights(TINY))
    path = huggingface.write(source, tmp_path / "hf", tokenizer=tokenizer)
    theirs, ours = AutoTokenizer.from_pretrained(path), Tokenizer(path / "tokenizer.json")
    for text in ("Hello, world!", "naïve 你好\n\n  x", "<|eot_id|>", ""):
        assert theirs(text).input_ids == ours.encode(
            text, bos=True, eos=False, allowed_special="all"
        )
    config = AutoModelForCausalLM.from_pretrained(path).generation_config
    assert config.bos_token_id == 256 and set(config.eos_token_id) == tokenizer.stop_tokens
    llama = Llama.build(path, device="cpu", dtype="fp32")
    assert len(llama.generate(PROMPTS, 4, temperature=0)[0]) == 2


# --- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 400_000])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_of_four_reads_its_part_only(tmp_path, max_shard_bytes, tied):
    """By the count of the operating system, of bytes that the process asked it for."""
    args = replace(TINY, dim=256, hidden_dim=512, n_kv_heads=4, tied_embeddings=tied)
    path = tmp_path / "hf"
    huggingface.write(InMemory(args, random_weights(args)), path, max_shard_bytes=max_shard_bytes)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    source = checkpoint.open(path)
    for rank in range(4):
        mapped_bytes, before = 0, read_so_far()
        with pytest.MonkeyPatch.context() as patch:

            def count(path, offset, nbytes, original=mapped.map_bytes):
                nonlocal mapped_bytes
                mapped_bytes += nbytes
                return original(path, offset, nbytes)

            patch.setattr(mapped, "map_bytes", count)
            shards = [checkpoint.read_shard(source, n, rank, 4) for n in weight_shapes(args)]
        share = (mapped_bytes + read_so_far() - before) / size
        assert sum(shard.nbytes for shard in shards) / size <= share <= 0.26


def read_so_far() -> int:
    """Bytes that this process has got from read calls; mapped files aren't among them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize("axis, start, stop", [(1, 10, 50), (1, 32, 96), (1, 0, 96), (0, 3, 9)])
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_a_slice_is_a_slice_of_the_whole(tmp_path, axis, start, stop, kind):
    source, name = InMemory(TINY, random_weights(TINY)), "layers.1.feed_forward.w2.weight"
    path = gguf.write(source, tmp_path / "a.gguf", kind)
    opened = checkpoint.open(path)
    whole = opened.read(name, 0, 0, 64)
    found = opened.read(name, axis, start, stop)
    assert torch.equal(found, whole.narrow(axis, start, stop - start))


def test_two_ranks_give_the_tokens_of_one(tmp_path):
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path / "tokenizer.model"))
    source = InMemory(TINY, random_weights(TINY))
    path = huggingface.write(source, tmp_path / "hf", tokenizer=tokenizer, max_shard_bytes=100_000)
    one = Llama.build(path, device="cpu", dtype="fp32")
    expected, _ = one.generate(PROMPTS, 12, temperature=0, stop_tokens=set())
    report = run_ranks(2, "generate", tmp_path / "out", ckpt=str(path), prompts=PROMPTS,
                       max_gen_len=12)  # fmt: skip
    stop = one.tokenizer.stop_tokens
    cut = [row[: next((i for i, t in enumerate(row) if t in stop), 99)] for row in expected]
    assert report["tokens"] == cut


# --- what is broken ------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle ran code')",))


def header_of(file: Path) -> dict:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def reheader(file: Path, header, name=None, **changed) -> None:
    """Put another header before the same data; `changed` are keys of one tensor's."""
    data = file.read_bytes()
    if name is not None:
        header[name] |= changed
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    rest = data[8 + struct.unpack("<Q", data[:8])[0] :]
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + rest)


def broken(path: Path) -> dict:
    """Ways to break a checkpoint of several shards, and what the error must name."""
    files = sorted(path.glob("*.safetensors")) or [path]
    first, index, config = (
        files[0], path / "model.safetensors.index.json", path / "config.json",
    )  # fmt: skip
    embed, norm = "model.embed_tokens.weight", "model.norm.weight"

    def point_to(name):
        weight_map = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=weight_map | {embed: name})

    def change(**tensors):
        file = next(f for f in files if next(iter(tensors)) in load_file(f))
        save_file(load_file(file) | tensors, file)

    def drop():
        file = next(f for f in files if norm in load_file(f))
        save_file({k: v for k, v in load_file(file).items() if k != norm}, file)

    def header(**changed):
        reheader(first, header_of(first), embed, **changed)

    def twice():
        raw = json.dumps({embed: header_of(first)[embed]})
        reheader(first, (raw[:-1] + "," + raw[1:]).encode())

    def pickled(value, save=torch.save):
        index.unlink()
        for file in files:
            file.unlink()
        save(value, path / "pytorch_model.bin")

    def bare_pickle(value, file):
        file.write_bytes(pickle.dumps(value, protocol=2))

    return {
        "points outside": (lambda: point_to("../model.safetensors"), "'../model.safetensors'"),
        "points to the root": (lambda: point_to("/etc/x.safetensors"), "/etc/x.safetensors"),
        "points to a pickle": (lambda: point_to("x.bin"), "'x.bin'"),
        "missing shard": (first.unlink, f"{first.name}, which is missing"),
        "extra shard": (
            lambda: (path / "model-00009-of-00009.safetensors").write_bytes(first.read_bytes()),
            "doesn't know model-00009-of-00009",
        ),
        "no index": (index.unlink, "no model.safetensors"),
        "index without a map": (lambda: edit_json(index, weight_map=[]), "has no weight_map"),
        "index with a key twice": (
            lambda: index.write_text('{"weight_map": {}, "weight_map": {}}'),
            "'weight_map' comes twice",
        ),
        "in two shards": (lambda: change(**{norm: torch.ones(64), embed: torch.ones(512, 64)}),
                          "tok_embeddings.weight is both in"),
        "header beyond the end": (
            lambda: first.write_bytes(struct.pack("<Q", 10**7) + first.read_bytes()[8:]),
            "its header says 10000000",
        ),
        "header of 2^64 - 1": (
            lambda: first.write_bytes(b"\xff" * 8 + first.read_bytes()[8:]),
            "its header says 18446744073709551615",
        ),
        "header no JSON": (lambda: reheader(first, b"{"), "is damaged"),
        "header no object": (lambda: reheader(first, b"[1]"), "is damaged"),
        "header nested deeply": (lambda: reheader(first, b"[" * 100_000), "is damaged"),
        "empty": (lambda: first.write_bytes(b""), "is cut off"),
        "truncated": (lambda: first.write_bytes(first.read_bytes()[:-100]), "its tensors end at"),
        "bytes too many": (
            lambda: first.write_bytes(first.read_bytes() + b"x"), "its tensors end at",
        ),
        "negative offset": (lambda: header(data_offsets=[-4, 131068]), embed),
        "overlapping offsets": (lambda: header(data_offsets=[0, 131076]), embed),
        "offset no integer": (lambda: header(data_offsets=[0.0, 131072.0]), embed),
        "offsets beyond the end": (lambda: header(data_offsets=[10**9, 10**9 + 131072]), embed),
        "name twice": (twice, f"it holds {embed} twice"),
        "integers": (lambda: header(dtype="I32"), "int32: not a float; unsupported. Quantized wei"),
        "unknown dtype": (lambda: header(dtype=["F32"]), "is damaged"),
        "shape no list": (lambda: header(shape=5), "is damaged"),
        "negative shape": (lambda: header(shape=[-512, -64]), f"{embed} has the shape"),
        "wrong shape": (lambda: header(shape=[64, 512]), "tok_embeddings.weight has the shape"),
        "one dimension": (lambda: header(shape=[512 * 64]), "tok_embeddings.weight has the shape"),
        "lacks a weight": (drop, "lacks norm.weight"),
        "unknown weight": (
            lambda: change(**{norm: torch.ones(64), "model.layers.0.self_attn.q_proj.bias":
                              torch.ones(64)}),
            "no place for: model.layers.0.self_attn.q_proj.bias",
        ),
        "Meta's names": (
            lambda: change(**{norm: torch.ones(64), "layers.0.attention.wq.weight":
                              torch.ones(64, 64)}),
            "no place for: layers.0.attention.wq.weight (Meta's name)",
        ),
        "config no JSON": (lambda: config.write_text("{"), "config.json isn't usable JSON"),
        "config no text": (lambda: config.write_bytes(b"\xff\xfe{"), "isn't usable JSON"),
        "config no object": (lambda: config.write_text("[]"), "config.json holds a list"),
        "config nested deeply": (lambda: config.write_text("[" * 100_000), "isn't usable JSON"),
        "another width": (lambda: edit_json(config, hidden_size=128), "has the shape"),
        "a layer more": (lambda: edit_json(config, num_hidden_layers=3), "lacks layers.2."),
        "pickle runs code": (lambda: pickled(Evil(), bare_pickle), "pytorch_model.bin isn't a"),
        "pickle runs code in a zip": (lambda: pickled({"x": Evil()}), "pytorch_model.bin isn't a"),
        "pickled integers": (lambda: pickled({embed: torch.ones(2, 2, dtype=torch.int64)}),
                             f"{embed} has the dtype torch.int64"),
        "pickle of old": (
            lambda: pickled({embed: torch.ones(2, 2)},
                            partial(torch.save, _use_new_zipfile_serialization=False)),
            "files of torch before 1.6",
        ),
        "pickled numbers for names": (lambda: pickled({1: torch.ones(2)}), "1 is a Tensor"),
        "pickled list": (lambda: pickled([1]), "pytorch_model.bin holds a list"),
    }  # fmt: skip


@pytest.mark.parametrize("way", broken(Path()))
def test_broken_checkpoints_are_one_clear_error(tmp_path, way):
    path = tmp_path / "hf"
    huggingface.write(InMemory(TINY, random_weights(TINY)), path, max_shard_bytes=140_000)
    damage, named = broken(path)[way]
    damage()
    with pytest.raises(ValueError) as caught:
        checkpoint.check_shapes(checkpoint.open(path))
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_numbers_are_warned_of(value, dtype):
    parallel.initialize(device="cpu")
    weights = random_weights(TINY, dtype=dtype)
    weights["layers.1.attention.wv.weight"][3, 5] = value
    with pytest.warns(UserWarning) as caught:
        checkpoint.load(InMemory(TINY, weights), Transformer(TINY, device="meta"))
    assert [str(w.message) for w in caught] == [
        "(memory): layers.1.attention.wv.weight holds NaN or infinity"
    ]


def test_large_weights_are_not_warned_of():
    """Whose sum overflows, while each is a number."""
    parallel.initialize(device="cpu")
    weights = {name: w.half() * 0 + 6e4 for name, w in random_weights(TINY).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load(InMemory(TINY, weights), Transformer(TINY, device="meta"))


# --- mutations -----------------------------------------------------------------------------------

SMALL = replace(TINY, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=24, hidden_dim=32,
                use_scaled_rope=True, rope_theta=500000.0, head_dim=8)  # fmt: skip
EXTREMES = [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
WORDS = [b"0", b"-1", b"1e400", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"9" * 30, b"2.5"]


def mutate(data: bytes, rng: random.Random, ends: int) -> bytes:
    """One to three changes, most of them among the first `ends` bytes, some among the last."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not out:
            break
        near = min(ends, len(out))
        early, late = rng.randrange(near), len(out) - 1 - rng.randrange(near)
        at = rng.choice([early, early, late, rng.randrange(len(out))])
        way = rng.randrange(7) if rng.random() < 0.6 else 7 + (data[:1] != b"{")
        if way == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            out[at] = rng.randrange(256)
        elif way == 2:
            del out[at:]
        elif way == 3:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
        elif way == 4:
            del out[at : at + rng.randint(1, 16)]
        elif way == 5:
            size = rng.choice([1, 4, 8])
            value = rng.choice(EXTREMES) % (1 << 8 * size)
            out[at : at + size] = value.to_bytes(size, "little")
        elif way == 6:
            out[at:at] = out[at : at + rng.randint(1, 64)]
        elif way == 8:  # a number that says how many or how large
            sizes = [i for i in range(near) if out[i] in (1, 2, 8, 16, 24, 32)] or [0]
            at, size = rng.choice(sizes), rng.choice([1, 1, 4, 8])
            out[at : at + size] = (rng.choice(EXTREMES) % (1 << 8 * size)).to_bytes(size, "little")
        else:  # a value of JSON
            end = next((i for i in range(at, len(out)) if out[i] in b",}] \n"), at)
            begin = next((i for i in range(end - 1, 0, -1) if out[i] in b":[ ,"), end)
            out[begin + 1 : end] = rng.choice(WORDS)
    return bytes(out)


@pytest.mark.parametrize("kind", ["hf", "bin", "meta", "gguf"])
def test_mutated_files_load_or_are_one_error(tmp_path, kind):
    """Damaged bytes end as a ValueError or load as other numbers; never another way, nor slowly."""
    source, path = InMemory(SMALL, random_weights(SMALL)), tmp_path / "ckpt"
    if kind == "meta":
        write_checkpoint(path, SMALL)
        (path / "tokenizer.model").unlink()
    elif kind == "gguf":
        path.mkdir()
        gguf.write(source, path / "model.gguf")
    else:
        huggingface.write(source, path, max_shard_bytes=2000)
        if kind == "bin":
            to_bin(path)
    originals = {file: file.read_bytes() for file in sorted(path.iterdir())}
    load(path)
    rng, refused, messages = random.Random(0), 0, set()
    cases = 300 if kind == "bin" else 600
    for case in range(cases):
        texts = [file for file in originals if file.suffix == ".json"]
        file = rng.choice(texts if texts and rng.random() < 0.5 else list(originals))
        file.write_bytes(mutate(originals[file], rng, ends=2500))
        start = time.thread_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(path)
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                messages.add(str(error)[len(str(path)) :][:60])
                assert str(path) in str(error), (case, error)
                assert len(str(error)) < 2000
        assert time.thread_time() - start < 60, case
        file.write_bytes(originals[file])
    load(path)
    assert cases / 4 < refused < cases and len(messages) > 10
