"""Llama 3.2 Vision: Llama's network, with layers of cross-attention in which text reads images.

    before every k-th layer:
        h = h + tanh(gate_attn) · cross_attention(attention_norm(h), keys, values of the images)
        h = h + tanh(gate_ffwd) · feed_forward(ffn_norm(h))

Only tokens that see an image take part. An image is a token of the text, of the first id after the
vocabulary, and from it on the text sees that image, up to the next image's token: a token sees the
last image before it and those whose tokens directly precede that one's. What comes before the first
image sees none, so a text without images is computed as by Llama 3.1, from the same weights.

An image's keys and values are computed once, by `VisionTransformer.encode`, and belong to the
caller, who gives them to a forward pass as `cache.images`: for each row of the cache what `views`
makes of its images.

Shapes: B rows, T new tokens of each, S tokens of the images that a token sees, C layers of
cross-attention. Source: Meta's llama-models, 0.3.0, `llama3/multimodal/model.py`.
"""

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import VocabParallelEmbedding
from torch import nn

from llama.families.vision_encoder import EXTRA_IDS, ImageModel, VisionArgs
from llama.layers import parallel
from llama.layers.cache import KVCache
from llama.layers.ids import check_token_tensor
from llama.model import Attention, FeedForward, RMSNorm, Step, Transformer

# How names of weights begin that only images need.
OF_IMAGES = ("cross_attention_layers.", "learnable_embedding.", "vision_model.")
Encoded = Tuple[torch.Tensor, torch.Tensor]  # keys and values, (C, n_local_kv_heads, S, head_dim)


class View(NamedTuple):
    """What tokens see from a position on, until the next view of the row."""

    start: int
    keys: torch.Tensor  # (C, n_local_kv_heads, S, head_dim)
    values: torch.Tensor


def views(positions: Sequence[int], encoded: Sequence[Encoded]) -> List[View]:
    """What the tokens of a row see, from the positions of its images' tokens, ascending."""
    found: List[View] = []
    begin = 0
    for end in range(1, len(positions) + 1):
        if end < len(positions) and positions[end] == positions[end - 1] + 1:
            continue
        group = encoded[begin:end]  # one after another: each of them sees those before it
        keys, values = (
            group[0][i] if len(group) == 1 else torch.cat([one[i] for one in group], 2)
            for i in (0, 1)
        )
        seen = 0
        for position, (own, _) in zip(positions[begin:end], group, strict=True):
            seen += own.shape[2]
            found.append(View(position, keys[:, :, :seen], values[:, :, :seen]))
        begin = end
    return found


class Seeing(NamedTuple):
    """Which tokens of a pass see something, of all tokens one row after another, and what."""

    tokens: torch.Tensor  # their places, (n,)
    runs: List[Tuple[int, torch.Tensor, torch.Tensor]]  # how many of them have these keys, values


def seeing(
    images: Sequence[Sequence[View]], starts: Sequence[int], counts: Sequence[int]
) -> Seeing:
    """Of rows with `counts` new tokens each, from the positions `starts` on."""
    tokens: List[int] = []
    found = Seeing(torch.empty(0), [])
    at = 0
    for row, start, count in zip(images, starts, counts, strict=True):
        ends = [view.start for view in row[1:]] + [start + count]
        for view, end in zip(row, ends, strict=False):
            first, last = max(view.start, start), min(end, start + count)
            if first < last:
                tokens += range(at + first - start, at + last - start)
                found.runs.append((last - first, view.keys, view.values))
        at += count
    return found._replace(tokens=torch.tensor(tokens, dtype=torch.long))


