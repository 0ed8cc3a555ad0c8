"""Any format to any other: weights to the bit, tokenizers to the id, the same text from peers."""

import http.client
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import List, Sequence
from urllib.parse import urlparse

import gguf
import pytest
import tokenizers
import torch
import xllamacpp
from conftest import ROOT, THOROUGH, TINY, random_weights, shared, write_byte_tokenizer
from test_tokenizer import glued_tokens, random_texts
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llama import Llama, ModelArgs, Tokenizer, checkpoint
from llama.checkpoint import InMemory, meta, weight_shapes
from llama.checkpoint import convert as conversion
from llama.checkpoint.convert import check_equal, convert, describe
from llama.families.names import GGUF
from llama.model import rope_frequencies
from llama.text.vocabulary.writing import write_for_hugging_face

FORMATS = {
    "meta": ("meta", {}),
    "meta of 3": ("meta", {"model_parallel_size": 3}),
    "hf": ("hf", {"max_shard_bytes": 100_000}),
    "gguf": ("gguf", {}),
}
# What 3 shards can hold; the vocabulary of 512 is filled up with 4 tokens that nothing means.
THREE = ModelArgs(
    dim=48, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=516, hidden_dim=96, rope_theta=10000.0
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def to(source, path: Path, name: str, **options) -> Path:
    kind, more = FORMATS[name]
    return convert(source, path, kind, quiet=True, **{**more, **options})


def weights_of(path) -> dict:
    source = checkpoint.open(path)
    checkpoint.check_shapes(source)
    shapes = weight_shapes(source.args)
    return {name: source.read(name, 0, 0, shape[0]).clone() for name, shape in shapes.items()}


def assert_same_weights(path, expected) -> None:
    found = weights_of(path)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


def shape_of(args: ModelArgs) -> dict:
    """What matters of a shape, without the two ways to say how wide the feed-forward layer is."""
    said = {"multiple_of", "ffn_dim_multiplier", "max_seq_len", "max_batch_size"}
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in said}


def assert_same_tokenizer(a: Tokenizer, b: Tokenizer, texts: Sequence[str]) -> None:
    for text in texts:
        assert a.encode(text, bos=False, eos=False) == b.encode(text, bos=False, eos=False), text
        named = a.encode(text, bos=False, eos=False, allowed_special="all")
        assert named == b.encode(text, bos=False, eos=False, allowed_special="all"), text
    for what in ("special_tokens", "bos_id", "eos_id", "pad_id", "stop_tokens", "add_bos",
                 "chat_template"):  # fmt: skip
        assert getattr(a, what) == getattr(b, what), what
    assert a.decode(range(a.n_words)) == b.decode(range(a.n_words))


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE of 512 tokens with a chat template, as the `tokenizers` package makes it."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    tokenizer.save(str(path))
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": TEMPLATE}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    return path


# --- the square ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def square(tmp_path_factory, small_tokenizer):
    """One random model in each of the formats."""
    root, source = tmp_path_factory.mktemp("square"), InMemory(THREE, random_weights(THREE))
    return {name: to(source, root / name, name, tokenizer_path=small_tokenizer) for name in FORMATS}


@pytest.mark.parametrize("a, b", [*permutations(FORMATS, 2)])
def test_every_format_becomes_every_other(square, small_tokenizer, tmp_path, a, b):
    path = to(square[a], tmp_path / "out", b, verify=True)
    assert_same_weights(path, random_weights(THREE))
    assert shape_of(checkpoint.open(path).args) == shape_of(THREE)
    before, after = (Tokenizer(checkpoint.open(p).tokenizer_path) for p in (square[a], path))
    assert_same_tokenizer(Tokenizer(small_tokenizer), after, random_texts(1, 60))
    assert before.chat_template == after.chat_template == TEMPLATE
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert describe(checkpoint.open(path)).bytes == {
        "F32": sum(w.nbytes for w in random_weights(THREE).values())
    }


# --- every shape of the family -------------------------------------------------------------------

