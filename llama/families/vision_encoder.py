"""Llama 3.2 Vision's image encoder: from an image's tiles to the features that text attends to.

A vision transformer. The picture is cut into up to four square tiles, and each tile into patches of
14 x 14 pixels; each patch becomes a token, as does, before them, a class embedding for each tile:

    x = conv1(pixels) + position of the tile and of the patch
    for block in transformer: x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))
    for block in global_transformer: the same, each summand times tanh(gate)
    features = vision_projection(x, and what went into five of the transformer's blocks)

In both transformers every token attends to those of all tiles. Meta trained with padding: to four
tiles, and in each tile to a multiple of 8 tokens. What is padding attends to what isn't, which, as
the mask hides padding from padding alone, attends to the padding too: it is part of the result.
Padding is alike in all tiles that aren't there, and so are the last tokens of a tile: each is
computed once, and attended to as often as there are such tokens.

Shapes: n tiles of an image, T tokens of a tile, N of an image with the padding that is computed, W
the encoder's width.
Paper: The Llama 3 Herd of Models, arXiv 2407.21783, section 7; code: Meta's llama-models, 0.3.0.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from llama.layers import parallel
from llama.model import ModelArgs

KEPT = 4  # images, at least
EXTRA_IDS = 8  # embeddings after the vocabulary's; the first stands for an image
# Tokens of a feed-forward network's pass. A hidden layer of 32 MB or more would be new memory each
# time, which Linux clears page by page.
TOGETHER = 2048


@dataclass(frozen=True)
class VisionArgs(ModelArgs):
    """The shape of a model with vision. The first three are in Meta's params.json; the others are
    numbers in Meta's code.

    Raises:
        ValueError: widths that don't divide; cross-attention layers that can't be spread.
    """

    vision_chunk_size: int = 560  # a tile's width and height in pixels
    vision_max_num_chunks: int = 4  # tiles of an image
    vision_num_cross_attention_layers: int = 8
    vision_patch_size: int = 14
    vision_width: int = 1280
    vision_heads: int = 16
    vision_layers: int = 32
    vision_global_layers: int = 8
    vision_features: Tuple[int, ...] = (3, 7, 15, 23, 30)  # blocks whose inputs are features

    def __post_init__(self) -> None:
        super().__post_init__()
        features = self.vision_features
        if not isinstance(features, (list, tuple)) or not all(type(i) is int for i in features):
            raise ValueError(f"vision_features={str(features)[:80]}: whole numbers")
        object.__setattr__(self, "vision_features", tuple(features))
        for whole, part in (
            ("vision_chunk_size", "vision_patch_size"),
            ("vision_width", "vision_heads"),
        ):
            a, b = getattr(self, whole), getattr(self, part)
            if b < 1 or a < b or a % b:
                raise ValueError(f"{whole}={a} isn't a multiple of {part}={b}")
        if len(self.cross_attention_before) != self.vision_num_cross_attention_layers:
            raise ValueError(
                f"vision_num_cross_attention_layers={self.vision_num_cross_attention_layers} can't "
                f"be spread evenly over n_layers={self.n_layers}"
            )
        if [*features] != sorted({*features} & {*range(self.vision_layers)} or [0]):
            raise ValueError(
                f"vision_features={features}: ascending, and each less than "
                f"vision_layers={self.vision_layers}"
            )

    @property
    def cross_attention_before(self) -> List[int]:
        """The layers that a cross-attention layer precedes: every k-th, the last among them."""
        n = max(self.vision_num_cross_attention_layers, 1)
        return [*range(self.n_layers - 1, -1, -math.ceil(self.n_layers / n))][:n][::-1]

    @property
    def image_cache(self) -> int:
        """Tokens of the images whose keys and values are kept: KEPT large ones, or one per row."""
        tokens = self.vision_max_num_chunks * self.tokens_per_tile
        return max(KEPT, self.max_batch_size) * tokens

    @property
    def tiling(self) -> Dict[str, Any]:
        """How `vision.images.tile` cuts an image."""
        return {"size": self.vision_chunk_size, "max_tiles": self.vision_max_num_chunks}

    @property
    def most_tiles(self) -> int:
        """Of an image."""
        return self.vision_max_num_chunks

    def image_tokens(self, tiles: int) -> int:
        """Tokens of the text that stand for an image."""
        return 1

    @property
    def tokens_per_tile(self) -> int:
        """Its patches and its class."""
        return (self.vision_chunk_size // self.vision_patch_size) ** 2 + 1


_Column = partial(ColumnParallelLinear, gather_output=False, init_method=lambda w: w)
_Row = partial(RowParallelLinear, input_is_parallel=True, init_method=lambda w: w)


class Tokens(NamedTuple):
    """The tokens of a pass."""

    real: int  # these come first, and then what is padding
    times: torch.Tensor  # how often each of them is there, (N,)

    @classmethod
    def counted(cls, *groups: Tuple[int, int]) -> "Tokens":
        """Of numbers of tokens, and how often each of them is there."""
        lengths, times = (torch.tensor(numbers) for numbers in zip(*groups, strict=True))
        return cls(groups[0][0], times.repeat_interleave(lengths))


class ImageAttention(nn.Module):
    """Attention of all tokens to all, but of padding to what isn't padding only."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_local_heads = n_heads // parallel.world_size()
        self.wq, self.wk, self.wv = (_Column(width, width, bias=False) for _ in range(3))
        self.wo = _Row(width, width, bias=False)

    def forward(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """(1, N, W) -> (1, N, W)"""
        return self.wo(self.attend(self.wq(x), self.wk(x), self.wv(x), tokens))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens
    ) -> torch.Tensor:
        """Each (1, N, width of this rank's heads), and so is the result."""
        seen = torch.arange(k.shape[1]).repeat_interleave(tokens.times).to(k.device)
        k, v = (part.index_select(1, seen) for part in (k, v))
        q, k, v = (
            part.unflatten(-1, (self.n_local_heads, -1)).transpose(1, 2) for part in (q, k, v)
        )  # (1, n_local_heads, tokens, head_dim)
        real, d = tokens.real, q.shape[-1]
        if q.dtype == torch.bfloat16:  # the matrix units of CPUs take 32: with 80, slower
            q, k, v = (F.pad(part, (0, -d % 32)) for part in (q, k, v))
        attend = partial(F.scaled_dot_product_attention, scale=d**-0.5)
        out = [
            attend(q[:, :, :real], k, v),
            attend(q[:, :, real:], k[:, :, :real], v[:, :, :real]),
        ]
        return torch.cat([part.transpose(1, 2)[..., :d] for part in out], 1).flatten(2)


class ImageFeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = _Column(width, 4 * width, bias=True)
        self.c_proj = _Row(4 * width, width, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, N, W) -> (1, N, W)"""
        parts = [self.c_proj(F.gelu(self.c_fc(part))) for part in x.split(TOGETHER, 1)]
        return torch.cat(parts, 1)


class ImageBlock(nn.Module):
    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.attn = ImageAttention(width, n_heads)
        self.mlp = ImageFeedForward(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), tokens)
        return x + self.mlp(self.ln_2(x))


class GatedImageBlock(ImageBlock):
    def __init__(self, width: int, n_heads: int):
        super().__init__(width, n_heads)
        self.gate_attn, self.gate_ffn = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        x = x + self.gate_attn.tanh() * self.attn(self.ln_1(x), tokens)
        return x + self.gate_ffn.tanh() * self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, blocks: List[nn.Module]):
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its width: one product for each patch."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self._linear = _Column(3 * patch * patch, width, bias=False, gather_output=True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, size, size) -> (n, patches, W), row after row of a tile."""
        return self._linear(F.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2))


class TilePosition(nn.Module):
    """What is added to all tokens of a tile, by its row and column in the picture."""

    def __init__(self, tiles: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(tiles, tiles, 1, width))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, rows: int, columns: int) -> torch.Tensor:
        """(rows * columns, 1, W)"""
        return self.embedding[:rows, :columns].flatten(0, 1) * self.gate.tanh()


