"""The images of dialogs, as requests take them."""

from typing import Any, List, Optional, Sequence

from llama.engine.rows import model_image_id
from llama.layers import parallel
from llama.model import Transformer
from llama.text.messages import image_sources
from llama.vision.fetch import Fetcher, load
from llama.vision.images import DEFAULTS, Limits, Tiles, tile


def sees(model: Transformer) -> bool:
    """Whether it can be given images."""
    return model_image_id(model) >= 0


def tiles_of(
    model: Transformer,
    sources: Sequence[Any],
    limits: Limits = DEFAULTS,
    fetcher: Optional[Fetcher] = None,
) -> List[Tiles]:
    """Images, from what they are given as (`llama.vision.fetch.load`).

    Raises:
        FileNotFoundError, ValueError: what `load` raises; a model that can't be given images.
    """
    args: Any = model.params
    if sources and not sees(model):
        raise ValueError(
            "this model reads only text, and it is given an image: use a checkpoint of Llama 3.2 "
            "Vision, or leave images out"
        )
    size, most = (getattr(args, f"vision_{n}", 0) for n in ("chunk_size", "max_num_chunks"))
    images = (load(source, limits, fetcher) for source in sources)
    return [tile(image, size=size, max_tiles=most) for image in images]


def tiles_of_dialogs(
    model: Transformer, dialogs: Sequence[Sequence[Any]]
) -> Optional[List[List[Tiles]]]:
    """The images of each dialog; None: there are none. Rank 0 reads and fetches them, for all.

    Raises:
        FileNotFoundError, ValueError: what `tiles_of` raises.
    """
    sources = [image_sources(dialog) for dialog in dialogs]
    if not any(sources):
        return None
    return parallel.on_rank_zero(lambda: [tiles_of(model, one) for one in sources])