# Real numbers of heads; few, narrow layers. 3.1 and 3.2 with the frequencies of 64-wide heads.
FAMILY = {
    "1 7B": dict(n_heads=32, n_kv_heads=32, rope_theta=10000.0, norm_eps=1e-6),
    "2 70B": dict(n_heads=64, n_kv_heads=8, rope_theta=10000.0),
    "3 8B": dict(n_heads=32, n_kv_heads=8),
    "3.1 405B": dict(n_heads=128, n_kv_heads=8, use_scaled_rope=True),
    "3.2 1B": dict(n_heads=32, n_kv_heads=8, tied_embeddings=True, use_scaled_rope=True,
                   rope_scaling_factor=32.0, head_dim=64),
    "3.2 3B": dict(n_heads=24, n_kv_heads=8, tied_embeddings=True, use_scaled_rope=True,
                   rope_scaling_factor=32.0, head_dim=128),
    "scaled unusually": dict(n_heads=8, n_kv_heads=8, head_dim=64, use_scaled_rope=True,
                             rope_low_freq_factor=1.5, rope_high_freq_factor=3.0,
                             rope_original_max_seq_len=4096),
    "narrow heads": dict(n_heads=8, n_kv_heads=2, head_dim=16, rope_linear_factor=2.5),
}  # fmt: skip


def family(name: str) -> ModelArgs:
    base = dict(n_layers=1, vocab_size=512, hidden_dim=224, dim=8 * FAMILY[name]["n_heads"])
    base["dim"] = 64 if "head_dim" in FAMILY[name] else base["dim"]
    return ModelArgs(**(base | FAMILY[name]))


@pytest.mark.parametrize(
    "name, mp",
    [(name, mp) for name in FAMILY for mp in (1, 2, 4, 8, 16) if mp < 16 or name == "3.1 405B"],
)
def test_family_survives_the_way_there_and_back(tmp_path, name, mp):
    args = family(name)
    weights = random_weights(args, dtype=torch.bfloat16)
    path = meta.write(InMemory(args, weights), tmp_path / "meta", mp)
    if name == "1 7B":  # whose files leave it to the code
        file = path / "params.json"
        params = json.loads(file.read_text()) | {"vocab_size": -1}
        del params["rope_theta"]
        file.write_text(json.dumps(params))
    assert shape_of(checkpoint.open(path).args) == shape_of(args)
    for between in ("hf", "gguf"):
        to(path, tmp_path / between, between)
        assert shape_of(checkpoint.open(tmp_path / between).args) == shape_of(args)
        back = to(tmp_path / between, tmp_path / f"{between} and back", "meta",
                  model_parallel_size=mp, dtype=torch.bfloat16)  # fmt: skip
        assert len(list(back.glob("*.pth"))) == mp
        assert_same_weights(back, weights)
        assert shape_of(checkpoint.open(back).args) == shape_of(args)
        for file in path.glob("*.pth"):
            ours, first = torch.load(back / file.name), torch.load(file)
            assert ours.keys() == first.keys()
            assert all(torch.equal(ours[key], first[key]) for key in first)


def test_gguf_holds_the_factors_of_scaled_rope(tmp_path):
    args = family("3.2 1B")
    to(InMemory(args, random_weights(args)), tmp_path / "m.gguf", "gguf")
    (found,) = (t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "rope" in t.name)
    plain = rope_frequencies(replace(args, use_scaled_rope=False))
    assert torch.equal(torch.tensor(found.data), plain / rope_frequencies(args))


def test_the_context_is_carried(tmp_path):
    args = replace(TINY, max_seq_len=1234)
    hf = to(InMemory(args, random_weights(args)), tmp_path / "hf", "hf")
    path = to(hf, tmp_path / "m.gguf", "gguf")
    again = to(path, tmp_path / "again", "hf")
    assert json.loads((again / "config.json").read_text())["max_position_embeddings"] == 1234
    assert gguf.GGUFReader(path).fields["llama.context_length"].contents() == 1234
    for changes, context in (
        ({"use_scaled_rope": True}, 131072),
        ({}, 8192),
        ({"rope_theta": 1e6}, 16384),
        ({"rope_theta": 1e4}, 4096),
        ({"rope_theta": 1e4, "norm_eps": 1e-6}, 2048),
    ):
        args = replace(TINY, **changes)
        path = meta.write(InMemory(args, random_weights(args)), tmp_path / "meta", force=True)
        assert checkpoint.open(path).args.max_seq_len == context


