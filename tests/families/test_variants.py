"""SmolLM3, Granite, Mistral's window, biases, YaRN and dynamic RoPE against transformers."""

import http.client
import json
import random
from dataclasses import replace
from urllib.parse import urlparse

import pytest
import torch
import xllamacpp
from conftest import random_weights, run_ranks, write_byte_tokenizer
from test_model import TOLERANCE, gap, ids
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    SmolLM3Config,
)

from llama import Llama, ModelArgs, Tokenizer, checkpoint
from llama.backends import cpu as native
from llama.backends import offloaded, quantized
from llama.backends.offloaded import Plan
from llama.checkpoint import InMemory, convert, gguf, huggingface, meta
from llama.families.registry import build
from llama.families.trace import trace
from llama.families.variants import VariantTransformer
from llama.layers import parallel
from llama.training import lora

SHAPE = dict(
    vocab_size=514, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128,
    initializer_range=0.15, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4,
}  # fmt: skip
GRANITE = dict(
    embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.11,
    logits_scaling=8.0, initializer_range=0.1,
)  # fmt: skip
CASES = {
    "smollm3": (SmolLM3Config, {}),
    "smollm3, untied, some layers, yarn": (
        SmolLM3Config,
        dict(tie_word_embeddings=False, no_rope_layers=[0, 1, 1, 0], rope_parameters=YARN),
    ),
    "granite": (GraniteConfig, GRANITE),
    "granite, tied, with biases": (
        GraniteConfig, dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **GRANITE)
    ),
    "mistral with a window": (MistralConfig, dict(sliding_window=24)),
    "attention_bias": (LlamaConfig, dict(attention_bias=True)),
    "mlp_bias": (LlamaConfig, dict(mlp_bias=True)),
    "yarn": (LlamaConfig, dict(rope_parameters=YARN)),
    "yarn with all settings": (
        LlamaConfig,
        dict(
            rope_parameters=YARN
            | dict(beta_fast=16.0, beta_slow=2.0, truncate=False, attention_factor=1.3)
        ),
    ),
    "yarn by mscale": (
        LlamaConfig, dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.1))
    ),
    "dynamic": (
        LlamaConfig,
        dict(
            max_position_embeddings=48,
            rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
        ),
    ),
}  # fmt: skip
GGUF_CASES = [
    name for name in CASES
    if name not in ("smollm3, untied, some layers, yarn", "mistral with a window", "dynamic")
    and name != "yarn with all settings"
]  # fmt: skip
LONG = 100  # tokens: beyond the window, the contexts before scaling, and a block of the cache


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By case: transformers' random model, in a directory."""
    found = {}

    def make(case: str):
        if case not in found:
            kind, fields = CASES[case]
            torch.manual_seed(0)
            config = kind(**(SHAPE | fields), attn_implementation="eager")
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    torch.nn.init.normal_(parameter, float("norm" in name), 0.2)
            path = tmp_path_factory.mktemp("variant") / "hf"
            model.save_pretrained(path)
            file = write_byte_tokenizer(path / "tokenizer.model")
            # llama.cpp wants merges: "ab" and "ac".
            file.write_text(file.read_text() + "YWI= 256\nYWM= 257\n")
            found[case] = model, path
        return found[case]

    return make


def load(path) -> VariantTransformer:
    parallel.initialize(device="cpu")
    source = checkpoint.open(path)
    args = replace(source.args, max_seq_len=max(LONG, source.args.max_seq_len))
    return checkpoint.load(source, build(args, device="meta"))


