"""Llama 4's image encoder: from an image's tiles to features, which `llama4_fusion` puts into text.

An image comes as tiles, and, where they are several, as one more that shows all of it. Each tile
goes through a vision transformer on its own. Patches of 14 x 14 pixels become tokens, after which
comes a class embedding:

    x = ln_pre(conv1(pixels) + positional_embedding_vlm)
    for block in transformer: x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))
    features = vision_projection(vision_adapter(ln_post(x)))

Attention has RoPE in two dimensions: half of a head's pairs turn by the patch's column, the others
by its row, both counted from 1; the class doesn't turn. The adapter joins each 2 x 2 neighbours to
one token (pixel shuffle), which two layers with GELU read.

Shapes: n tiles of an image, T tokens of a tile, W the encoder's width.
Source: Meta's llama-models, 0.3.0, `llama4/vision`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from llama.families.vision_encoder import KEPT, Blocks, ImageFeedForward, PatchEmbedding
from llama.layers import parallel
from llama.model import ModelArgs, apply_rotary_emb

ROPE_THETA = 10000.0
TILING: Dict[str, Any] = {"max_tiles": 16, "mean": 0.5, "std": 0.5, "overview": True}


@dataclass(frozen=True)
class ImageArgs(ModelArgs):
    """The shape of an image encoder, if there is one; the values are Llama 4's.

    Raises:
        ValueError: what `ModelArgs` raises; widths that don't divide.
    """

    vision_layers: Optional[int] = None  # None: the model reads text alone
    vision_width: int = 1408
    vision_heads: int = 16
    vision_output: int = 4096  # width of what the adapter gives
    vision_chunk_size: int = 336  # a tile's width and height in pixels
    vision_patch_size: int = 14
    vision_shuffle: int = 2  # patches in each direction that become one token
    vision_token: int = 200092  # the id of <|patch|>

    def __post_init__(self) -> None:
        super().__post_init__()
        for whole, part, n in (
            ("vision_chunk_size", "vision_patch_size", self.vision_shuffle),
            ("vision_width", "vision_heads", 4),
        ):
            a, b = getattr(self, whole), getattr(self, part)
            if b < 1 or a < b or a % (b * n):
                raise ValueError(f"{whole}={a} isn't a multiple of {n} times {part}={b}")

    @property
    def tokens_per_tile(self) -> int:
        """Those of the text."""
        return (self.vision_chunk_size // self.vision_patch_size // self.vision_shuffle) ** 2

    @property
    def tiling(self) -> Dict[str, Any]:
        """How `vision.images.tile` cuts an image."""
        return {"size": self.vision_chunk_size, **TILING}

    @property
    def most_tiles(self) -> int:
        """Of an image, the one that shows all of it included."""
        return TILING["max_tiles"] + 1

    @property
    def image_cache(self) -> int:
        """Tokens of the images whose features are kept: KEPT large ones."""
        return KEPT * self.most_tiles * self.tokens_per_tile

    def image_tokens(self, tiles: int) -> int:
        """Tokens of the text that stand for an image."""
        return tiles * self.tokens_per_tile


_Column = partial(ColumnParallelLinear, gather_output=False, init_method=lambda w: w)
_Row = partial(RowParallelLinear, input_is_parallel=True, init_method=lambda w: w)


def tile_rotations(args: ImageArgs) -> torch.Tensor:
    """RoPE's rotations of a tile's patches, row after row, and of its class: (T, head_dim / 2)."""
    side, half = args.vision_chunk_size // args.vision_patch_size, args.vision_width // 2
    half //= args.vision_heads
    freqs = 1.0 / ROPE_THETA ** (torch.arange(0, half, 2).float() / half)
    patches = torch.arange(side * side)
    angles = [(at + 1.0)[:, None] * freqs for at in (patches % side, patches // side)]
    turned = F.pad(torch.cat(angles, -1), (0, 0, 0, 1))
    return torch.polar(torch.ones_like(turned), turned)


class TileAttention(nn.Module):
    """Attention of all tokens of a tile to all of them."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_local_heads = n_heads // parallel.world_size()
        self.wq, self.wk, self.wv = (_Column(width, width, bias=True) for _ in range(3))
        self.wo = _Row(width, width, bias=True)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        """x: (n, T, W); freqs_cis: (1, T, 1, head_dim / 2)."""
        shape = (self.n_local_heads, -1)
        q, k, v = (linear(x).unflatten(-1, shape) for linear in (self.wq, self.wk, self.wv))
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.wo(out.transpose(1, 2).flatten(2))


class TileBlock(nn.Module):
    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.attn, self.mlp = TileAttention(width, n_heads), ImageFeedForward(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), freqs_cis)
        return x + self.mlp(self.ln_2(x).flatten(0, 1)[None]).view_as(x)


class TileEncoder(nn.Module):
    """place: moves a part to its device and dtype as soon as it is made."""

    def __init__(self, args: ImageArgs, place: Callable[[nn.Module], nn.Module]):
        super().__init__()
        width, self.freqs_cis = args.vision_width, tile_rotations(args)
        self.conv1 = PatchEmbedding(args.vision_patch_size, width)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding_vlm = nn.Parameter(torch.zeros(len(self.freqs_cis), width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        blocks = range(args.vision_layers or 0)
        self.transformer = Blocks([place(TileBlock(width, args.vision_heads)) for _ in blocks])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, size, size) -> (n, patches, W)"""
        x = self.conv1(pixels)
        x = torch.cat([x, self.class_embedding.expand(len(x), 1, -1)], 1)
        x = self.ln_pre(x + self.positional_embedding_vlm)
        self.freqs_cis = self.freqs_cis.to(x.device)
        for block in self.transformer.resblocks:
            x = block(x, self.freqs_cis[None, :, None])
        return self.ln_post(x)[:, :-1]


class Adapter(nn.Module):
    """Two layers, each followed by GELU."""

    def __init__(self, width: int, output: int):
        super().__init__()
        self.c_fc, self.c_proj = (
            _Column(width, output, bias=False),
            _Row(output, output, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.c_proj(F.gelu(self.c_fc(x))))


class PixelShuffle(nn.Module):
    """Squares of neighbouring patches as one token each, and the adapter."""

    def __init__(self, args: ImageArgs):
        super().__init__()
        self.n = args.vision_shuffle
        self.mlp = Adapter(self.n**2 * args.vision_width, args.vision_output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, patches, W) -> (n, tokens_per_tile, vision_output)"""
        side = round(x.shape[1] ** 0.5)
        squares = x.unflatten(1, (side // self.n, self.n, side // self.n, self.n)).transpose(2, 3)
        return self.mlp(squares.flatten(3).flatten(1, 2))


class VisionEmbeddings(nn.Module):
    """The encoder and the adapter."""

    def __init__(self, args: ImageArgs, place: Callable[[nn.Module], nn.Module]):
        super().__init__()
        if args.vision_heads % parallel.world_size():
            raise ValueError(
                f"{parallel.world_size()} ranks can't share the image encoder's "
                f"{args.vision_heads} heads: use a number that divides {args.vision_heads}"
            )
        self.vision_encoder = place(TileEncoder(args, place))
        self.vision_adapter = place(PixelShuffle(args))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision_adapter(self.vision_encoder(pixels))
