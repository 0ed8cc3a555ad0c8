"""The images of dialogs, as requests take them."""

from typing import Any, List, Optional, Sequence

from llama.engine.rows import model_image_id
from llama.layers import parallel
from llama.model import Transformer
from llama.text.encoder import IMAGE, image_id
from llama.text.messages import image_sources
from llama.tokenizer import Tokenizer
from llama.vision.fetch import Fetcher, load
from llama.vision.images import DEFAULTS, Limits, Tiles, tile


def sees(model: Transformer) -> bool:
    """Whether it can be given images."""
    return model_image_id(model) >= 0


def takes_several(model: Transformer) -> bool:
    """Whether several tokens of the text stand for an image, as many as its tiles ask for."""
    return sees(model) and hasattr(model, "image_layout")


ONLY_TEXT = (
    "this model reads only text, and it is given an image: use a checkpoint of Llama 3.2 Vision or "
    "Llama 4, or leave images out"
)


def check_sees(model: Transformer, dialogs: Sequence[Sequence[Any]]) -> None:
    """Raises ValueError for dialogs with images, and a model that can't be given any.

    Asked before dialogs become ids: what a template says of images would hide the reason.
    """
    if not sees(model) and any(map(image_sources, dialogs)):
        raise ValueError(ONLY_TEXT)


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
        raise ValueError(ONLY_TEXT)
    return [tile(load(source, limits, fetcher), **args.tiling) for source in sources]


def laid_out(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    images: Optional[Sequence[Sequence[Tiles]]],
) -> Sequence[Sequence[int]]:
    """Prompts in which the token of each image (`text.encoder.image_id`) is replaced by those that
    stand for it, where a model takes several. Those that have such already stay as they are.

    Raises:
        ValueError: an image's token, and no image for it.
    """
    if not takes_several(model) or IMAGE not in tokenizer.special_tokens:
        return prompts
    layout: Any = model.image_layout
    token, found = image_id(tokenizer), []
    for row, prompt in enumerate(prompts):
        of_row = images[row] if images and row < len(images) else ()
        if (places := list(prompt).count(token)) not in (0, len(of_row)):
            raise ValueError(f"prompt {row} has {len(of_row)} images, and {places} tokens for them")
        rest = iter(of_row)
        ids: List[int] = []
        for one in prompt:
            own = layout(next(rest).aspect_ratio, tokenizer.special_tokens) if one == token else ()
            ids += own or (one,)
        found.append(ids)
    return found


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
