"""Images of requests: their keys and values, computed when a row first needs them, and kept.

An image is encoded by one pass of the encoder, between two steps, whatever else is running. The
last ones are kept for rows to come, as far as `VisionArgs.image_cache` allows; rows that run hold
what they need themselves.
"""

from collections import OrderedDict
from typing import Any, List, Sequence

from llama.engine.rows import Row
from llama.families.vision import Encoded, View, views
from llama.model import Transformer

KEY = 1 << 62  # and up: ids that stand for images in the keys of the prefix cache


def keyed(row: Row) -> List[int]:
    """A row's prompt, in which an image's token tells which image it is: prefixes that hold other
    images are others."""
    ids, images = list(row.prompt), row.images
    for place, tiles in zip(row.image_places, images, strict=True):
        ids[place] = KEY | int.from_bytes(tiles.digest[:8], "big") >> 2
    return ids


def plain(row: Row, ids: List[int]) -> List[int]:
    """Ids for the model, from `keyed` ones."""
    return [row.image_id if id >= KEY else id for id in ids] if row.images else ids


class Images:
    """The keys and values of images; all ranks make the same calls."""

    def __init__(self, model: Transformer):
        self._model: Any = model
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()  # by digest; oldest first

    def of(self, row: Row) -> Sequence[View]:
        """What the tokens of a row see."""
        if row.images and row.views is None:
            row.views = views(row.image_places, [self._encoded(tiles) for tiles in row.images])
        return row.views or ()

    def clear(self) -> None:
        """Forget what isn't in use: the weights have changed."""
        self._kept.clear()

    def _encoded(self, tiles: Any) -> Encoded:
        found = self._kept.pop(tiles.digest, None)
        if found is None:
            found = self._model.encode(tiles.pixels, tiles.aspect_ratio)
        self._kept[tiles.digest] = found
        most = self._model.params.image_cache
        while len(self._kept) > 1 and sum(k.shape[2] for k, _ in self._kept.values()) > most:
            self._kept.popitem(last=False)
        return found
