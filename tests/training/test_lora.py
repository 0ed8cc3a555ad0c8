"""LoRA adapters against peft, both ways; merged, switched, on several ranks."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, random_weights, run_ranks, write_checkpoint
from safetensors.torch import load_file
from test_model import TOLERANCE, gap, ids, to_hugging_face

from llama import Llama, checkpoint
from llama.apps import cli
from llama.backends import cpu as native
from llama.checkpoint import InMemory, convert, gguf
from llama.checkpoint.adapter import (
    IGNORED,
    REQUIRED,
    Adapter,
    Merged,
    Pair,
    read_adapter,
    write_adapter,
)
from llama.tokenizer import Tokenizer
from llama.training import lora, next_token_loss

# (out, in) of every matrix differ: 8 heads of 8 with 2 key/value heads, a feed-forward of 96.
KINDS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all": {"target_modules": "all-linear", "r": 4, "lora_alpha": 32},
    "rsLoRA": {"target_modules": ["k_proj", "o_proj"], "use_rslora": True, "r": 16},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
    },
    "one layer": {"target_modules": ["up_proj", "gate_proj"], "layers_to_transform": [1]},
}


def theirs(args=TINY, seed=0, **settings):
    """peft's model with an adapter that changes a lot."""
    from peft import LoraConfig, get_peft_model

    base = to_hugging_face(args, random_weights(args))
    found = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return found


def adapter(seed=5, rank=4, matrices=lora.MATRICES, args=TINY) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    blank = lora.fresh(random_model(args), rank, 2.0 * rank, matrices, seed)
    return Adapter({
        name: Pair(A, 0.1 * torch.randn(B.shape, generator=generator), scale)
        for name, (A, B, scale) in blank.pairs.items()
    })  # fmt: skip


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_pefts_adapters_give_its_logits_attached_merged_and_read_merged(kind, tmp_path):
    model, tokens = theirs(**kind), ids(2, 20)
    model.save_pretrained(tmp_path)
    plain = random_model(TINY)(tokens)
    with torch.inference_mode():
        expected = model(tokens).logits
    assert gap(expected, plain) > 0.1

    read = read_adapter(tmp_path, TINY)
    attached, merged = random_model(TINY), random_model(TINY)
    lora.attach(attached, read)
    lora.attach(merged, read)
    lora.merge(merged, "default")
    assert lora.names(merged) == ()
    source = Merged(InMemory(TINY, random_weights(TINY)), read)
    loaded = checkpoint.load(source, random_model(TINY))
    with torch.inference_mode():
        for ours in (attached, merged, loaded):
            assert gap(ours(tokens), expected) < TOLERANCE
        lora.detach(attached, "default")
        assert torch.equal(attached(tokens), plain)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_ours_load_in_peft(kind, tmp_path):
    from peft import PeftModel

    first, tokens = theirs(**kind), ids(2, 20)
    first.save_pretrained(tmp_path / "theirs")
    write_adapter(read_adapter(tmp_path / "theirs", TINY), tmp_path / "ours", TINY, "a/model")
    second = PeftModel.from_pretrained(
        to_hugging_face(TINY, random_weights(TINY)), tmp_path / "ours"
    )
    assert second.peft_config["default"].base_model_name_or_path == "a/model"
    with torch.inference_mode():
        assert gap(second(tokens).logits, first(tokens).logits) < 1e-5
    again, one = read_adapter(tmp_path / "ours", TINY), read_adapter(tmp_path / "theirs", TINY)
    assert again.pairs.keys() == one.pairs.keys()
    for name, (A, B, scale) in again.pairs.items():
        assert torch.equal(A, one.pairs[name].A) and torch.equal(B, one.pairs[name].B)
        assert math.isclose(scale, one.pairs[name].scale)


@pytest.mark.parametrize(
    ("base", "name", "revision"),
    [
        ("hf://owner/name", "owner/name", None),
        ("hf://owner/name@v1", "owner/name", "v1"),
        ("checkpoints/name", "checkpoints/name", None),
    ],
)
def test_peft_finds_the_base(base, name, revision, tmp_path):
    from peft import PeftConfig

    write_adapter(adapter(), tmp_path / "ours", TINY, base)
    config = PeftConfig.from_pretrained(tmp_path / "ours")
    assert (config.base_model_name_or_path, config.revision) == (name, revision)