def test_tied_weights_have_both_names_and_one_place_in_metas_files(tmp_path):
    args = family("3.2 1B")
    weights = random_weights(args)
    path = meta.write(InMemory(args, weights), tmp_path / "meta", 2)
    for i, part in enumerate(weights["tok_embeddings.weight"].chunk(2)):
        file = path / f"consolidated.0{i}.pth"
        shard = torch.load(file)
        assert torch.equal(shard["output.weight"], part)
        assert torch.equal(shard["tok_embeddings.weight"], part)
        total = sum(w.nbytes for name, w in shard.items() if name != "output.weight")
        assert total < file.stat().st_size < total + 20_000
    assert checkpoint.open(path).args.tied_embeddings
    for i in range(2):  # the same values in two places are a model with an output layer of its own
        file = path / f"consolidated.0{i}.pth"
        torch.save({name: w.clone() for name, w in torch.load(file).items()}, file)
    assert not checkpoint.open(path).args.tied_embeddings
    assert_same_weights(path, weights | {"output.weight": weights["tok_embeddings.weight"]})


# --- the demo model, and what peers make of it ---------------------------------------------------


RING = ("meta of 3", "hf", "gguf", "meta")
LAYERS = 30 if THOROUGH else 6  # of its 30


@pytest.fixture(scope="module")
def demo(smollm2_path) -> InMemory:
    """The demo model, fp32, of fewer layers."""
    whole = checkpoint.open(smollm2_path)
    args = replace(whole.args, n_layers=LAYERS)
    weights = {name: whole.read(name, 0, 0, s[0]) for name, s in weight_shapes(args).items()}
    return InMemory(args, weights, smollm2_path, whole.tokenizer_path)


@pytest.fixture(scope="module")
def ring(demo):
    """It, from each format to the next."""

    def make(root):
        root.mkdir()
        source = demo
        for name in RING:
            options = {"max_shard_bytes": 100_000_000} if name == "hf" else {}
            source = to(source, root / name, name, **options)

    root = shared("ring", make)
    return {name: root / name for name in RING}


class LlamaCpp:
    """llama.cpp's server, run in this process by its Python package, on one thread."""

    def __init__(self, path: Path, slots: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.kv_unified = 64 * slots, slots, False
        params.warmup, params.verbosity = False, 0
        # Threads wait for each other by spinning: on a busy machine a second one is no help.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.slots, self.server = slots, xllamacpp.Server(params)

    def greedy(self, prompts: Sequence[Sequence[int]], n: int) -> List[List[int]]:
        def one(prompt):
            connection = http.client.HTTPConnection(urlparse(self.server.listening_address).netloc)
            body = {"prompt": list(prompt), "temperature": 0, "n_predict": n,
                    "cache_prompt": False, "return_tokens": True}  # fmt: skip
            connection.request("POST", "/completion", json.dumps(body))
            return json.loads(connection.getresponse().read())["tokens"]

        with ThreadPoolExecutor(self.slots) as threads:
            return list(threads.map(one, prompts))


def windows(llama: Llama) -> List[List[int]]:
    """4 prompts of 32 tokens, or 8 in `make soak`."""
    text = (ROOT / "LICENSE").read_text()
    ids = llama.tokenizer.encode(text, bos=False, eos=False)
    return [ids[9 * i : 9 * i + 32] for i in range(8 if THOROUGH else 4)]


def test_the_demo_model_goes_round_the_formats_and_back(ring, demo, tmp_path):
    """Bit-exact: round the ring, and back, so that each is written from two others.

    The small model goes from each to each: test_every_format_becomes_every_other.
    """
    for path in ring.values():
        check_equal(demo, checkpoint.open(path), quiet=True)
    for b, a in pairwise([*ring, next(iter(ring))]):
        path = to(ring[a], tmp_path / "out", b)
        written = checkpoint.open(path)
        check_equal(demo, written, quiet=True)
        assert shape_of(written.args) == shape_of(demo.args)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_three_implementations_give_the_same_text(smollm2_hf, smollm2_transformers, tmp_path):
    """Ours from Hugging Face's files, transformers from the same, llama.cpp from GGUF; fp32."""
    ours = Llama.build(smollm2_hf, device="cpu", dtype="fp32", max_batch_size=8, max_seq_len=64)
    prompts = windows(ours)
    expected, _ = ours.generate(prompts, 16, temperature=0, stop_tokens=set())
    ids = torch.tensor(prompts)
    found = smollm2_transformers.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert found[:, 32:].tolist() == expected
    peer = LlamaCpp(to(smollm2_hf, tmp_path / "m.gguf", "gguf"), len(prompts))
    for prompt, ids, llama_cpp in zip(prompts, expected, peer.greedy(prompts, 16), strict=True):
        if llama_cpp != ids:  # its sums have another order: it may differ where two are as good
            at = next(i for i, (a, b) in enumerate(zip(ids, llama_cpp, strict=True)) if a != b)
            with torch.inference_mode():
                logits = ours.model(torch.tensor([prompt + ids[:at]]))[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second < 1e-3, (at, best, second)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_1"])
def test_quantized_files_are_ggmls_and_llama_cpp_reads_them(ring, tmp_path, parity, quant):
    path = convert(ring["meta"], tmp_path / "q.gguf", "gguf", quant=quant, quiet=True)
    kind, source = gguf.GGMLQuantizationType[quant.upper()], checkpoint.open(ring["meta"])
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(weight_shapes(source.args))
    for name in ("token_embd", "blk.0.attn_q", f"blk.{LAYERS - 1}.ffn_down", "blk.4.attn_output"):
        tensor = tensors[f"{name}.weight"]
        weight = source.read(GGUF.meta(tensor.name), 0, 0, len(tensor.data))
        ours = gguf.quantize(weight.numpy(), kind)
        assert tensor.tensor_type == kind and (tensor.data == ours).all()
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    prompts = [case["ids"] for case in parity["completions"][:3]]
    model = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=64).model
    for prompt, (token,) in zip(prompts, LlamaCpp(path, 3).greedy(prompts, 1), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt]))[0, -1]
        # llama.cpp also rounds activations to 8 bits, we don't.
        assert logits.max() - logits[token] < 0.5


