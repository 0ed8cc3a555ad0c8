"""A tiny model that sees, and rows of ids with images."""

import hashlib
from dataclasses import replace
from typing import NamedTuple, Tuple

import torch

from llama.families.vision_encoder import VisionArgs

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


def logits(model, rows, images):
    return model(torch.tensor(rows), images=[[model.encode(*one) for one in r] for r in images])


def transformers_model(path):
    """What transformers makes of a directory with a model of this shape."""
    from transformers import MllamaForConditionalGeneration

    model, info = MllamaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
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