def test_every_setting_of_peft_is_known(tmp_path):
    """A version with new ones must be looked at: what isn't known, and isn't off, is refused."""
    from peft import LoraConfig

    settings = LoraConfig().to_dict()
    assert {key for key, value in settings.items() if value} <= IGNORED | REQUIRED.keys()


def test_files_of_early_peft(tmp_path):
    model = theirs(target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "old")
    weights = load_file(tmp_path / "old" / "adapter_model.safetensors")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "old" / "adapter_model.bin")
    new, old = (read_adapter(tmp_path / name, TINY).pairs for name in ("new", "old"))
    assert new.keys() == old.keys()
    for name in new:
        assert torch.equal(new[name].A, old[name].A) and torch.equal(new[name].B, old[name].B)


def test_gradients_of_an_adapter_equal_pefts(tmp_path):
    model, tokens = theirs(target_modules="all-linear", r=4), ids(2, 12)
    model.save_pretrained(tmp_path)
    model(tokens).logits.square().mean().backward()
    ours = random_model(TINY).requires_grad_(False)
    lora.attach(ours, read_adapter(tmp_path, TINY))
    ours(tokens).square().mean().backward()
    layers = model.base_model.model.model.layers
    for mine, other in (
        (ours.layers[0].attention.wv, layers[0].self_attn.v_proj),
        (ours.layers[1].attention.wo, layers[1].self_attn.o_proj),
        (ours.layers[0].feed_forward.w2, layers[0].mlp.down_proj),
        (ours.layers[1].feed_forward.w1, layers[1].mlp.gate_proj),
    ):
        for half in ("lora_A", "lora_B"):
            one, two = getattr(mine, half)["default"].grad, getattr(other, half).default.weight.grad
            assert two.abs().max() > 1e-4 and gap(one, two) < TOLERANCE
    assert ours.layers[0].attention.wv.weight.grad is None


def test_switched_at_runtime():
    tokens, first, second = ids(1, 9), adapter(1), adapter(2, matrices=("wq", "w2"))

    def alone(one):
        model = random_model(TINY)
        if one is not None:
            lora.attach(model, one)
        return model(tokens)

    model = random_model(TINY)
    lora.attach(model, first, "first")
    lora.attach(model, second, "second")
    for name, one in (("first", first), (None, None), ("second", second), ("first", first)):
        lora.use(model, name)
        assert torch.equal(model(tokens), alone(one))
    with pytest.raises(ValueError, match="no adapter 'third': there is first, second"):
        lora.use(model, "third")
    with pytest.raises(ValueError, match="no adapter 'third'"):
        lora.merge(model, "third")
    with pytest.raises(ValueError, match="there already"):
        lora.attach(model, first, "second")
    lora.detach(model, "first")
    assert torch.equal(model(tokens), alone(None)) and lora.names(model) == ("second",)
    found = lora.adapter_of(model, "second")
    for name, pair in second.pairs.items():
        assert torch.equal(pair.A, found.pairs[name].A) and torch.equal(pair.B, found.pairs[name].B)


def test_prefixes_of_another_adapter_are_forgotten(tiny_dir):
    llama = Llama.build(tiny_dir, device="cpu", dtype="fp32", max_seq_len=128, prefix_cache_mb=10)
    prompts = [[*range(1, 60)]]

    def answer(**options):
        return llama.generate(prompts, 8, temperature=0, stop_tokens=set(), **options)[0]

    plain = answer()
    lora.attach(llama.model, adapter(), "a")
    changed = answer()
    fresh_llama = Llama.build(tiny_dir, device="cpu", dtype="fp32", max_seq_len=128)
    lora.attach(fresh_llama.model, adapter(), "a")
    expected, _ = fresh_llama.generate(prompts, 8, temperature=0, stop_tokens=set())
    assert changed == expected != plain
    lora.use(llama.model, None)
    assert answer() == plain
    with pytest.raises(ValueError, match="adapter_dir"):
        llama.save_prefix("never", "text")