def expected(theirs, tokens):
    with torch.no_grad():
        return theirs(tokens, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_and_their_order_of_work(made, case):
    """transformers' logits; and the same token by token, in chunks, and in rows of any length."""
    theirs, path = made(case)
    model, tokens = load(path), ids(2, LONG)
    assert type(model) is VariantTransformer
    whole = expected(theirs, tokens)
    with torch.no_grad():
        assert gap(model(tokens), whole) <= TOLERANCE
        cache = model.new_cache(2)
        parts, at = [], 0
        for n in (1, 40, 1, 1, 30, 1, LONG - 74):
            parts.append(model(tokens[:, at : at + n], at, cache))
            at += n
        assert gap(torch.cat(parts, 1), whole) <= TOLERANCE
        cache.truncate([60, 7])
        new = torch.stack([tokens[0, 60:62], tokens[1, 7:9]])
        found = model(new, [60, 7], cache)
        assert gap(found[0], whole[0, 60:62]) <= TOLERANCE
        assert gap(found[1], whole[1, 7:9]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_the_same(made, case):
    _, path = made(case)
    model, tokens = load(path), ids(2, LONG)
    fast = native.swap(load(path))
    with torch.no_grad():
        whole, cache = model(tokens), fast.new_cache(2)
        assert gap(fast(tokens), whole) <= TOLERANCE
        parts = [fast(tokens[:, :70], 0, cache), fast(tokens[:, 70:73], 70, cache)]
        parts += [fast(tokens[:, at : at + 1], at, cache) for at in range(73, LONG)]
        assert torch.equal(torch.cat(parts, 1), fast(tokens))


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_are_those_of_transformers_in_any_batch(made, case):
    """Through the engine and its cache in blocks, with the kernels and without."""
    theirs, path = made(case)
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 30, 70)]
    for compile in (True, False):
        llama = Llama.build(
            path, max_seq_len=max(LONG, 0), max_batch_size=4, device="cpu", dtype="fp32",
            compile=compile,
        )  # fmt: skip
        together, _ = llama.generate(prompts, 20, temperature=0, stop_tokens=[])
        alone = [llama.generate([p], 20, temperature=0, stop_tokens=[])[0][0] for p in prompts]
        assert together == alone
        for prompt, answer in zip(prompts, together, strict=True):
            logits = theirs_at_full_length(theirs, case, prompt + answer)
            assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def theirs_at_full_length(theirs, case, tokens):
    """Dynamic RoPE's angles are those of the whole context, max_seq_len: pad to it."""
    short = LONG - len(tokens) if case == "dynamic" else 0
    return expected(theirs, torch.tensor([tokens + [0] * short]))[0, : len(tokens)]


def test_dynamic_rope_is_plain_within_the_trained_context(made):
    theirs, path = made("dynamic")
    source = checkpoint.open(path)
    assert source.args.max_seq_len == source.args.rope_original_max_seq_len == 48
    model, tokens = checkpoint.load(source, build(source.args, device="meta")), ids(2, 47)
    with torch.no_grad():
        assert gap(model(tokens), expected(theirs, tokens)) <= TOLERANCE
    longer = replace(source.args, max_seq_len=96)
    prints = [checkpoint.fingerprint(source, args) for args in (source.args, longer)]
    assert prints[0] == checkpoint.fingerprint(source) != prints[1]


@pytest.mark.parametrize(
    "case, world, compile",
    [
        ("granite, tied, with biases", 2, True),
        ("granite, tied, with biases", 4, False),
        ("smollm3", 2, True),
        ("mistral with a window", 2, False),
    ],
)
def test_ranks_give_the_tokens_of_one(made, case, world, compile, tmp_path):
    """Of 2 key/value heads, 4 ranks hold two copies of each; row-parallel biases are added once."""
    _, path = made(case)
    prompts, options = [[1, 2, 3], [7] * 40], dict(max_seq_len=LONG, compile=compile)
    llama = Llama.build(path, device="cpu", dtype="fp32", **options)
    tokens, logprobs = llama.generate(prompts, 16, temperature=0, logprobs=True)
    report = run_ranks(
        world, "generate", tmp_path / "out", ckpt=str(path), prompts=prompts, build=options
    )
    assert report["all_ranks"] == [tokens] * world
    for row, reference in zip(report["logprobs"], logprobs, strict=True):
        assert max(abs(a - b) for a, b in zip(row, reference, strict=True)) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_transformers_loads(made, case, tmp_path):
    theirs, path = made(case)
    source = checkpoint.open(path)
    huggingface.write(source, tmp_path / "hf")
    assert checkpoint.open(tmp_path / "hf").args == source.args
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = ids(2, LONG)
    assert gap(expected(again, tokens), expected(theirs, tokens)) <= 1e-6
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["rope_parameters"]  # before transformers 5
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert checkpoint.open(tmp_path / "hf").args == source.args
    meta.write(source, tmp_path / "meta", 2)
    sharded = checkpoint.open(tmp_path / "meta")
    derived = ("max_seq_len", "multiple_of", "ffn_dim_multiplier")
    fields = {name: getattr(source.args, name) for name in derived}
    assert replace(sharded.args, **fields) == source.args
    convert.check_equal(source, sharded, quiet=True)


