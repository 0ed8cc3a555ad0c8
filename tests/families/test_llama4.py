"""Llama 4 against Meta's reference and transformers, and what doesn't depend on how it is run."""

import base64
import dataclasses
import http.client
import io
import json
from itertools import pairwise
from urllib.parse import urlparse

import pytest
import torch
import xllamacpp
from conftest import random_model, random_weights, run_ranks, write_byte_tokenizer
from llama_models.llama4.args import ModelArgs as MetaArgs
from llama_models.llama4.datatypes import TransformerInput
from llama_models.llama4.model import Transformer as MetaTransformer

from llama import Llama, checkpoint
from llama.backends import adapters, cpu
from llama.backends.cpu.layers import NativeTransformer
from llama.checkpoint import InMemory, gguf, huggingface, meta
from llama.checkpoint.adapter import Adapter, Merged, Pair
from llama.checkpoint.convert import check_equal, convert
from llama.families.llama4 import Llama4Args, Llama4Transformer
from llama.layers.paged import PAGE, PagedRows

SCOUT = Llama4Args(
    dim=64, n_layers=4, n_heads=8, n_kv_heads=4, vocab_size=512, hidden_dim=96, max_seq_len=128,
    num_experts=4, expert_dim=64, nope_layer_interval=4, attention_chunk_size=16,
    use_qk_norm=True, attn_temperature_tuning=True, floor_scale=4, attn_scale=0.3,
    use_scaled_rope=True,
)  # fmt: skip
MAVERICK = dataclasses.replace(
    SCOUT, interleave_moe_layer_step=2, use_qk_norm=False, use_scaled_rope=False, num_experts=8
)
DENSE = dataclasses.replace(
    SCOUT, num_experts=None, expert_dim=None, nope_layer_interval=None, attention_chunk_size=None
)
ALL = {"scout": SCOUT, "maverick": MAVERICK, "dense": DENSE}
PROMPTS = [[1, 2, 3], list(range(40, 80)), [9] * 17]


@pytest.fixture(params=ALL, scope="module")
def args(request) -> Llama4Args:
    return ALL[request.param]


@pytest.fixture(scope="module")
def model(args) -> Llama4Transformer:
    return random_model(args)


@pytest.fixture(scope="module")
def weights(args):
    return random_weights(args)


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 512, (2, 50), generator=generator)


@torch.inference_mode()
def logits(model, tokens):
    return model(tokens)


# --- peers ---------------------------------------------------------------------------------------