@pytest.mark.parametrize("world, n_kv_heads", [(2, 2), (4, 2)])
def test_ranks(world, n_kv_heads, tmp_path):
    """Attached and merged on ranks, replicated key/value heads among them; given back whole."""
    args = replace(TINY, n_kv_heads=n_kv_heads, hidden_dim=90)  # 90: padded on 4 ranks
    path = write_checkpoint(tmp_path / "tiny", args)
    one = adapter(args=args)
    write_adapter(one, tmp_path / "adapter", args)
    tokens = ids(2, 9)
    report = run_ranks(
        world, "adapted", tmp_path / "out.json", ckpt=str(path),
        adapter=str(tmp_path / "adapter"), copy=str(tmp_path / "copy"), tokens=tokens.tolist(),
    )  # fmt: skip
    model = random_model(args)
    lora.attach(model, one)
    with torch.inference_mode():
        expected = model(tokens)
    for way in ("attached", "merged", "built"):
        assert gap(torch.tensor(report[way]), expected) < TOLERANCE
    copy = read_adapter(tmp_path / "copy", args)
    for name, pair in one.pairs.items():
        assert torch.equal(pair.A, copy.pairs[name].A) and torch.equal(pair.B, copy.pairs[name].B)


def test_built_quantized_and_compiled_and_converted(tmp_path):
    """In the weights from the start: what quantization and kernels then do is as for any model."""
    args = replace(TINY, dim=128, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=128)
    path = write_checkpoint(tmp_path / "base", args)
    write_adapter(adapter(args=args), tmp_path / "adapter", args)
    source = Merged(checkpoint.open(path), read_adapter(tmp_path / "adapter", args))
    convert.convert(source, tmp_path / "merged", "hf", verify=True, quiet=True)
    for options in ({}, {"quantize": "int8"}, {"compile": True}):
        settings = {"device": "cpu", "dtype": "fp32", "max_seq_len": 128, **options}
        tokenizer = path / "tokenizer.model"
        one = Llama.build(path, adapter_dir=tmp_path / "adapter", **settings)
        two = Llama.build(tmp_path / "merged", tokenizer, **settings)
        prompts = [[1, 2, 3], [9, 8, 7, 6]]
        found = [one.generate(prompts, 12, temperature=0, logprobs=True, stop_tokens=set())]
        found += [two.generate(prompts, 12, temperature=0, logprobs=True, stop_tokens=set())]
        assert found[0] == found[1]


def test_quantized_layers_learn_an_adapter(tmp_path):
    """The gradients are those of the same weights made dense."""
    args = replace(TINY, dim=128, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=128)
    path = write_checkpoint(tmp_path / "base", args)
    build = {"device": "cpu", "dtype": "fp32", "max_seq_len": 128, "compile": False}
    gguf.write(checkpoint.open(path), tmp_path / "q.gguf", "q8_0",
               tokenizer=Tokenizer(path / "tokenizer.model"))  # fmt: skip
    tokenizer, tokens, found = path / "tokenizer.model", ids(2, 9), []
    for quantize in (None, "int8"):
        model = Llama.build(tmp_path / "q.gguf", tokenizer, quantize=quantize, **build).model
        lora.attach(model.requires_grad_(False), adapter(args=args))
        next_token_loss(model, tokens, tokens).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == 2 * 7 * args.n_layers
    assert all(gap(a, b) < TOLERANCE for a, b in zip(*found, strict=True))


