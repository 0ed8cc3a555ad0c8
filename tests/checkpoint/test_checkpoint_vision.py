"""Checkpoints of Llama 3.2 Vision: Hugging Face's against transformers, Meta's, and conversions."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import random_model, random_weights, run_ranks, write_checkpoint
from transformers import BitsAndBytesConfig
from vision import ARGS, GRIDS, IMAGE, ROWS, images_of, inputs, logits, tiled, transformers_model

from llama import Llama, checkpoint
from llama.backends.build import prepare
from llama.checkpoint import InMemory, convert, huggingface, meta
from llama.families.registry import build, family_of
from llama.layers import parallel
from llama.text.encoder import image_id
from llama.tokenizer import Tokenizer
from llama.vision.images import tile


@pytest.fixture(scope="module")
def source():
    return InMemory(ARGS, random_weights(ARGS))


@pytest.fixture(scope="module")
def theirs(source, tmp_path_factory):
    """A directory that we wrote, and what transformers makes of it."""
    path = huggingface.write(source, tmp_path_factory.mktemp("theirs") / "model")
    return path, transformers_model(path)


@torch.inference_mode()
def test_logits_are_transformers(source, theirs):
    path, model = theirs
    ours = checkpoint.load(checkpoint.open(path), build(ARGS, device="meta"))
    for seed in range(2):
        images = images_of(ROWS, seed)
        found, given = logits(ours, ROWS, images), inputs(ROWS, images)
        begun = given["input_ids"][:, :1] == IMAGE
        assert begun.any() and not begun.all()
        assert (found - model(**given).logits)[begun[:, 0]].abs().max() < 1e-4
        # Where text precedes the images, it gets their mean (transformers#39379), and Meta's none.
        seeing = given["cross_attention_mask"].flatten(2).any(-1, keepdim=True)
        hooks = [
            module.register_forward_hook(lambda m, i, out, s=seeing: (out[0] * s, out[1]))
            for name, module in model.named_modules()
            if name.endswith("cross_attn")
        ]
        assert len(hooks) == ARGS.vision_num_cross_attention_layers
        assert (found - model(**given).logits).abs().max() < 1e-4
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def test_what_transformers_saves_is_read(source, theirs, tmp_path):
    theirs[1].save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    read = checkpoint.open(tmp_path / "saved")
    assert same(read.args) and config["architectures"] == ["MllamaForConditionalGeneration"]
    check_weights(read, source)


def same(args):
    """What the width of the feed-forward network follows from isn't in config.json."""
    return replace(args, multiple_of=ARGS.multiple_of, ffn_dim_multiplier=None) == ARGS


def unused(name, weight):
    """Of tiles' positions, those that no picture has: transformers has no place for them."""
    if weight.ndim != 4:
        return weight
    weight = weight.clone()
    n = ARGS.vision_max_num_chunks
    for row in range(n):
        weight[row, n // (row + 1) :] = 0
    return weight


def check_weights(read, source, lossy=True):
    checkpoint.check_shapes(read)
    for name, weight in source.weights.items():
        found = read.read(name, 0, 0, len(weight))
        assert torch.equal(found, unused(name, weight) if lossy else weight), name


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_meta_to_hugging_face_and_back(source, tmp_path, shards):
    meta.write(source, tmp_path / "meta", shards)
    first = checkpoint.open(tmp_path / "meta")
    assert first.args == ARGS
    for name, weight in source.weights.items():
        assert torch.equal(first.read(name, 0, 0, len(weight)), weight), name
    convert.convert(tmp_path / "meta", tmp_path / "hf", "hf", max_shard_bytes=100_000, verify=True)
    assert len([*(tmp_path / "hf").glob("*.safetensors")]) > 1
    convert.convert(tmp_path / "hf", tmp_path / "back", "meta", model_parallel_size=shards)
    again = checkpoint.open(tmp_path / "back")
    assert same(again.args)
    check_weights(again, source)


def test_meta_names_its_only_file_without_a_number(source, tmp_path):
    path = meta.write(source, tmp_path / "meta")
    (path / "consolidated.00.pth").rename(path / "consolidated.pth")
    names = torch.load(path / "consolidated.pth", mmap=True).keys()
    assert "text_model.layers.0.attention.wq.weight" in names
    assert "vision_model.vision_encoder.class_embedding" in names
    checkpoint.check_shapes(checkpoint.open(path))


@torch.inference_mode()
@pytest.mark.parametrize(
    "world, args",
    [(2, ARGS), (4, replace(ARGS, head_dim=32, hidden_dim=256))],  # as kernels take it
)
def test_ranks_compute_what_one_does(tmp_path, world, args):
    path, images = write_checkpoint(tmp_path / "meta", args, mp=2), images_of(ROWS)
    found = run_ranks(world, "seeing", tmp_path / "out", ckpt=str(path), rows=ROWS)
    expected = logits(random_model(args), ROWS, images)
    assert (torch.tensor(found["logits"]) - expected).abs().max() < 1e-4
    llama = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=128)
    options = dict(images=tiled(ROWS), temperature=0, stop_tokens=set())
    assert found["tokens"] == found["served"] == llama.generate(ROWS, 9, **options)[0]


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        ("text_config", "cross_attention_layers", [1, 2], r"computed are \[1, 4\]"),
        ("text_config", "cross_attention_layers", None, "cross_attention_layers=None"),
        ("text_config", "sliding_window", 4, "sliding_window=4"),
        ("vision_config", "intermediate_size", 5, "intermediate_size=5"),
        ("vision_config", "hidden_act", "relu", "hidden_act=relu"),
        ("vision_config", "image_size", "56", "image_size='56' isn't a whole number"),
        ("vision_config", "intermediate_layers_indices", [9], "each less than vision_layers=5"),
        ("vision_config", "supported_aspect_ratios", [[1, 1]], "supported_aspect_ratios"),
        (None, "vision_config", None, "lacks text_config or vision_config"),
        (None, "image_token_index", 3, "image_token_index=3"),
    ],
)
def test_configurations_that_say_something_else_are_refused(
    theirs, tmp_path, part, key, value, message
):
    config = json.loads((theirs[0] / "config.json").read_text())
    (config if part is None else config[part])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        huggingface.read_config(tmp_path / "config.json")


