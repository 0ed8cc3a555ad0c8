"""LoRA adapters of Llama 3.2 Vision against peft, both ways; on ranks; learned from text."""

import json
import re

import pytest
import torch
from conftest import random_model, random_weights, run_ranks, write_checkpoint
from safetensors.torch import load_file, save_file
from vision import ARGS, IMAGE, TINY_LLAMA4, images_of, inputs, logits, transformers_model

from llama import Llama, checkpoint
from llama.apps.finetune import finetune
from llama.backends import adapters
from llama.checkpoint import InMemory, huggingface, weight_shapes
from llama.checkpoint.adapter import TAKE, Adapter, Merged, Pair, read_adapter, write_adapter
from llama.families.registry import build
from llama.families.vision import OF_IMAGES
from llama.training import lora

# All tokens see an image: transformers gives those before it the mean of all.
ROWS = [[IMAGE, 5, 6, 7, IMAGE, 9, 8], [IMAGE, IMAGE, 4, 6, IMAGE, 9, 8], [IMAGE, 7, 8, 9, 4, 5, 6]]
KINDS = {
    "wherever the names are": {"target_modules": ["q_proj", "v_proj", "o_proj", "fc1"]},
    "all": {"target_modules": "all-linear", "r": 4, "use_rslora": True},
    "text": {
        "target_modules": r".*language_model.*self_attn\.[qkvo]_proj",
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {r"layers\.2\.self_attn\.q_proj": 5},
    },
    "reading": {"target_modules": r".*cross_attn\.[qkvo]_proj", "r": 16},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    return huggingface.write(InMemory(ARGS, random_weights(ARGS)), path)


@pytest.fixture(scope="module", params=KINDS)
def adapted(request, base, tmp_path_factory):
    """An adapter that changes a lot, in a directory, and the logits that peft gives with it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(transformers_model(base), LoraConfig(**KINDS[request.param])).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("adapters") / "theirs"
    model.save_pretrained(path)
    return path, pefts_logits(model)


@torch.inference_mode()
def pefts_logits(model):
    return model(**inputs(ROWS, images_of(ROWS))).logits


@torch.inference_mode()
def test_pefts_adapters_give_its_logits(adapted):
    path, expected = adapted
    model = random_model(ARGS)
    plain = logits(model, ROWS, images_of(ROWS))
    assert (plain - expected).abs().max() > 0.1
    read = read_adapter(path, ARGS)
    lora.attach(model, read)
    source = Merged(InMemory(ARGS, random_weights(ARGS)), read)
    merged = checkpoint.load(source, build(ARGS, device="meta"))
    for ours in (model, merged):
        assert (logits(ours, ROWS, images_of(ROWS)) - expected).abs().max() < 1e-5
    lora.detach(model, "default")
    assert torch.equal(logits(model, ROWS, images_of(ROWS)), plain)


def test_ours_load_in_peft(adapted, base, tmp_path):
    from peft import PeftModel

    path, expected = adapted
    read = read_adapter(path, ARGS)
    write_adapter(read, tmp_path / "ours", ARGS)
    model = PeftModel.from_pretrained(transformers_model(base), tmp_path / "ours").eval()
    assert (pefts_logits(model) - expected).abs().max() < 1e-5
    same(read_adapter(tmp_path / "ours", ARGS), read)


def same(one: Adapter, other: Adapter):
    assert one.pairs.keys() == other.pairs.keys()
    for name, (A, B, scale) in one.pairs.items():
        assert torch.equal(A, other.pairs[name].A) and torch.equal(B, other.pairs[name].B), name
        assert abs(scale - other.pairs[name].scale) < 1e-6


def test_names_of_older_transformers(adapted, tmp_path):
    path, _ = adapted
    read = read_adapter(path, ARGS)
    write_adapter(read, tmp_path / "old", ARGS)
    file = tmp_path / "old" / "adapter_model.safetensors"
    renamed = {
        re.sub(r"model\.model\.language_model\.", "model.language_model.model.", name): weight
        for name, weight in load_file(file).items()
    }
    assert renamed.keys() != load_file(file).keys()
    save_file(renamed, file)
    config = file.with_name("adapter_config.json")
    config.write_text(config.read_text().replace("model.language_model.", "language_model.model."))
    same(read_adapter(tmp_path / "old", ARGS), read)


def everywhere(args) -> Adapter:
    """Of all matrices that take an adapter."""
    generator, pairs = torch.Generator().manual_seed(5), {}
    for name, shape in weight_shapes(args).items():
        if len(shape) == 2 and re.search(TAKE, name) and ".experts." not in name:
            A, B = torch.zeros(4, shape[1]), torch.zeros(shape[0], 4)
            A, B = (0.2 * torch.randn(half.shape, generator=generator) for half in (A, B))
            pairs[name] = Pair(A, B, 0.5)
    return Adapter(pairs)


def test_llama_4s_are_written_and_read_again(tmp_path):
    one = everywhere(TINY_LLAMA4)
    assert any("resblocks" in name for name in one.pairs)
    write_adapter(one, tmp_path / "adapter", TINY_LLAMA4)
    same(read_adapter(tmp_path / "adapter", TINY_LLAMA4), one)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stems = ("language_model.model.layers.", "vision_model.model.layers.")
    stems += ("vision_model.vision_adapter.", "multi_modal_projector.")
    assert all(name.startswith(tuple(f"base_model.model.{s}" for s in stems)) for name in names)
    with pytest.raises(ValueError, match="what reads images takes no adapters"):
        adapters.add(build(TINY_LLAMA4, device="meta"), "one", one)


@torch.inference_mode()
def test_ranks(tmp_path):
    """Of all matrices, those whose outputs are gathered among them."""
    one = everywhere(ARGS)
    write_adapter(one, tmp_path / "adapter", ARGS)
    path = write_checkpoint(tmp_path / "model", ARGS)
    report = run_ranks(
        2, "adapted", tmp_path / "out.json", ckpt=str(path), adapter=str(tmp_path / "adapter"),
        copy=str(tmp_path / "copy"), tokens=ROWS, sees=True,
    )  # fmt: skip
    model = random_model(ARGS)
    lora.attach(model, one)
    expected = logits(model, ROWS, images_of(ROWS))
    for way in ("attached", "merged", "built"):
        assert (torch.tensor(report[way]) - expected).abs().max() < 1e-4, way
    same(read_adapter(tmp_path / "copy", ARGS), one)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_learned_from_text(tmp_path, method):
    """The text's layers learn, and what reads images stays as it is."""
    path = write_checkpoint(tmp_path / "model", ARGS)
    lines = [{"text": "The word is lamp. " * (1 + i % 3)} for i in range(12)]
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    finetune(
        str(data), out=str(out), ckpt_dir=str(path), method=method, held_out=4, epochs=4,
        batch_size=4, max_seq_len=128, learning_rate=0.01, dtype="fp32", device="cpu", pack=True,
    )  # fmt: skip
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    held_out = [line["held_out_loss"] for line in log if "held_out_loss" in line]
    assert held_out[-1] < held_out[0] - 1
    source = checkpoint.open(out / "model" if method == "full" else path)
    if method == "lora":
        source = Merged(source, read_adapter(out / "adapter", ARGS))
        assert len(source.adapter.pairs) == 7 * ARGS.n_layers
    for name, before in random_weights(ARGS).items():
        learned = not name.startswith(OF_IMAGES)
        if (name.startswith("layers.") and before.ndim == 2) or (not learned and before.ndim < 4):
            assert torch.equal(source.read(name, 0, 0, len(before)), before) != learned, name


def test_what_takes_none(adapted, tmp_path):
    path, _ = adapted
    llama = Llama.build(write_checkpoint(tmp_path / "m", ARGS), device="cpu", max_seq_len=128)
    with pytest.raises(ValueError, match="build with adapter_dir, for one adapter of all rows"):
        llama.add_adapter("one", path)
    name = "vision_model.vision_encoder.conv1._linear.weight"
    out, inn = weight_shapes(ARGS)[name]
    write_adapter(Adapter({name: Pair(torch.zeros(2, inn), torch.zeros(out, 2), 1.0)}),
                  tmp_path / "patches", ARGS)  # fmt: skip
    with pytest.raises(ValueError, match="patch_embedding.*is no LoRA of a matrix of this model"):
        read_adapter(tmp_path / "patches", ARGS)