def test_quantized_layers_take_an_adapter_but_no_merge(tmp_path):
    args = replace(TINY, dim=128, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=128)
    path = write_checkpoint(tmp_path / "base", args)
    build = {"device": "cpu", "dtype": "fp32", "max_seq_len": 128, "compile": False}
    model = Llama.build(path, quantize="int8", **build).model
    tokens = ids(1, 5)
    before = model(tokens)
    lora.attach(model, adapter(args=args))
    assert gap(model(tokens), before) > 0.1
    with pytest.raises(ValueError, match="adapter_dir"):
        lora.merge(model, "default")
    lora.detach(model, "default")
    assert torch.equal(model(tokens), before)
    with pytest.raises(ValueError, match="compile=False"):
        lora.attach(native.swap(random_model(args)), adapter(args=args))


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json isn't there"):
        read_adapter(tmp_path, TINY)
    write_adapter(adapter(), tmp_path / "a", TINY)
    with pytest.raises(FileNotFoundError, match=rf"there are {tmp_path}/a: name one"):
        read_adapter(tmp_path, TINY)  # PEFT puts adapters with names of their own into folders
    with pytest.raises(FileExistsError, match="force"):
        write_adapter(adapter(), tmp_path / "a", TINY)
    write_adapter(adapter(), tmp_path / "a", TINY, force=True)
    with pytest.raises(ValueError, match="another model"):
        read_adapter(tmp_path / "a", replace(TINY, dim=128))
    with pytest.raises(ValueError, match="no LoRA of a matrix of this model"):
        read_adapter(tmp_path / "a", replace(TINY, n_layers=1))
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for key, value in (
        ("use_dora", True), ("bias", "all"), ("peft_type", "LOHA"), ("r", 5),
        ("modules_to_save", ["lm_head"]), ("init_lora_weights", "pissa_niter_4"), ("of_2030", 1),
    ):  # fmt: skip
        file.write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}")):
            read_adapter(tmp_path / "a", TINY)
    for rank, matrices, named in (
        (0, ("wq",), "lora rank 0"), (4, (), "lora matrices none"),
        (4, ("wx",), "lora matrices 'wx': .* wq, wk, .* Hugging Face's names, q_proj, k_proj"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            lora.fresh(random_model(TINY), rank, 8, matrices)
    by_either = [lora.fresh(random_model(TINY), 4, 8, names).pairs
                 for names in (("wq", "w2"), ("down_proj", "q_proj", "wq"))]  # fmt: skip
    assert by_either[0].keys() == by_either[1].keys() and len(by_either[0]) == 2 * TINY.n_layers
    deeper = replace(TINY, n_layers=3)
    for other in (replace(TINY, dim=128), deeper):
        model = random_model(TINY)
        with pytest.raises(ValueError, match="an adapter of another model"):
            lora.attach(model, adapter(args=other))
        assert lora.names(model) == () and not list(lora.layers(model))
    for name in ("", "a.b", "keys", "eval"):
        with pytest.raises(ValueError, match="can't name an adapter"):
            lora.attach(random_model(TINY), adapter(), name)


def test_by_the_command_line(tmp_path, capfd, tiny_dir):
    """complete and convert take an adapter; what is converted answers as what is added."""
    write_adapter(adapter(), tmp_path / "adapter", TINY)
    options = ["--prompt", "abc", "--max_gen_len=8", "--device=cpu", "--dtype=fp32"]
    options += ["--max_seq_len=64", "--tokenizer_path", str(tiny_dir / "tokenizer.model")]
    merged = ["--adapter_dir", str(tmp_path / "adapter")]
    cli.parse(["convert", str(tiny_dir), str(tmp_path / "hf"), "hf", *merged])()
    capfd.readouterr()
    said = []
    for ckpt, more in (
        (tiny_dir, []), (tiny_dir, merged), (tmp_path / "hf", []),
    ):  # fmt: skip
        cli.parse(["complete", str(ckpt), *options, *more])()
        said.append(capfd.readouterr().out)
    assert said[0] != said[1] == said[2]


def test_blocks_that_are_brought_in_take_an_adapter(tiny_dir, monkeypatch):
    """Attached or built in; there are no weights to merge it with."""
    tokens, one = ids(1, 9), adapter()
    expected = random_model(TINY)
    lora.attach(expected, one)
    monkeypatch.setattr("llama.backends.memory.working", lambda *_: 0)
    monkeypatch.setattr("llama.backends.memory.available", lambda device: 330_000)
    model = Llama.build(tiny_dir, device="cpu", dtype="fp32", max_seq_len=64, max_batch_size=1,
                        offload="auto").model  # fmt: skip
    assert any(weight.is_meta for weight in model.parameters())
    with torch.inference_mode():
        plain = model(tokens)
        lora.attach(model, one)
        assert gap(model(tokens), expected(tokens)) < 1e-5 < gap(plain, expected(tokens))
    with pytest.raises(ValueError, match="not in memory"):
        lora.merge(model, "default")