@pytest.mark.parametrize("quant", ["q4_k_m", "q6_k"])
def test_mixtures_of_k_quants_answer_as_llama_cpp(ring, tmp_path, parity, quant):
    """Rows of 576 values fall back to smaller blocks; w2's of 1536 are K-quants."""
    path = convert(ring["meta"], tmp_path / "q.gguf", "gguf", quant=quant, quiet=True)
    prompts = [case["ids"] for case in parity["completions"][:3]]
    dense = Llama.build(path, device="cpu", dtype="fp32", quantize="dense", max_seq_len=64)
    kernels = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=64, max_batch_size=3)
    ours, _ = kernels.generate(prompts, 1, temperature=0, stop_tokens=set())
    theirs = LlamaCpp(path, 3).greedy(prompts, 1)
    for prompt, tokens in zip(prompts, zip(ours, theirs, strict=True), strict=True):
        with torch.inference_mode():
            logits = dense.model(torch.tensor([prompt]))[0, -1]
        for (token,) in tokens:  # of activations that are rounded to 8 bits, too
            assert logits.max() - logits[token] < 0.5


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_converted_and_kept(tmp_path, name, dtype):
    weights = random_weights(THREE)
    path = to(InMemory(THREE, weights), tmp_path / "a", name, dtype=dtype, verify=True)

    def stored(weight):  # GGUF's norms are always fp32
        return weight if name == "gguf" and weight.ndim == 1 else weight.to(dtype)

    assert_same_weights(path, {key: stored(weight) for key, weight in weights.items()})
    again = to(path, tmp_path / "b", name, verify=True)
    assert_same_weights(again, weights_of(path))


def test_how_a_model_is_to_be_sampled_goes_along(tmp_path):
    """transformers and vLLM take it from generation_config.json; the ends are the tokenizer's."""
    path = to(InMemory(TINY, random_weights(TINY)), tmp_path / "a", "hf")
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
    (path / "generation_config.json").write_text(json.dumps(said))

    def found(name):
        return json.loads((to(path, tmp_path / name, "hf") / "generation_config.json").read_text())

    assert found("b") == said
    tokenizer = Tokenizer(write_byte_tokenizer(path / "tokenizer.model"))
    assert found("c") == said | {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.stop_tokens),
        "pad_token_id": tokenizer.pad_id,
    }


