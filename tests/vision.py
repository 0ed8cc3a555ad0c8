"""Tiny models that see, and rows of ids with images."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Tuple

import torch
from conftest import random_weights, write_byte_tokenizer

from llama.checkpoint import InMemory, meta
from llama.families.llama4 import Llama4Args
from llama.families.vision_encoder import VisionArgs
from llama.text.llama4 import image_ids
from llama.text.vocabulary.byte_level import llama4_special_tokens
from llama.text.vocabulary.writing import write_for_hugging_face
from llama.tokenizer import Tokenizer

# The features aren't evenly spread, and 17 tokens of a tile are no multiple of 8.
TINY_VISION = VisionArgs(
    dim=64, n_layers=4, n_heads=8, n_kv_heads=2, vocab_size=512, multiple_of=32,
    max_seq_len=128, use_scaled_rope=True, vision_chunk_size=56, vision_max_num_chunks=4,
    vision_num_cross_attention_layers=2, vision_width=32, vision_heads=4, vision_layers=5,
    vision_global_layers=2, vision_features=(1, 3),
)  # fmt: skip
ARGS = replace(TINY_VISION, max_seq_len=131072)  # as files say
IMAGE = TINY_VISION.vocab_size
GRIDS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]

# Text before and between images, several images one after another, and none.
ROWS = [
    [3, IMAGE, 5, 6, 7, 8, 9, 3, 4, 5, 6],
    [IMAGE, IMAGE, 4, 6, IMAGE, 9, 8, 7, 6, 5, 1],
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
    [5, 4, 3, 2, IMAGE, IMAGE, IMAGE, 9, IMAGE, IMAGE, 7],
]


def image(grid, seed=0):
    """An image's tiles: noise, its rows and columns of tiles."""
    n = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    size = TINY_VISION.vision_chunk_size
    return torch.randn(n, 3, size, size, generator=generator), grid


def images_of(rows, seed=0):
    """An image for each of the rows' tokens for one, of all grids in turn."""
    found, at = [], seed
    for row in rows:
        found.append([])
        for _ in range(row.count(IMAGE)):
            found[-1].append(image(GRIDS[at % len(GRIDS)], at))
            at += 1
    return found


class Tiles(NamedTuple):
    """As `llama.vision.images.tile` returns them."""

    pixels: torch.Tensor
    aspect_ratio: Tuple[int, int]
    digest: bytes


def tiled(rows, seed=0):
    """The images of rows, as requests take them."""
    return [
        [Tiles(*one, hashlib.sha256(one[0].numpy()).digest()) for one in row]
        for row in images_of(rows, seed)
    ]


# Llama 4's special tokens after the bytes.
LLAMA4_TOKENS = llama4_special_tokens(256)
TINY_LLAMA4 = Llama4Args(
    dim=128, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=2304, hidden_dim=128, max_seq_len=512,
    num_experts=4, expert_dim=64, nope_layer_interval=4, attention_chunk_size=16, use_qk_norm=True,
    attn_temperature_tuning=True, floor_scale=4.0, attn_scale=0.3, vision_layers=2,
    vision_width=32, vision_heads=2, vision_output=48, vision_chunk_size=56,
    vision_token=LLAMA4_TOKENS["<|patch|>"],
)  # fmt: skip
PER_TILE = 4  # tokens


def llama4_tiles(grid, seed=0):
    """An image's tiles, noise, for Llama 4, and one of all of it where they are several."""
    n = grid[0] * grid[1]
    pixels = torch.randn(n + (n > 1), 3, 56, 56, generator=torch.Generator().manual_seed(seed))
    return Tiles(pixels, grid, hashlib.sha256(pixels.numpy()).digest())


def llama4_ids(grid):
    """The ids that stand for it."""
    return image_ids(LLAMA4_TOKENS, grid, PER_TILE)


def write_llama4_checkpoint(path: Path, args: Llama4Args = TINY_LLAMA4, mp: int = 1) -> Path:
    """A random checkpoint in Meta's format, with bytes and Llama 4's special tokens."""
    meta.write(InMemory(args, random_weights(args)), path, mp)
    write_llama4_tokenizer(path)
    return path