class VisionEncoder(nn.Module):
    """place: moves a part to its device and dtype as soon as it is made."""

    def __init__(self, args: VisionArgs, place: Callable[[nn.Module], nn.Module]):
        super().__init__()
        width, tiles, heads = args.vision_width, args.vision_max_num_chunks, args.vision_heads
        self.features, self.max_tiles = args.vision_features, tiles
        self.conv1 = PatchEmbedding(args.vision_patch_size, width)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(args.tokens_per_tile, width))
        shape = (tiles, tiles, args.tokens_per_tile, width)
        self.gated_positional_embedding = nn.Parameter(torch.zeros(shape))
        self.gated_positional_embedding_gate = nn.Parameter(torch.zeros(1))
        self.pre_tile_pos_embed = TilePosition(tiles, width)
        self.post_tile_pos_embed = TilePosition(tiles, width)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(
            [place(ImageBlock(width, heads)) for _ in range(args.vision_layers)]
        )
        self.global_transformer = Blocks(
            [place(GatedImageBlock(width, heads)) for _ in range(args.vision_global_layers)]
        )

    def forward(self, pixels: torch.Tensor, aspect_ratio: Tuple[int, int]) -> torch.Tensor:
        """See `ImageModel`. Returns (n, T, W * (1 + features))."""
        x, gate = self.conv1(pixels), self.gated_positional_embedding_gate.tanh()
        x = x + self.pre_tile_pos_embed(*aspect_ratio)
        n, T = len(x), x.shape[1] + 1
        missing, padding = self.max_tiles - n, 8 - T % 8  # a whole 8 if it is a multiple already
        x = F.pad(x, (0, 0, 0, 0, 0, min(missing, 1)))  # a tile of zeros stands for all of these
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + self.positional_embedding * (1 - gate)
        rows, columns = aspect_ratio
        of_tiles = self.gated_positional_embedding[:rows, :columns].flatten(0, 1)
        x = torch.cat([x[:n] + of_tiles * gate, x[n:]])
        x = F.pad(self.ln_pre(x).flatten(0, 1), (0, 0, 0, 1))[None]  # zeros: the padding of tiles
        real, blank, seen = n * T, x.shape[1] - n * T - 1, []
        tokens = Tokens.counted((real, 1), (blank, missing), (1, self.max_tiles * padding))
        for i, block in enumerate(self.transformer.resblocks):
            if i in self.features:
                seen.append(x[0, :real])
            x = block(x, tokens)
        x, position = self.ln_post(x[0]), self.post_tile_pos_embed(*aspect_ratio)[:, 0]  # (n, W)
        # From here on, the last tokens of a tile aren't those of another.
        of_tiles = x[:real] + position.repeat_interleave(T, 0)
        x = torch.cat([of_tiles, x[real:-1], x[-1:] + position, x[-1:]])[None]
        tokens = Tokens.counted((real, 1), (blank, missing), (n, padding), (1, missing * padding))
        for block in self.global_transformer.resblocks:
            x = block(x, tokens)
        features = torch.stack(seen, -1).flatten(1)  # those of each of W beside each other
        return torch.cat([x[0, :real], features], -1).unflatten(0, (n, T))


class ImageModel(nn.Module):
    """The encoder, and the projection of its features to the text model's width."""

    def __init__(self, args: VisionArgs, place: Callable[[nn.Module], nn.Module]):
        super().__init__()
        world = parallel.world_size()
        if args.vision_heads % world:
            raise ValueError(
                f"{world} ranks can't share the image encoder's {args.vision_heads} heads: use a "
                f"number that divides {args.vision_heads}"
            )
        self.vision_encoder = place(VisionEncoder(args, place))
        width = args.vision_width * (1 + len(args.vision_features))
        self.vision_projection = place(_Column(width, args.dim, bias=True, gather_output=True))

    def forward(self, pixels: torch.Tensor, aspect_ratio: Tuple[int, int]) -> torch.Tensor:
        """Features of one image: (n, T, dim), of n tiles, a class and then patches row by row.

        Args:
            pixels: (n, 3, size, size), tiles row by row.
            aspect_ratio: rows and columns of tiles, n of them.
        """
        weight: Any = self.vision_projection.weight
        features = self.vision_encoder(pixels.to(weight.device, weight.dtype), aspect_ratio)
        return self.vision_projection(features)