def metas(path, monkeypatch) -> MetaTransformer:
    """Meta's own network with the weights of one shard; it wants a GPU for its cache."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    params = json.loads((path / "params.json").read_text())
    model = MetaTransformer(MetaArgs(**params, max_batch_size=2, max_seq_len=64))
    model.load_state_dict(torch.load(path / "consolidated.00.pth"))
    return model


def test_logits_are_metas(args, model, weights, tokens, tmp_path, monkeypatch):
    """From files as we write them. Of one pass its chunks are right, of decoding they aren't."""
    path = meta.write(InMemory(args, weights), tmp_path / "m")
    theirs = metas(path, monkeypatch)(TransformerInput(tokens=tokens, tokens_position=0)).logits
    torch.testing.assert_close(logits(model, tokens), theirs, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def peer(args, weights, tmp_path_factory):
    from transformers import Llama4ForCausalLM

    path = huggingface.write(InMemory(args, weights), tmp_path_factory.mktemp("hf") / "hf")
    return Llama4ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def test_logits_are_transformers(model, peer, tokens):
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_greedy_ids_are_transformers_across_chunks(args, model, peer):
    prompt = torch.arange(20, 30)[None]
    theirs = peer.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    cache, ids = model.new_cache(1), prompt
    new = prompt
    for _ in range(40):
        new = model(new, ids.shape[1] - new.shape[1], cache)[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    assert ids.tolist() == theirs.tolist()


# --- however it is run ---------------------------------------------------------------------------


@torch.inference_mode()
def test_cached_is_uncached_and_rows_of_any_length_are_alone(model, tokens):
    whole = model(tokens)
    cache = model.new_cache(2)
    parts = [model(tokens[:, a:b], a, cache) for a, b in ((0, 7), (7, 31), (31, 32), (32, 50))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)
    cache.truncate([14, 33])  # in different chunks
    part = model(torch.stack([tokens[0, 14:18], tokens[1, 33:37]]), [14, 33], cache)
    torch.testing.assert_close(part[0], whole[0, 14:18], atol=1e-4, rtol=0)
    torch.testing.assert_close(part[1], whole[1, 33:37], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_mask_holds_in_chunks_too(model, tokens):
    """Without their first token, the others are a text that begins later."""
    T = 50
    mask = torch.ones(T, T).tril().bool()
    mask[17:, 16] = False  # the first of the second chunk
    masked, whole = model(tokens, mask=mask), model(tokens)
    torch.testing.assert_close(masked[:, :17], whole[:, :17], atol=1e-5, rtol=0)
    assert not torch.allclose(masked[:, 20], whole[:, 20], atol=1e-3)
    with pytest.raises(ValueError, match="positions"):
        model(tokens, positions=torch.arange(T))


@torch.inference_mode()
def test_tokens_see_what_a_mask_shows_them_of_their_chunk():
    """Later tokens too: each chunk is what it would be alone."""
    model = random_model(dataclasses.replace(SCOUT, n_layers=3))  # all in chunks
    tokens = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(2))

    def all_see_all(tokens):
        return model(tokens, mask=torch.ones(2 * tokens.shape[1:], dtype=torch.bool))

    whole = all_see_all(tokens)
    for chunk, expected in zip(tokens.split(16, 1), whole.split(16, 1), strict=True):
        torch.testing.assert_close(all_see_all(chunk), expected, atol=1e-4, rtol=0)
    assert (whole - model(tokens)).abs().max() > 0.01


def write(path, args, mp=1):
    meta.write(InMemory(args, random_weights(args)), path, mp)
    write_byte_tokenizer(path / "tokenizer.model")
    return path


@pytest.mark.parametrize("name,world", [("scout", 1), ("scout", 4), ("maverick", 2)])
def test_any_number_of_ranks_and_shards_gives_the_same(name, world, tmp_path):
    """The engine, whose cache is in blocks, against each prompt alone on one rank."""
    path = write(tmp_path / "four", ALL[name], mp=4)
    model = random_model(ALL[name])
    if world == 1:
        llama = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=128, max_batch_size=4)
        found, _ = llama.generate(PROMPTS, 16, temperature=0, stop_tokens=set())
    else:
        report = run_ranks(
            world, "generate", tmp_path / "out", ckpt=str(path), prompts=PROMPTS, max_gen_len=16,
            no_stops=True, build={"max_seq_len": 128},
        )  # fmt: skip
        found = report["tokens"]
    for prompt, ids in zip(PROMPTS, found, strict=True):
        expected = [*prompt]
        with torch.inference_mode():
            for _ in range(16):
                expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
        assert ids == expected[len(prompt) :]


@torch.inference_mode()
def test_weights_of_experts_that_no_token_chose_are_not_read(tokens):
    model = random_model(SCOUT)
    few = tokens[:1, :3]
    expected = model(few)
    chosen = []
    for block in model.layers:
        block.feed_forward.router.register_forward_hook(
            lambda module, x, y: chosen.append(set(y.argmax(-1).tolist()))
        )
    model(few)
    for block, used in zip(model.layers, chosen, strict=True):
        for e in set(range(SCOUT.num_experts)) - used:
            for parameter in block.feed_forward.experts[e].parameters():
                parameter.fill_(torch.nan)
    assert any(len(used) < SCOUT.num_experts for used in chosen)
    torch.testing.assert_close(model(few), expected, atol=0, rtol=0)


# --- the CPU kernels -----------------------------------------------------------------------------

NATIVE = dataclasses.replace(
    SCOUT, dim=128, head_dim=32, n_heads=4, n_kv_heads=2, vocab_size=256, hidden_dim=160,
    expert_dim=96, top_k=2, n_layers=4,
    interleave_moe_layer_step=2, attention_chunk_size=187, floor_scale=64.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def native_and_plain():
    return cpu.swap(random_model(NATIVE)), random_model(NATIVE)


@torch.inference_mode()
def test_the_kernels_compute_the_same(native_and_plain):
    """And the same to the bit alone, in pieces, and with other rows."""
    native, plain = native_and_plain
    tokens = torch.randint(0, 256, (2, 600), generator=torch.Generator().manual_seed(1))
    found = native(tokens)
    torch.testing.assert_close(found, plain(tokens), atol=1e-4, rtol=0)
    cuts = [0, 5, 190, 195, 384, 385, 386, 570, 600]
    for rows in (slice(0, 2), slice(1, 2)):
        cache = native.new_cache(rows.stop - rows.start, 600)
        parts = [native(tokens[rows, a:b], a, cache) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts, 1), found[rows])
    assert isinstance(native, Llama4Transformer) and not native.takes_positions
    with pytest.raises(ValueError, match="positions"):
        native(tokens, positions=torch.arange(600))


@torch.inference_mode()
def test_an_adapter_of_a_shared_expert_beside_the_weights_is_the_merged_one():
    weights, prefix = random_weights(NATIVE), "layers.1.feed_forward"
    generator = torch.Generator().manual_seed(5)

    def of(name):
        rows, cols = weights[name].shape
        A, B = (torch.randn(shape, generator=generator) / 8 for shape in ((4, cols), (rows, 4)))
        return Pair(A, B, 1.0)

    names = [f"{prefix}.shared_expert.{matrix}.weight" for matrix in ("w1", "w2", "w3")]
    adapter = Adapter({name: of(name) for name in (*names, "layers.0.attention.wq.weight")})
    beside = cpu.swap(random_model(NATIVE))
    adapters.add(beside, "poet", adapter)
    merged = Merged(InMemory(NATIVE, weights), adapter)
    expected = cpu.swap(checkpoint.load(merged, random_model(NATIVE)))
    tokens = [*range(30)]

    def logits(model, number):
        cache = PagedRows(model.new_cache(4, PAGE), [[1, 2]], [0], [number])
        return model.logits(model.hidden_of_rows([tokens], cache))

    found = logits(beside, 1)
    torch.testing.assert_close(found, logits(expected, 0), atol=1e-4, rtol=0)
    assert (found - logits(beside, 0)).abs().max() > 0.01
    expert = f"{prefix}.experts.0.w1.weight"
    with pytest.raises(ValueError, match="an adapter of experts"):
        adapters.add(beside, "other", Adapter({expert: of(expert)}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_engine_with_the_kernels_gives_what_each_prompt_gives_alone(tmp_path, dtype):
    """With experts as blocks of a GGUF file, and their tokens of several prompts together."""
    path = write(tmp_path / "m", GGUF)
    add_merge(path)
    file = convert(path, tmp_path / "m.gguf", "gguf", quiet=True, quant="q8_0")
    llama = Llama.build(file, device="cpu", dtype=dtype, max_seq_len=128, max_batch_size=4)
    assert isinstance(llama.model, NativeTransformer)
    together, _ = llama.generate(PROMPTS, 16, temperature=0, stop_tokens=set())
    for prompt, ids in zip(PROMPTS, together, strict=True):
        assert llama.generate([prompt], 16, temperature=0, stop_tokens=set())[0] == [ids]


# --- files ---------------------------------------------------------------------------------------


# A shape that llama.cpp takes as it is meant.
GGUF = dataclasses.replace(
    SCOUT, dim=128, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=544, hidden_dim=128,
    expert_dim=128, num_experts=16,
    attention_chunk_size=8192, floor_scale=8192.0, attn_scale=0.1,
)  # fmt: skip


def add_merge(path):
    """Without one there is no vocabulary in a GGUF file."""
    with (path / "tokenizer.model").open("ab") as vocabulary:
        vocabulary.write(base64.b64encode(b"ab") + b" 256\n")


def llama_cpps(path, prompt, n):
    """The ids of ASCII that llama.cpp's server chooses after a prompt, and the logarithms of their
    probabilities among all; on one thread, with a cache in fp32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.kv_unified = 256, 1, False
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    connection = http.client.HTTPConnection(urlparse(server.listening_address).netloc)
    others = [[i, False] for i in range(128, GGUF.vocab_size)]
    body = {"prompt": prompt, "temperature": 0, "n_predict": n, "n_probs": 1, "logit_bias": others}
    connection.request("POST", "/completion", json.dumps(body))
    found = json.loads(connection.getresponse().read())["completion_probabilities"]
    return [one["id"] for one in found], [one["logprob"] for one in found]


@pytest.mark.parametrize("quant,bound", [("f32", 2e-3), ("q8_0", 5e-2)])
def test_gguf_is_read_and_written_as_llama_cpp_does(tmp_path, quant, bound):
    path = write(tmp_path / "m", GGUF)
    add_merge(path)
    kind = {} if quant == "f32" else {"quant": quant}
    file = convert(path, tmp_path / "m.gguf", "gguf", quiet=True, verify=True, **kind)
    llama = Llama.build(file, device="cpu", dtype="fp32", max_seq_len=128, max_batch_size=1)
    prompt = PROMPTS[1]
    ids, expected = llama_cpps(file, prompt, 12)
    inputs = torch.tensor([prompt + ids])
    with torch.inference_mode():
        logprobs = llama.model(inputs)[0, len(prompt) - 1 : -1].log_softmax(-1)
    found = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]
    error = (found - torch.tensor(expected)).abs()
    # It rounds activations where weights are quantized, which can lead to another expert.
    assert len(ids) == 12 and (error.max() if quant == "f32" else error.median()) < bound
    again = convert(file, tmp_path / "again.gguf", "gguf", quiet=True, verify=True, **kind)
    assert quant != "f32" or again.read_bytes()[-(1 << 20) :] == file.read_bytes()[-(1 << 20) :]


def test_a_gguf_file_that_llama_cpp_would_take_for_another_model_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="attention_chunk_size=16: llama.cpp"):
        gguf.write(InMemory(SCOUT, random_weights(SCOUT)), tmp_path / "m.gguf")


def test_experts_are_quantized_when_they_are_loaded(tmp_path):
    """And the same on two ranks, whose shards are whole blocks."""
    args = dataclasses.replace(GGUF, vocab_size=512)
    path = write(tmp_path / "m", args, 2)
    build = {"max_seq_len": 128, "quantize": "int8", "compile": False}
    llama = Llama.build(path, device="cpu", dtype="fp32", **build)
    for m, layer in llama.model.layers[0].feed_forward.experts[3].named_children():
        dense = random_weights(args)[f"layers.0.feed_forward.experts.3.{m}.weight"]
        assert torch.equal(layer.blocks.dense(torch.float32), gguf.as_stored(dense, "Q8_0"))
    expected, _ = llama.generate(PROMPTS, 8, temperature=0, stop_tokens=set())
    report = run_ranks(
        2, "generate", tmp_path / "out", ckpt=str(path), prompts=PROMPTS, max_gen_len=8,
        no_stops=True, build=build,
    )  # fmt: skip
    assert report["tokens"] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_both_ways_is_bit_exact(args, tmp_path, dtype):
    source = InMemory(args, random_weights(args, dtype=dtype))
    meta.write(source, tmp_path / "1")
    convert(tmp_path / "1", tmp_path / "hf", "hf", quiet=True, max_shard_bytes=100_000)
    convert(tmp_path / "hf", tmp_path / "4", "meta", model_parallel_size=4, quiet=True)
    convert(tmp_path / "4", tmp_path / "hf2", "hf", quiet=True)
    for name in ("1", "hf", "4", "hf2"):
        found = checkpoint.open(tmp_path / name)
        check_equal(source, found, quiet=True)
        context = {"max_seq_len": 1}  # params.json doesn't say it
        ours, theirs = (dataclasses.replace(a, **context) for a in (args, found.args))
        formula = {"multiple_of": 1, "ffn_dim_multiplier": None}  # another one for the same widths
        assert dataclasses.replace(ours, **formula) == dataclasses.replace(theirs, **formula)


def test_released_names_are_read(args, weights, tmp_path):
    """As Meta's loader takes them, with what it leaves out, in two shards."""
    path = meta.write(InMemory(args, weights), tmp_path / "m", 2)
    for file in sorted(path.glob("*.pth")):
        shard = torch.load(file)
        for i in range(args.n_layers):
            layer = f"layers.{i}"

            def move(old, new, layer=layer, shard=shard):
                shard[f"{layer}.{new}"] = torch.cat([shard.pop(f"{layer}.{one}") for one in old])

            move([f"attention.{m}.weight" for m in ("wq", "wk", "wv")], "attention.wqkv.weight")
            move(["attention_norm.weight"], "attention.wqkv.layer_norm_weight")
            shard[f"{layer}.attention.wo._extra_state"] = io.BytesIO(b"x")
            if args.has_experts(i):
                move(["ffn_norm.weight"], "feed_forward.norm.weight")
                for m, new in (
                    ("1", "w_in_shared_FD"),
                    ("3", "w_swiglu_FD"),
                    ("2", "w_out_shared_DF"),
                ):
                    move([f"feed_forward.shared_expert.w{m}.weight"], f"feed_forward.{new}.weight")
            else:
                move(["ffn_norm.weight"], "feed_forward.mlp.layer_norm_weight")
                move(
                    ["feed_forward.w1.weight", "feed_forward.w3.weight"],
                    "feed_forward.mlp.fc1_weight",
                )
                move(["feed_forward.w2.weight"], "feed_forward.mlp.fc2_weight")
        shard["vision_embeddings.x.weight"] = torch.zeros(3)
        torch.save(shard, file)
    found = checkpoint.open(path)
    check_equal(InMemory(args, weights), found, quiet=True)
    assert found.left_out == 1


def test_the_text_part_of_a_model_with_vision_is_read(args, weights, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    path = huggingface.write(InMemory(args, weights), tmp_path / "hf")
    text = json.loads((path / "config.json").read_text())
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "intermediate_size": 128, "vision_output_dim": 32,
        "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    config = Llama4Config(text_config=text, vision_config=vision)
    whole = Llama4ForConditionalGeneration(config)
    whole.language_model.load_state_dict(load_file(path / "model.safetensors"))
    whole.save_pretrained(tmp_path / "whole")
    found = checkpoint.open(tmp_path / "whole")
    assert found.left_out == 0 and found.args.vision_layers == 1
    checkpoint.check_shapes(found)
    found.args = dataclasses.replace(found.args, vision_layers=None)
    check_equal(InMemory(args, weights), found, quiet=True)
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    stored["other.weight"] = torch.zeros(1)
    save_file(stored, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for: other\.weight"):
        checkpoint.check_shapes(checkpoint.open(tmp_path / "whole"))
