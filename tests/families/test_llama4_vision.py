"""Llama 4's images against Meta's code and transformers, in files, and on ranks."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import random_model, random_weights
from safetensors.torch import load_file
from vision import (
    LLAMA4_TOKENS,
    TINY_LLAMA4,
    llama4_ids,
    llama4_tiles,
    without_images,
    write_llama4_tokenizer,
)

from llama import Tokenizer, checkpoint
from llama.backends import adapters, cpu
from llama.checkpoint import InMemory, gguf, huggingface, meta
from llama.checkpoint.adapter import Merged, read_adapter, write_adapter
from llama.checkpoint.convert import check_equal, convert
from llama.families.llama4_fusion import views
from llama.families.llama4_vision import ImageArgs
from llama.families.registry import build
from llama.layers.paged import PAGE, PagedRows
from llama.text.encoder import image_id
from llama.text.llama4 import Llama4Format
from llama.text.templates import TemplateFormat

ARGS = TINY_LLAMA4
GRIDS = [(1, 1), (1, 2), (3, 1), (4, 4)]
# Text before, between and after images, of which one spans chunks of attention.
ROW = [3, *llama4_ids((1, 2)), 5, 6, 7, *llama4_ids((2, 2)), *llama4_ids((1, 1)), 9, 8]
IMAGES = [llama4_tiles((1, 2), 1), llama4_tiles((2, 2), 2), llama4_tiles((1, 1), 3)]


@pytest.fixture(scope="module")
def weights():
    return random_weights(ARGS)


@pytest.fixture(scope="module")
def model():
    return random_model(ARGS)


@pytest.fixture(scope="module")
def hf(weights, tmp_path_factory):
    return huggingface.write(InMemory(ARGS, weights), tmp_path_factory.mktemp("hf") / "hf")


@pytest.fixture(scope="module")
def peer(hf):
    from transformers import Llama4ForConditionalGeneration

    model, info = Llama4ForConditionalGeneration.from_pretrained(
        hf, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()


@pytest.fixture(scope="module")
def metas(weights, tmp_path_factory):
    """Meta's network and encoder with the same weights, from params.json as we write it; they want
    a GPU for their caches, and make the encoder bfloat16."""
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.model import Transformer

    path = meta.write(InMemory(ARGS, weights), tmp_path_factory.mktemp("meta") / "m")
    params = json.loads((path / "params.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self: self)
        network = Transformer(ModelArgs(**params, max_batch_size=2, max_seq_len=256)).float()
    network.load_state_dict(torch.load(path / "consolidated.00.pth"))
    for block in network.vision_embeddings.vision_encoder.transformer.resblocks:
        block.attn.cache_k, block.attn.cache_v = (
            cache.float() for cache in (block.attn.cache_k, block.attn.cache_v)
        )
    return network


def encoded(model, images):
    return [model.encode(one.pixels, one.aspect_ratio) for one in images]


@torch.inference_mode()
def reads(model, row, images):
    return model(torch.tensor([row]), images=[encoded(model, images)])[0]


# --- peers ---------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("grid", GRIDS)
def test_features_are_metas_and_transformers(grid, model, metas, peer):
    tiles = llama4_tiles(grid)
    [ours] = encoded(model, [tiles])
    of_meta = metas.vision_embeddings
    features = of_meta.vision_adapter(of_meta.vision_encoder(tiles.pixels[:, None, None]))
    theirs = metas.vision_projection(features).flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    features = peer.get_image_features(tiles.pixels, return_dict=True).last_hidden_state
    theirs = peer.multi_modal_projector(features).flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1


@torch.inference_mode()
def test_features_of_the_released_widths_are_transformers(tmp_path):
    """A layer of them; head_dim is 88, of which RoPE turns 22 pairs by each direction."""
    from transformers import Llama4VisionConfig, Llama4VisionModel

    args = replace(
        ARGS, vision_layers=1, vision_width=1408, vision_heads=16, vision_output=256,
        vision_chunk_size=336,
    )  # fmt: skip
    path = huggingface.write(InMemory(args, random_weights(args)), tmp_path / "hf")
    config = json.loads((path / "config.json").read_text())["vision_config"]
    peer = Llama4VisionModel(Llama4VisionConfig(**config)).eval()
    stored = load_file(path / "model.safetensors")
    begin = "vision_model."
    peer.load_state_dict({n[len(begin) :]: w for n, w in stored.items() if n.startswith(begin)})
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    theirs = peer(pixels).last_hidden_state @ stored["multi_modal_projector.linear_1.weight"].T
    assert theirs.shape == (2, 144, ARGS.dim) and theirs.std() > 0.1
    found = random_model(args).encode(pixels, (1, 1))
    torch.testing.assert_close(found, theirs.flatten(0, 1), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_logits_are_transformers(model, peer):
    pixels = torch.cat([one.pixels for one in IMAGES])
    ours, theirs = reads(model, ROW, IMAGES), peer(torch.tensor([ROW]), pixels).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    others = [IMAGES[0], llama4_tiles((2, 2), 7), IMAGES[2]]
    assert (reads(model, ROW, others) - ours).abs().max() > 0.1


@torch.inference_mode()
def test_logits_are_metas(model, metas):
    from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput

    tokens = torch.tensor([ROW])
    mask = (tokens == ARGS.vision_token)[..., None]
    h = metas.tok_embeddings(tokens)
    embedding = metas.vision_embeddings([[one.pixels for one in IMAGES]], mask, h)
    given = TransformerInput(
        tokens=tokens, tokens_position=0, image_embedding=MaskedEmbedding(embedding, mask)
    )
    theirs = metas(given).logits[0]
    torch.testing.assert_close(reads(model, ROW, IMAGES), theirs, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_greedy_ids_are_transformers(model, peer):
    pixels = torch.cat([one.pixels for one in IMAGES])
    how = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    theirs = peer.generate(torch.tensor([ROW]), pixel_values=pixels, **how)[0].tolist()
    ids = list(ROW)
    for _ in range(12):
        ids.append(reads(model, ids, IMAGES)[-1].argmax().item())
    assert ids == theirs


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (2, 2), (16, 1)])
def test_the_ids_of_an_image_are_transformers(grid):
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    names = {i: name for name, i in LLAMA4_TOKENS.items()}
    found = "".join(names[i] for i in llama4_ids(grid))
    assert found == Llama4Processor._prompt_split_image(None, grid, 4)


def test_a_template_has_its_images_where_the_chat_format_has_them(tmp_path):
    from transformers.models.llama4.processing_llama4 import chat_template

    tokenizer = Tokenizer(write_llama4_tokenizer(tmp_path))
    image = {"type": "image", "image": b""}
    for content in ([image, "What?"], ["a", image, "b", image], "No <|image|>."):
        dialog = [{"role": "user", "content": content}, {"role": "assistant", "content": "c"}]
        expected = Llama4Format(tokenizer).encode_dialog_prompt(dialog)
        assert TemplateFormat(tokenizer, chat_template).encode_dialog_prompt(dialog) == expected
        images = len(content) // 2 if isinstance(content, list) else 0
        assert expected.count(image_id(tokenizer)) == images


# --- however it is run ---------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("native", [False, True])
def test_chunks_in_blocks_of_the_cache_are_the_whole(model, native):
    """Of three rows of different lengths, that begin at different chunks."""
    run = cpu.swap(random_model(ARGS)) if native else model
    rows = [ROW, ROW[3:], [*range(40)]]
    images = [encoded(model, IMAGES), encoded(model, IMAGES), []]
    places = [[i for i, token in enumerate(row) if token == ARGS.vision_token] for row in rows]
    cut = len(places[1]) - sum(map(len, images[1]))
    assert cut < 0  # the second row has lost its first image's first tokens
    images[1][0] = images[1][0][-cut:]
    seen = [views(*of_row) for of_row in zip(places, images, strict=True)]
    pool = run.new_cache(1 + 3 * 4, PAGE)
    cache = PagedRows(pool, [range(1 + 4 * i, 5 + 4 * i) for i in range(3)], [0, 0, 0], (), seen)
    done = [0, 0, 0]
    found = [[], [], []]
    for step in ([5, 9, 40], [30, 2, 0], [1, 40, 0], [100, 100, 0]):
        new = [row[at : at + n] for row, at, n in zip(rows, done, step, strict=True)]
        for i, ids in enumerate(new):
            if ids:
                of_row = cache.select([i])
                of_row.lengths = [done[i]]
                if native:
                    h = run.hidden_of_rows([ids], of_row)
                else:
                    h = run.hidden(torch.tensor([ids]), done[i], of_row)[0]
                found[i].append(run.logits(h))
                done[i] += len(ids)
    for row, of_row, parts in zip(rows, images, found, strict=True):
        whole = model(torch.tensor([row]), images=[of_row])[0]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused(model):
    [one] = encoded(model, [llama4_tiles((1, 1))])
    with pytest.raises(ValueError, match="images of 4 tokens, and 0 for them"):
        model(torch.tensor([[1, 2]]), images=[[one]])
    with pytest.raises(ValueError, match="vision_token=2304.*isn't one of vocab_size=2304"):
        build(replace(ARGS, vision_token=2304), device="meta")
    with pytest.raises(ValueError, match="vision_width=34 isn't a multiple of 4 times"):
        replace(ARGS, vision_width=34)
    with pytest.raises(ValueError, match="vision_chunk_size=42 isn't a multiple of 2 times"):
        replace(ARGS, vision_chunk_size=42)


# --- files ---------------------------------------------------------------------------------------


def test_meta_to_hugging_face_and_back_is_bit_exact(weights, tmp_path):
    source = InMemory(ARGS, weights)
    one = meta.write(source, tmp_path / "one", 2, torch.bfloat16)
    two = convert(one, tmp_path / "two", "hf", quiet=True, verify=True)
    back = convert(two, tmp_path / "back", "meta", quiet=True, verify=True)
    opened = checkpoint.open(back)
    check_equal(checkpoint.open(one), opened, quiet=True)
    assert opened.left_out == 0
    fields = ("vision_layers", "vision_width", "vision_output", "vision_token", "num_experts")
    for path in (one, two, back):
        found = checkpoint.open(path).args
        assert [getattr(found, f) for f in fields] == [getattr(ARGS, f) for f in fields]


def test_what_transformers_writes_is_read(peer, weights, tmp_path):
    peer.save_pretrained(tmp_path / "theirs")
    check_equal(InMemory(ARGS, weights), checkpoint.open(tmp_path / "theirs"), quiet=True)


def test_released_encoders_are_told_by_both_formats(tmp_path):
    """Of Scout and Maverick, as their files say it."""
    theirs = {
        "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1408, "image_size": 336,
        "initializer_range": 0.02, "intermediate_size": 5632, "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False, "norm_eps": 1e-05, "num_attention_heads": 16,
        "num_channels": 3, "num_hidden_layers": 34, "patch_size": 14, "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0, "projector_input_dim": 4096, "projector_output_dim": 4096,
        "rope_theta": 10000, "vision_feature_layer": -1, "vision_output_dim": 4096,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    metas = {
        "image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14},
        "dim": 1408, "n_layers": 34, "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096,
        "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    from llama.families import llama4_vision_files as files

    expected = ImageArgs(vision_layers=34)
    found = files.read_config({"vision_config": theirs, "image_token_index": 200092})
    assert ImageArgs(**found) == expected == ImageArgs(**files.read_params(metas))
    assert expected.tokens_per_tile == 144 and expected.most_tiles == 17
    assert files.write_params(expected) == {"vision_args": metas}
    for key, value in (("hidden_act", "silu"), ("pixel_shuffle_ratio", 0.25), ("other", 1)):
        with pytest.raises(ValueError, match=f"vision_config: {key}={value}"):
            files.read_config({"vision_config": {**theirs, key: value}})
    for key, value in (("mlp_ratio", 2.0), ("pixel_shuffle_ratio", 0), ("patch_size", 14)):
        with pytest.raises(ValueError, match="vision_args"):
            files.read_params({**metas, key: value})


def test_a_gguf_file_holds_the_text_and_says_so(tmp_path):
    args = replace(
        ARGS, expert_dim=128, num_experts=16, attention_chunk_size=8192, floor_scale=8192.0,
        attn_scale=0.1,
    )  # fmt: skip
    source = InMemory(args, random_weights(args))
    with pytest.warns(UserWarning, match="GGUF holds the text model"):
        file = convert(source, tmp_path / "m.gguf", "gguf", quiet=True, verify=True)
    assert checkpoint.open(file).args.vision_layers is None
    with pytest.raises(ValueError, match="holds the text model alone"):
        gguf.write(source, tmp_path / "n.gguf")


def test_a_config_of_text_alone_leaves_the_encoder_out(hf, weights, tmp_path):
    """Of a file that has one."""
    for file in hf.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = json.loads((hf / "config.json").read_text())
    text = {**whole["text_config"], "architectures": ["Llama4ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(text))
    found = checkpoint.open(tmp_path)
    assert found.left_out == sum(name.startswith("vision_") for name in weights)
    assert found.args == replace(without_images(ARGS), vision_width=1408, vision_heads=16,
        vision_output=4096, vision_chunk_size=336, vision_token=200092,
        **{f: getattr(found.args, f) for f in ("max_seq_len", "max_batch_size")})  # fmt: skip


@torch.inference_mode()
def test_adapters_of_text_and_encoder_are_pefts(peer, weights, tmp_path):
    """Read with its names, merged, and written with the same."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "o_proj", "fc1"]
    adapted = get_peft_model(copy.deepcopy(peer), LoraConfig(target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "theirs")
    theirs = adapted(torch.tensor([ROW]), torch.cat([one.pixels for one in IMAGES])).logits[0]
    adapter = read_adapter(tmp_path / "theirs", ARGS)
    merged = checkpoint.load(Merged(InMemory(ARGS, weights), adapter), build(ARGS, device="meta"))
    torch.testing.assert_close(reads(merged, ROW, IMAGES), theirs, atol=1e-4, rtol=0)
    write_adapter(adapter, tmp_path / "ours", ARGS)
    ours, expected = (
        load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs")
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    with pytest.raises(ValueError, match="what reads images takes no adapters"):
        adapters.add(cpu.swap(random_model(ARGS)), "a", adapter)