def write_llama4_tokenizer(path: Path) -> Path:
    """A tokenizer.json of bytes and Llama 4's special tokens in a directory; returns the file."""
    found = Tokenizer(write_byte_tokenizer(path / "tokenizer.model")).vocabulary
    (path / "tokenizer.model").unlink()
    names = {"bos_id": "begin_of_text", "eos_id": "end_of_text", "pad_id": "finetune_right_pad"}
    ids = {field: LLAMA4_TOKENS[f"<|{name}|>"] for field, name in names.items()}
    stops = {LLAMA4_TOKENS[f"<|{name}|>"] for name in ("end_of_text", "eot", "eom")}
    own = dict(special_tokens=LLAMA4_TOKENS, n_words=256 + len(LLAMA4_TOKENS), stop_tokens=stops)
    vocabulary = found._replace(pre="llama4", cuts=(None, 0), **own, **ids)
    return write_for_hugging_face(vocabulary, path)


def without_images(args: Llama4Args) -> Llama4Args:
    return replace(args, vision_layers=None)


def logits(model, rows, images):
    return model(torch.tensor(rows), images=[[model.encode(*one) for one in r] for r in images])


def transformers_model(path, **options):
    """What transformers makes of a directory with a model of this shape."""
    from transformers import MllamaForConditionalGeneration

    model, info = MllamaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not any(info.values()), info
    # transformers 5.23 takes what a block returns where Meta (and transformers 4) takes what goes
    # into it, one earlier.
    features = [i - 1 for i in TINY_VISION.vision_features]
    model.model.vision_model.intermediate_layers_indices = features
    return model.eval()


def inputs(rows, images):
    """Of transformers' model: tiles, padded to the most images and tiles, and who sees which."""
    size, tiles = TINY_VISION.vision_chunk_size, TINY_VISION.vision_max_num_chunks
    most = max(map(len, images))
    pixels = torch.zeros(len(rows), most, tiles, 3, size, size)
    ids = torch.zeros(len(rows), most, dtype=torch.long)
    of_tiles = torch.zeros(len(rows), most, tiles, dtype=torch.long)
    seen = torch.zeros(len(rows), len(rows[0]), most, tiles, dtype=torch.long)
    for b, (row, of_row) in enumerate(zip(rows, images, strict=True)):
        places = [i for i, token in enumerate(row) if token == IMAGE]
        for i, (place, (one, grid)) in enumerate(zip(places, of_row, strict=True)):
            pixels[b, i, : len(one)], ids[b, i] = one, GRIDS.index(grid) + 1
            of_tiles[b, i, : len(one)] = 1
            # up to the next image that doesn't follow directly
            later = [p for j, p in enumerate(places) if p > place and p - place != j - i]
            seen[b, place : min(later, default=len(row)), i, : len(one)] = 1
    return dict(
        input_ids=torch.tensor(rows), pixel_values=pixels, aspect_ratio_ids=ids,
        aspect_ratio_mask=of_tiles, cross_attention_mask=seen,
    )  # fmt: skip


def encoded(llama, images):
    return [[llama.model.encode(one.pixels, one.aspect_ratio) for one in row] for row in images]


@torch.inference_mode()
def greedy(llama, row, images, n):
    """Without the engine, and without a cache."""
    seen, ids, logprobs = encoded(llama, [images]), list(row), []
    for _ in range(n):
        logits = llama.model(torch.tensor([ids]), images=seen)[0, -1]
        ids.append(logits.argmax().item())
        logprobs.append(logits.log_softmax(-1).max().item())
    return ids[len(row) :], logprobs


def check(found, expected):
    (tokens, logprobs), (of_tokens, of_logprobs) = found, expected
    assert tokens == of_tokens
    assert torch.allclose(torch.tensor(logprobs), torch.tensor(of_logprobs), rtol=0, atol=1e-4)