def test_rows_that_are_no_whole_blocks_are_written_as_f16(tmp_path):
    source = InMemory(THREE, random_weights(THREE))  # 48 wide, and 96 in w2
    path = convert(source, tmp_path / "q.gguf", "gguf", quant="q8_0", quiet=True, verify=True)
    opened = checkpoint.open(path)
    assert opened.stored_as("layers.0.feed_forward.w2.weight") == "Q8_0"
    assert opened.stored_as("layers.0.attention.wq.weight") == "F16"
    assert opened.stored_as("norm.weight") == "F32"


@dataclass
class Interrupted(InMemory):
    """A source in the middle of which the user presses Ctrl-C."""

    left: int = 30

    def read(self, name, axis, start, stop):
        self.left -= axis == 0 and stop - start > 1  # more than a look at the dtype
        if self.left < 0:
            raise KeyboardInterrupt
        return super().read(name, axis, start, stop)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_leaves_what_was_there(tmp_path, name, there):
    weights, path, before = random_weights(THREE), tmp_path / "out", None
    if there:
        to(InMemory(THREE, random_weights(THREE, seed=1)), path, "meta")
        before = weights_of(path)
        with pytest.raises(FileExistsError, match="out exists: choose another name"):
            to(InMemory(THREE, weights), path, name)
    for left in (0, 1, 12):
        with pytest.raises(KeyboardInterrupt):
            to(Interrupted(THREE, weights, left=left), path, name, force=there)
        assert [p.name for p in tmp_path.iterdir()] == ["out"] * there
        assert before is None or all(torch.equal(w, before[n]) for n, w in weights_of(path).items())
    to(InMemory(THREE, weights), path, name, force=there)
    assert_same_weights(path, weights)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", FORMATS)
