"""Images of requests: what the model makes of them, computed when a row first needs it, and kept.

An image is encoded by one pass of the encoder, between two steps, whatever else is running. The
last ones are kept for rows to come, as far as the shape's `image_cache` allows; rows that run hold
what they need themselves.
"""

from collections import OrderedDict
from itertools import islice
from typing import Any, List, Sequence, Tuple

from llama.engine.rows import Row
from llama.model import Transformer

KEY = 1 << 62  # and up: ids that stand for images in the keys of the prefix cache


def keyed(row: Row) -> List[int]:
    """A row's prompt, in which an image's tokens tell which image it is: prefixes that hold other
    images are others."""
    ids, places = list(row.prompt), iter(row.image_places)
    for tiles, n in zip(row.images, row.image_tokens, strict=True):
        for place in islice(places, n):
            ids[place] = KEY | int.from_bytes(tiles.digest[:8], "big") >> 2
    return ids


def plain(row: Row, ids: List[int]) -> List[int]:
    """Ids for the model, from `keyed` ones."""
    return [row.image_id if id >= KEY else id for id in ids] if row.images else ids


class Images:
    """What a model makes of images; all ranks make the same calls."""

    def __init__(self, model: Transformer):
        self._model: Any = model
        # By digest, with their tiles' number; oldest first.
        self._kept: OrderedDict[bytes, Tuple[Any, int]] = OrderedDict()

    def of(self, row: Row, known: int) -> Sequence[Any]:
        """What the tokens of a row see that come after the first `known`, which are cached."""
        if not row.images or (self._model.early_fusion and known > row.image_places[-1]):
            row.views = None
        elif row.views is None:
            encoded = [self._encoded(tiles) for tiles in row.images]
            row.views = self._model.views(row.image_places, encoded)
        return row.views or ()

    def clear(self) -> None:
        """Forget what isn't in use: the weights have changed."""
        self._kept.clear()

    def _encoded(self, tiles: Any) -> Any:
        found, _ = self._kept.pop(tiles.digest, (None, 0))
        if found is None:
            found = self._model.encode(tiles.pixels, tiles.aspect_ratio)
        self._kept[tiles.digest] = found, len(tiles.pixels)
        args = self._model.params
        most = args.image_cache // args.tokens_per_tile
        while len(self._kept) > 1 and sum(n for _, n in self._kept.values()) > most:
            self._kept.popitem(last=False)
        return found