def test_what_no_file_says_is_refused(made, tmp_path):
    def refused(write, reason, **fields):
        args = replace(checkpoint.open(made("granite")[1]).args, **fields)
        with pytest.raises(ValueError, match=reason):
            write(InMemory(args, random_weights(args)), tmp_path / "x")

    refused(huggingface.write, "Granite and Mistral", sliding_window=16)
    refused(gguf.write, "sliding window", sliding_window=16)
    refused(gguf.write, "dynamic RoPE", dynamic_factor=2.0)
    with pytest.raises(ValueError, match="don't go together"):
        replace(checkpoint.open(made("granite")[1]).args, no_rope_layers=(3,))


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf_is_read_back_and_computed_by_llama_cpp(made, case, tmp_path):
    theirs, path = made(case)
    source = checkpoint.open(path)
    file = gguf.write(source, tmp_path / "a.gguf", tokenizer=Tokenizer(path / "tokenizer.model"))
    again = checkpoint.open(file)
    fields = {"yarn_attention_factor": source.args.yarn_attention_factor}
    assert replace(again.args, **fields) == source.args
    assert again.args.yarn_attention_factor == pytest.approx(source.args.yarn_attention_factor)
    convert.check_equal(source, again, quiet=True)
    tokens = ids(1, LONG, vocab_size=256)
    with torch.no_grad():
        logits = load(file)(tokens)
        assert gap(logits, expected(theirs, tokens)) <= TOLERANCE
    found = llama_cpp_logprobs(file, tokens[0].tolist())
    assert len(found) == 20
    for token, logprob in found.items():
        assert logits[0, -1].log_softmax(-1)[token].item() == pytest.approx(logprob, abs=1e-2)


def llama_cpp_logprobs(path, prompt):
    """The most probable next tokens, by llama.cpp's server in this process, in fp32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.kv_unified = 256, 1, False
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    connection = http.client.HTTPConnection(urlparse(server.listening_address).netloc, timeout=120)
    body = {"prompt": prompt, "temperature": 0, "n_predict": 1, "n_probs": 20}
    body["logit_bias"] = [[97, 1000.0]]  # no stop token; what is returned is from before
    connection.request("POST", "/completion", json.dumps(body))
    (drawn,) = json.loads(connection.getresponse().read())["completion_probabilities"]
    return {one["id"]: one["logprob"] for one in drawn["top_logprobs"]}


@pytest.mark.parametrize("kind", ["int8", "stored"])
def test_quantized_matrices_keep_their_biases(made, kind, tmp_path):
    theirs, path = made("granite, tied, with biases")
    if kind == "stored":
        path = gguf.write(checkpoint.open(path), tmp_path / "q8.gguf", "q8_0")
    source, tokens = checkpoint.open(path), ids(2, LONG)
    plain, fast = (
        quantized.load(source, build(source.args, device="meta"), kind, dtype=torch.float32)
        for _ in range(2)
    )
    assert plain.layers[1].attention.wo.bias is not None
    with torch.no_grad():
        whole, found = expected(theirs, tokens), plain(tokens)
        assert gap(found, whole) <= 0.05 * whole.abs().max()
        assert gap(native.swap(fast)(tokens), found) <= 1e-3 * whole.abs().max()


def test_streamed_blocks_are_the_same(made):
    """Offloading puts a block's weights where they are used, biases too."""
    for case in ("granite, tied, with biases", "smollm3"):
        _, path = made(case)
        source, tokens = checkpoint.open(path), ids(1, 60)
        where = dict(dtype=torch.float32, device=torch.device("cpu"))
        streamed = offloaded.load(source, source.args, Plan(1, True), **where)
        with torch.no_grad():
            assert torch.equal(streamed(tokens), load(path)(tokens))


def test_gradients_and_adapters(made):
    """Each weight learns as transformers' does; LoRA is of matrices."""
    theirs, path = made("granite, tied, with biases")
    model, tokens = load(path), ids(2, 24)
    for logits in (model(tokens), theirs(tokens, use_cache=False).logits):
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
    parameters = dict(theirs.named_parameters())
    for name in ("self_attn.o_proj.bias", "mlp.up_proj.bias", "self_attn.v_proj.bias"):
        ours = {"o_proj": "attention.wo", "up_proj": "feed_forward.w3", "v_proj": "attention.wv"}
        found = model.get_parameter(f"layers.2.{ours[name.split('.')[1]]}.bias").grad
        assert gap(found, parameters[f"model.layers.2.{name}"].grad) <= 1e-5
    theirs.zero_grad()

    adapter = lora.fresh(model, 4, 8.0)
    assert not any(name.endswith("bias") for name in adapter.pairs)
    with torch.no_grad():
        before = model(tokens)
        lora.attach(model, adapter)
        assert torch.equal(model(tokens), before)
        names = checkpoint.weight_shapes(model.params).keys()
        assert checkpoint.gather(model).weights.keys() == names