def test_verifying_finds_a_changed_byte(tmp_path, monkeypatch, name):
    """And what was there before stays: nothing unverified gets the name."""
    weights, path = random_weights(THREE), tmp_path / "out"
    some = weights["layers.0.feed_forward.w1.weight"][0, :8].numpy().tobytes()
    to(InMemory(THREE, random_weights(THREE, seed=1)), path, "meta")

    def damaged(source, written, quiet, kept):
        file = written.path
        if file.is_dir():
            files = [p for p in file.iterdir() if p.suffix in (".pth", ".safetensors")]
            file = next(p for p in files if some in p.read_bytes())
        data = bytearray(file.read_bytes())
        data[data.index(some) + 5] ^= 1
        file.write_bytes(data)
        check_equal(source, written, quiet, kept)

    monkeypatch.setattr(conversion, "check_equal", damaged)
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.w1\.weight differs"):
        to(InMemory(THREE, weights), path, name, verify=True, force=True)
    assert_same_weights(path, random_weights(THREE, seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="is the disk full"):
        to(InMemory(THREE, random_weights(THREE)), tmp_path / "meta", "meta")
    assert not [*tmp_path.iterdir()]


def test_force_overwrites_checkpoints_only(tmp_path):
    source = InMemory(THREE, random_weights(THREE))
    path = to(source, tmp_path / "models" / "a", "hf")
    with pytest.raises(FileExistsError, match="has directories in it"):
        to(source, tmp_path / "models", "gguf", force=True)
    notes = tmp_path / "ggufs" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("precious")
    for name in FORMATS:
        with pytest.raises(FileExistsError, match="holds no checkpoint: not overwritten"):
            to(source, notes.parent, name, force=True)
    assert notes.read_text() == "precious" and len([*notes.parent.iterdir()]) == 1
    for place in (path, tmp_path / "models"):
        with pytest.raises(ValueError, match="holds the source itself"):
            to(path, place, "meta", force=True)
    assert_same_weights(path, random_weights(THREE))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("onnx", {}, "format 'onnx': choose one of meta, hf, gguf"),
        ("gguf", {"model_parallel_size": 3}, "model_parallel_size=3 is for Meta's format only"),
        ("hf", {"quant": "q8_0"}, "quant='q8_0' is for GGUF only"),
        ("gguf", {"quant": "q8_0", "dtype": torch.float16}, "takes the place of dtype"),
        ("gguf", {"quant": "q9"}, "'q9' can't be written; choose one of f32"),
        ("gguf", {"dtype": torch.float64}, "'f64' can't be written"),
        ("meta", {"model_parallel_size": 5}, "model_parallel_size 5 doesn't divide n_heads=6"),
        ("meta", {"model_parallel_size": 0}, "model_parallel_size 0"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, kind, options, message):
    with pytest.raises(ValueError) as caught:
        convert(InMemory(THREE, random_weights(THREE)), tmp_path / "out", kind, **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- tokenizers ----------------------------------------------------------------------------------


def test_smollm2s_tokenizer_in_every_file(ring, smollm2_path):
    original = Tokenizer(smollm2_path)
    texts = random_texts(5, 600) + glued_tokens(6, 400, original)
    for path in ring.values():
        assert_same_tokenizer(original, Tokenizer(checkpoint.open(path).tokenizer_path), texts)
    theirs = AutoTokenizer.from_pretrained(ring["hf"])
    for text in texts:
        expected = original.encode(text, bos=False, eos=False, allowed_special="all")
        assert theirs(text).input_ids == expected, text
    dialog = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    ours = Llama.build(ring["hf"], device="cpu", dtype="fp32").formatter
    rendered = theirs.apply_chat_template(dialog[:1], add_generation_prompt=True)
    assert rendered["input_ids"] == ours.encode_dialog_prompt(dialog[:1])


def test_llama_3s_tokenizer_there_and_back(tmp_path, llama3_tokenizer_path):
    args = replace(TINY, dim=16, n_layers=1, n_kv_heads=8, vocab_size=128256)
    source = InMemory(args, random_weights(args))
    first = to(source, tmp_path / "meta", "meta", tokenizer_path=llama3_tokenizer_path)
    original, texts = Tokenizer(llama3_tokenizer_path), random_texts(7, 300)
    expected = [original.encode(text, bos=True, eos=False) for text in texts]
    assert (first / "tokenizer.model").read_bytes() == llama3_tokenizer_path.read_bytes()
    for between in ("hf", "gguf"):
        path = to(first, tmp_path / between, between)
        found = Tokenizer(checkpoint.open(path).tokenizer_path)
        assert [found.encode(text, bos=True, eos=False) for text in texts] == expected
        assert found.special_tokens == original.special_tokens
        assert found.stop_tokens == original.stop_tokens and found.add_bos
        back = to(path, tmp_path / f"{between} and back", "meta")
        assert (back / "tokenizer.model").read_bytes() == llama3_tokenizer_path.read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in texts:
        named = original.encode(text, bos=True, eos=False, allowed_special="all")
        assert theirs(text).input_ids == named, text


def test_a_tokenizer_of_bytes_has_no_merges(tmp_path):
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path / "tokenizer.model"))
    found = Tokenizer(write_for_hugging_face(tokenizer.vocabulary, tmp_path))
    assert_same_tokenizer(tokenizer, found, random_texts(8, 50))


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conversion_needs_little_memory(tmp_path):
    """600 MB in bf16, whose largest tensor is 131 MB."""
    args = ModelArgs(dim=2048, n_layers=3, n_heads=16, n_kv_heads=16, vocab_size=32000,
                     hidden_dim=5504)  # fmt: skip
    zero = torch.zeros((), dtype=torch.bfloat16)
    weights = {name: zero.expand(shape) for name, shape in weight_shapes(args).items()}
    meta.write(InMemory(args, weights), tmp_path / "meta", 2)
    largest = max(weight.numel() * 2 for weight in weights.values())
    code = (
        "import sys, re\nfrom llama.checkpoint.convert import convert\n"
        "for kind in ('hf', 'gguf'):\n"
        "    convert(sys.argv[1], f'{sys.argv[2]}/{kind}', kind, quiet=True)\n"
        "    print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "meta", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind, peak in zip(("hf", "gguf"), map(int, done.stdout.split()), strict=True):
        assert peak * 1024 < largest + 500e6, (kind, peak)
    shutil.rmtree(tmp_path)
