"""Early fusion: a text model that reads images' features in place of embeddings.

The features of an image take the places of the tokens <|patch|> that stand for it in the text, one
each, and the layers compute both alike. They belong to the caller, who gives them to a forward pass
as `cache.images`: for each row of the cache what `views` makes of its images.

Source: Meta's llama-models, 0.3.0, `llama4/model.py` and `llama4/vision/embedding.py`.
"""

from bisect import bisect_left
from functools import partial
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from torch import nn

from llama.families.llama4_vision import ImageArgs, VisionEmbeddings
from llama.model import Step, Transformer
from llama.text.llama4 import image_ids

_Column = partial(ColumnParallelLinear, bias=False, gather_output=True, init_method=lambda w: w)


class View(NamedTuple):
    """An image in a row."""

    places: Sequence[int]  # positions of its tokens, ascending
    features: torch.Tensor  # of each, (n, dim)


def views(positions: Sequence[int], encoded: Sequence[torch.Tensor]) -> List[View]:
    """The images of a row, from the positions of all their tokens, ascending."""
    found, begin = [], 0
    for features in encoded:
        found.append(View(positions[begin : begin + len(features)], features))
        begin += len(features)
    return found


def fused(
    h: torch.Tensor, images: Sequence[Sequence[View]], starts: Sequence[int], counts: Sequence[int]
) -> torch.Tensor:
    """The embeddings h of rows with `counts` new tokens each, from the positions `starts` on, one
    row after another, (tokens, dim), with images' features where their tokens are."""
    at = 0
    for row, start, count in zip(images, starts, counts, strict=True):
        for places, features in row:
            first, last = bisect_left(places, start), bisect_left(places, start + count)
            if first < last:
                index = torch.tensor(places[first:last], device=h.device) + (at - start)
                h = h.index_copy(0, index, features[first:last].type_as(h))
        at += count
    return h


class EarlyFusion(Transformer):
    """A network that may have an image encoder.

    Raises:
        ValueError: the number of ranks doesn't divide the heads of text or of the image encoder;
            the vocabulary lacks the token of images.
    """

    early_fusion = True  # tokens see of an image what is cached of its own tokens
    views = staticmethod(views)
    params: ImageArgs

    def __init__(
        self,
        params: ImageArgs,
        device: Optional[str | torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(params, device, dtype)
        if params.vision_layers is None:
            return
        if params.vision_token >= params.vocab_size:
            raise ValueError(
                f"vision_token={params.vision_token}, which stands for images, isn't one of "
                f"vocab_size={params.vocab_size} tokens"
            )

        def place(module: nn.Module) -> nn.Module:
            return module.to(device=device, dtype=dtype)

        self.image_id = params.vision_token
        self.vision_embeddings = VisionEmbeddings(params, place)
        self.vision_projection = place(_Column(params.vision_output, params.dim))

    def encode(self, pixels: torch.Tensor, aspect_ratio: Tuple[int, int]) -> torch.Tensor:
        """An image's features, (n · tokens_per_tile, dim).

        Args:
            pixels: (n, 3, size, size), tiles row by row, and the one that shows all.
            aspect_ratio: rows and columns of tiles, without that one.
        """
        weight: Any = self.vision_projection.weight
        features = self.vision_embeddings(pixels.to(weight.device, weight.dtype))
        return self.vision_projection(features).flatten(0, 1)

    def image_layout(self, aspect_ratio: Tuple[int, int], special: Mapping[str, int]) -> List[int]:
        """The ids of the text that stand for an image, from a vocabulary's special tokens."""
        return image_ids(special, aspect_ratio, self.params.tokens_per_tile)

    def forward(
        self,
        tokens: torch.Tensor,
        *args: Any,
        images: Optional[Sequence[Sequence[torch.Tensor]]] = None,
        **options: Any,
    ) -> torch.Tensor:
        """See `Transformer.forward`.

        Args:
            images: without a cache, those of each row, as `encode` returns them. With one, they
                are in `cache.images`.

        Raises:
            ValueError: what `Transformer.forward` raises; features for more or fewer tokens.
        """
        if images is not None:
            found = []
            for row, encoded in zip(tokens.tolist(), images, strict=True):
                places = [i for i, token in enumerate(row) if token == self.image_id]
                if len(places) != (n := sum(map(len, encoded))):
                    raise ValueError(f"images of {n} tokens, and {len(places)} for them")
                found.append(views(places, encoded))
            h, rows = self.tok_embeddings(tokens), len(tokens)
            whole = fused(h.flatten(0, 1), found, [0] * rows, [tokens.shape[1]] * rows)
            tokens = whole.view_as(h)
        return super().forward(tokens, *args, **options)

    def with_images(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        """The embeddings of a pass, (B, T, dim), with the features of its cache's images."""
        cache: Any = step.cache
        if cache is None or not cache.images:
            return h
        B, T, _ = h.shape
        counts = [T] * B if cache.rows == B else cache.counts
        starts = [length - n for length, n in zip(cache.lengths, counts, strict=True)]
        return fused(h.flatten(0, 1), cache.images, starts, counts).view_as(h)