def test_heads_of_another_width_have_no_place_in_mllama(tmp_path):
    args = replace(ARGS, head_dim=32)
    source = InMemory(args, random_weights(args))
    with pytest.raises(ValueError, match="head_dim=32 isn't 64 / 8"):
        convert.convert(source, tmp_path / "hf", "hf")


@pytest.mark.parametrize("shape", [(1, 1, 1), ()])
def test_gates_of_any_number_of_dimensions(source, tmp_path, shape):
    weights = {
        name: weight.view(shape) if "gate" in name and len(weight) == 1 else weight
        for name, weight in source.weights.items()
    }
    path = meta.write(source, tmp_path / "meta")
    theirs = family_of(ARGS).meta_names.theirs
    torch.save({theirs(n): w for n, w in weights.items()}, path / "consolidated.00.pth")
    check_weights(checkpoint.open(path), source, lossy=False)


def test_transformers_prepares_images_and_their_token_as_we_do(source, tmp_path):
    """Meta's files say nothing of it, and their vocabulary lacks the token's id."""
    from PIL import Image
    from transformers import AutoProcessor

    write_checkpoint(tmp_path / "meta", ARGS)
    convert.convert(tmp_path / "meta", tmp_path / "hf", "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    image = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    found = processor(images=image, text="<|image|>What?", add_special_tokens=False)
    assert found["input_ids"] == [[IMAGE, 256, *b"What?"]]  # bos after images, as it does
    ours = tile(image, size=56)
    assert found["aspect_ratio_ids"] == [[GRIDS.index(ours.aspect_ratio) + 1]]
    theirs = torch.tensor(found["pixel_values"][0][0][: len(ours.pixels)])
    assert (theirs - ours.pixels).abs().max() < 1e-5
    tokenizer = Tokenizer(tmp_path / "hf" / "tokenizer.json")
    assert image_id(tokenizer) == IMAGE == tokenizer.n_words - 1
    convert.convert(tmp_path / "hf", tmp_path / "back", "meta")  # Meta's file again
    names = [path / "tokenizer.model" for path in (tmp_path / "meta", tmp_path / "back")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_processors_template_comes_along(source, tmp_path):
    write_checkpoint(tmp_path / "meta", ARGS)
    convert.convert(tmp_path / "meta", tmp_path / "hf", "hf")
    template = json.dumps({"chat_template": "{{ messages[0].content }}é\n"})
    (tmp_path / "hf" / "chat_template.json").write_text(template)
    convert.convert(tmp_path / "hf", tmp_path / "again", "hf")
    written = (tmp_path / "again" / "chat_template.jinja").read_text("utf-8")
    assert written == "{{ messages[0].content }}é\n"


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_another_preparation_of_images_is_said_not_to_be_followed(source, tmp_path, file):
    path = huggingface.write(source, tmp_path / "hf")
    given = json.loads((path / "preprocessor_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.open(path)
    given |= {"max_image_tiles": 1, "image_processor_type": "Another", "of_no_one": 3}
    given = {"image_processor": given} if file.startswith("processor") else given
    (path / file).write_text(json.dumps(given))
    with pytest.warns(UserWarning, match=rf"{file}: max_image_tiles=1 isn't followed.*with 4") as w:
        checkpoint.open(path)
    assert len(w) == 1


def test_there_is_no_gguf_of_it(source, tmp_path):
    with pytest.raises(ValueError, match="llama-vision"):
        convert.convert(source, tmp_path / "model.gguf", "gguf")


@torch.inference_mode()
def test_bitsandbytes_weights_of_both_parts_with_their_biases(tmp_path):
    """As in releases that quantize all linear layers, the encoder's too."""
    args = replace(ARGS, dim=128, n_heads=2, n_kv_heads=2, head_dim=64, vision_width=64)
    dense = huggingface.write(InMemory(args, random_weights(args)), tmp_path / "dense")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers_model(dense, quantization_config=four_bits)
    theirs.save_pretrained(tmp_path / "quantized")
    found = checkpoint.open(tmp_path / "quantized")
    kept = {name.split(".")[0] for name in found.shapes() if found.stored_as(name) == "NF4"}
    assert kept >= {"layers", "cross_attention_layers"}
    encoder = [name for name in found.quantized if name.startswith("vision_model.")]
    assert len(encoder) >= 6 * (args.vision_layers + args.vision_global_layers)
    images = images_of(ROWS)
    given = inputs(ROWS, images)
    begun = (given["input_ids"][:, 0] == IMAGE).nonzero()[:, 0]
    expected = theirs.dequantize(torch.float32)(**given).logits
    device = parallel.initialize(device="cpu")
    for how, bound in (({"quantize": "dense", "compile": False}, 1e-4), ({}, 1e-3)):
        ours = prepare(found, found.args, device=device, dtype=torch.float32, **how)
        assert (logits(ours, ROWS, images) - expected)[begun].abs().max() < bound