def test_hidden_states_and_attention_are_recorded(made):
    theirs, path = made("granite")
    model, tokens = load(path), ids(2, 20)
    with torch.no_grad(), trace(model) as seen:
        model(tokens)
        found = theirs(tokens, output_hidden_states=True, output_attentions=True)
    for mine, other in zip(seen.hidden_states, found.hidden_states, strict=True):
        assert gap(mine, other) <= TOLERANCE
    for mine, other in zip(seen.attentions, found.attentions, strict=True):
        assert gap(mine, other) <= TOLERANCE


@pytest.mark.parametrize("case", ["smollm3", "granite", "mistral with a window"])
def test_a_config_without_differences_is_llama(made, case, tmp_path):
    _, path = made(case)
    config = json.loads((path / "config.json").read_text())
    plain = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", sliding_window=None,
        no_rope_layers=None, no_rope_layer_interval=None, layer_types=None,
        **dict.fromkeys(GRANITE, None),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | plain))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    assert type(checkpoint.open(tmp_path).args) is ModelArgs


def test_settings_that_only_note_how_yarn_came_about_are_known(made, tmp_path):
    """As in the configs of NousResearch's Yarn-Llama-2."""
    _, path = made("yarn")
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"]["finetuned"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    assert checkpoint.open(tmp_path).args == checkpoint.open(path).args


BROKEN = [
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]"),
    ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers=[1, 2, 1, 1]"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
    ("smollm3", {"layer_types": ["chunked_attention"] * 4}, "layer_types="),
    ("granite", {"logits_scaling": 0}, "logits_scaling=0"),
    ("granite", {"residual_multiplier": "1"}, "residual_multiplier='1'"),
    ("mistral with a window", {"sliding_window": -1}, "sliding_window=-1"),
    ("mistral with a window", {"layer_types": ["full_attention"] * 4}, "layer_types="),
    ("attention_bias", {"attention_bias": "yes"}, "attention_bias='yes'"),
    ("attention_bias", {"mlp_bias": True}, "lacks layers.0.feed_forward.w1.bias"),
    ("attention_bias", {"attention_bias": False}, "no place for: "),
    ("yarn", {"rope_parameters": YARN | {"factor": 0}}, "factor=0"),
    ("yarn", {"rope_parameters": YARN | {"truncate": 1}}, "truncate=1"),
    ("yarn", {"rope_parameters": YARN | {"extra": 1}}, "unknown settings: extra"),
    ("yarn", {"rope_parameters": YARN | {"rope_theta": 1.0}}, "rope_theta=1.0"),
    ("dynamic", {"rope_parameters": {"rope_type": "dynamic"}}, "factor=0"),
    ("yarn", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
]


@pytest.mark.parametrize("case, keys, named", BROKEN, ids=lambda value: str(value)[:50])
def test_a_config_that_cannot_be_honoured_is_named(made, case, keys, named, tmp_path):
    _, path = made(case)
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        checkpoint.check_shapes(checkpoint.open(tmp_path))
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2.5,
    1e300,
    float("nan"),
    "x",
    "",
    [],
    [1],
    [[]],
    {},
    1 << 70,
]


@pytest.mark.parametrize("case", ["smollm3, untied, some layers, yarn", "granite", "dynamic"])
def test_mutated_configs_load_or_are_one_error(made, case, tmp_path):
    """Any value in the place of any other, of settings within too: a model, or a ValueError."""
    _, path = made(case)
    original = (path / "config.json").read_text()
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    rng, loaded = random.Random(0), 0
    for _ in range(200):
        config = json.loads(original)
        for _ in range(rng.randint(1, 2)):
            where = rng.choice([config, *[v for v in config.values() if isinstance(v, dict)]])
            if where:
                where[rng.choice(sorted(where))] = rng.choice(VALUES)
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            source = checkpoint.open(tmp_path)
            checkpoint.check_shapes(source)
            build(source.args, device="meta")
            loaded += 1
        except ValueError as error:
            assert str(tmp_path) in str(error)
    assert loaded