class CrossAttention(Attention):
    """Attention of text to images: no positions, but normalized queries and keys."""

    def __init__(self, layer_id: int, args: VisionArgs):
        super().__init__(layer_id, args)
        self.q_norm = RMSNorm(args.head_dim, eps=args.norm_eps)
        self.k_norm = RMSNorm(args.head_dim, eps=args.norm_eps)

    def keys_values(self, features: torch.Tensor) -> Encoded:
        """Of an image's features, (S, dim): each (n_local_kv_heads, S, head_dim)."""
        shape = (-1, self.n_local_kv_heads, self.head_dim)
        keys, values = (linear(features).view(shape) for linear in (self.wk, self.wv))
        return self.k_norm(keys).transpose(0, 1), values.transpose(0, 1)

    def read(self, x: torch.Tensor, seen: Seeing) -> torch.Tensor:
        """(tokens, dim) -> (tokens, dim)"""
        q = self.q_norm(self.wq(x).view(len(x), self.n_local_heads, self.head_dim))
        queries = q.split([n for n, _, _ in seen.runs])
        out = [
            self.look(of_run, keys[self.layer_id], values[self.layer_id])
            for of_run, (_, keys, values) in zip(queries, seen.runs, strict=True)
        ]
        return self.wo(torch.cat(out))

    def look(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Tokens that see the same images: (n, n_local_heads, head_dim) -> (n, all of these)."""
        # The queries that share a key/value head form one matrix.
        of_heads = q.view(len(q), self.n_local_kv_heads, -1, self.head_dim).transpose(0, 1)
        found = F.scaled_dot_product_attention(
            of_heads.flatten(1, 2)[None], keys[None], values[None]
        )[0].unflatten(1, (len(q), -1))  # (n_local_kv_heads, n, queries of a head, head_dim)
        return found.transpose(0, 1).reshape(len(q), -1)


class CrossAttentionBlock(nn.Module):
    def __init__(self, layer_id: int, args: VisionArgs):
        super().__init__()
        self.attention = CrossAttention(layer_id, args)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.gate_attn, self.gate_ffwd = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, h: torch.Tensor, seen: Seeing) -> torch.Tensor:
        """h: (B, T, dim)"""
        all_tokens = h.flatten(0, 1)
        x = all_tokens[seen.tokens]
        x = x + self.gate_attn.tanh() * self.attention.read(self.attention_norm(x), seen)
        x = x + self.gate_ffwd.tanh() * self.feed_forward(self.ffn_norm(x))
        return all_tokens.index_copy(0, seen.tokens, x).view_as(h)


class Uncached(KVCache):
    """The images of a pass that caches nothing."""

    def __init__(self, images: Sequence[Sequence[View]]):
        self.images, self.lengths = images, [0] * len(images)

    def extend(self, starts: Sequence[int], n: int) -> None:
        if any(starts):
            raise ValueError(f"positions {starts} need a cache that holds what comes before")
        self.lengths = [n] * len(self.images)


class VisionTransformer(Transformer):
    """See `Transformer`; the first of its EXTRA_IDS further ids stands for an image.

    Raises:
        ValueError: the number of ranks doesn't divide the heads of text or of the image encoder.
    """

    early_fusion = False
    views = staticmethod(views)

    def __init__(
        self,
        params: VisionArgs,
        device: Optional[str | torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(params, device, dtype)

        def place(module: nn.Module) -> nn.Module:
            return module.to(device=device, dtype=dtype)

        self.image_id = params.vocab_size
        rows = parallel.padded(EXTRA_IDS, parallel.world_size())
        self.learnable_embedding = place(
            VocabParallelEmbedding(rows, params.dim, init_method=lambda w: w)
        )
        # The layers that each cross-attention layer precedes, by their places in `layers`.
        self.before = {layer: i for i, layer in enumerate(params.cross_attention_before)}
        self.cross_attention_layers = nn.ModuleList(
            place(CrossAttentionBlock(i, params)) for i in self.before.values()
        )
        self.vision_model = ImageModel(params, place)

    def encode(self, pixels: torch.Tensor, aspect_ratio: Tuple[int, int]) -> Encoded:
        """An image's keys and values for each layer of cross-attention, of this rank's heads.

        Args:
            pixels: (tiles, 3, size, size), row by row.
            aspect_ratio: rows and columns of tiles.
        """
        features = self.vision_model(pixels, aspect_ratio).flatten(0, 1)
        blocks: Any = self.cross_attention_layers
        found = [block.attention.keys_values(features) for block in blocks]
        keys, values = (torch.stack(parts) for parts in zip(*found, strict=True))
        return keys, values

    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: int | Sequence[int] | torch.Tensor = 0,
        cache: Optional[KVCache] = None,
        *,
        images: Optional[Sequence[Sequence[Encoded]]] = None,
        **options: Any,
    ) -> torch.Tensor:
        """See `Transformer.forward`.

        Args:
            images: without a cache, those of each row, in the order of their tokens, as `encode`
                returns them. With one, they are in `cache.images`.

        Raises:
            ValueError: what `Transformer.forward` raises; not as many images as tokens for them.
        """
        if not tokens.is_floating_point():
            check_token_tensor(tokens, self.vocab_size + EXTRA_IDS)
        if images is not None:
            if cache is not None:
                raise ValueError("with a cache, images go into cache.images")
            found = []
            for row, encoded in zip(tokens.tolist(), images, strict=True):
                places = [i for i, token in enumerate(row) if token == self.image_id]
                if len(places) != len(encoded):
                    raise ValueError(f"{len(encoded)} images, and {len(places)} tokens for them")
                found.append(views(places, encoded))
            cache = Uncached(found)
        return self.logits(self.hidden(tokens, start_pos, cache, **options))

    def hidden(self, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        h = tokens if tokens.is_floating_point() else self.embed(tokens)
        return super().hidden(h, *args, **options)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., dim)"""
        extra = tokens >= self.vocab_size
        h = self.tok_embeddings(tokens.where(~extra, 0))
        more = self.learnable_embedding((tokens - self.vocab_size).where(extra, 0))
        return torch.where(extra[..., None], more.type_as(h), h)

    def run_layers(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        seen, step = self.seeing(h, step)
        for i, layer in enumerate(self.layers):
            if i in self.before and seen.runs:
                h = self.cross_attention_layers[self.before[i]](h, seen)
            h = layer(h, step)
        return h

    def seeing(self, h: torch.Tensor, step: Step) -> Tuple[Seeing, Step]:
        """What the tokens of a pass see, and the pass of the layers that see nothing of it."""
        cache: Any = step.cache
        if cache is None or not cache.images:
            return Seeing(h, []), step
        B, T, _ = h.shape
        counts = [T] * B if cache.rows == B else cache.counts
        starts = [length - n for length, n in zip(cache.lengths, counts, strict=True)]
        found = seeing(cache.images, starts, counts)
        step = step._replace(cache=None) if isinstance(cache, Uncached) else step
        return found._replace(tokens=found.tokens.to(h.device)), step
