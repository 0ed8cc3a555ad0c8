"""Images opened, whatever they come as, and cut into the tiles that an encoder reads."""

import base64
import binascii
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, NamedTuple, Tuple
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import ExifTags, Image

# What to do with an image, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_BLANK = b" \t\n\f\r"  # ASCII white space, which URIs wrapped into lines have within
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
Channels = float | Tuple[float, float, float]


@dataclass(frozen=True)
class Limits:
    """What an image may take: bytes of the file, and pixels, 4 bytes each, before it is decoded."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000


DEFAULTS = Limits()


class Tiles(NamedTuple):
    """An image as an encoder takes it.

    Attributes:
        pixels: (n_tiles, 3, size, size), fp32, normalized; row by row from the top left, and then,
            of an overview, one more.
        aspect_ratio: rows and columns of tiles, Meta's (height, width), without an overview.
        digest: SHA-256 of all that determines the pixels.
    """

    pixels: torch.Tensor
    aspect_ratio: Tuple[int, int]
    digest: bytes


def tile(
    image: Image.Image,
    *,
    size: int = 560,
    max_tiles: int = 4,
    mean: Channels = MEAN,
    std: Channels = STD,
    overview: bool = False,
) -> Tiles:
    """Fit an image into a rectangle of at most max_tiles squares, and cut it into these.

    The rectangle is the one in which the image is enlarged least, or else reduced least. The image
    keeps its proportions, black fills the rest, and it isn't enlarged beyond `size`.

    Source: Meta's `VariableSizeImageTransform` (meta-llama/llama-models, llama3/multimodal), and
    that of llama4/preprocess.py.
    Pixels are bit-identical; only where that one leaves a narrow image no pixels, it keeps one, as
    in transformers.

    Args:
        image: RGB, as `open_image` returns it.
        size: the side of a tile, in pixels; `vision_chunk_size`.
        max_tiles: `vision_max_num_chunks`.
        mean, std: of the channels of pixels from 0 to 1, by which they are normalized.
        overview: where there are several tiles, one more follows: all of the image in a square.
    """
    columns, rows = _grid(image.size, size, max_tiles)
    width, height = columns * size, rows * size
    most = [min(max(image.width, size), width), min(max(image.height, size), height)]
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(_fitted(image.size, *most), Image.Resampling.BILINEAR))
    array = np.array(canvas)  # (height, width, 3)
    tiles = array.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    digest = hashlib.sha256(f"{rows} {columns} {size} ".encode())
    digest.update(array.tobytes())
    if overview and rows * columns > 1:
        whole = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
        digest.update(whole.tobytes())
        tiles = np.concatenate([tiles, whole[None]])
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float().div_(255)
    for of_channels, apply in ((mean, pixels.sub_), (std, pixels.div_)):
        apply(torch.tensor(of_channels).expand(3)[:, None, None])
    return Tiles(pixels.contiguous(), (rows, columns), digest.digest())


def _grid(image: Tuple[int, int], size: int, max_tiles: int) -> Tuple[int, int]:
    """Columns and rows of the best rectangle, of the smallest of several that are equally good."""
    grids: List[Tuple[int, int]] = []
    for n in range(max_tiles, 0, -1):
        grids += [(a, n // a) for a in range(1, n + 1) if n % a == 0]
    # fp32, as in Meta's: other precisions have other ties.
    scales = (torch.tensor(grids) * size / torch.tensor(image)).min(dim=1).values
    enlarging = scales[scales >= 1]
    best = enlarging.min() if len(enlarging) else scales.max()
    fitting = [grid for grid, scale in zip(grids, scales, strict=True) if scale == best]
    return min(fitting, key=math.prod)


def _fitted(image: Tuple[int, int], width: int, height: int) -> Tuple[int, int]:
    """The size of an image that fills a rectangle in one direction."""
    by_width, by_height = width / image[0], height / image[1]
    if by_width < by_height:
        return width, min(math.floor(image[1] * by_width) or 1, height)
    return min(math.floor(image[0] * by_height) or 1, width), height


def open_image(source: Any, limits: Limits = DEFAULTS) -> Image.Image:
    """An image as RGB, upright, on white where it is transparent; the first frame of several.

    Args:
        source: a path, the bytes of a file or its data URI, a `PIL.Image.Image`, or an array of
            (height, width) or (height, width, 1, 3 or 4 channels); a tensor has its channels first.
            Arrays are of 8-bit integers, or of floats from 0 to 1. Files are of FORMATS, detected
            from their content. Addresses are for `llama.vision.fetch`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what isn't an image, is broken, exceeds the limits, or has pixels whose range
            isn't known.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        source = _from_array(source)
    image = source if isinstance(source, Image.Image) else _opened(_data(source, limits))
    if image.width * image.height > limits.max_pixels:
        raise ValueError(
            f"the image has {image.width} x {image.height} pixels, and the limit is "
            f"{limits.max_pixels}: make it smaller"
        )
    if image.mode in ("I", "F"):
        raise ValueError("the range of the image's 32-bit pixels isn't known: convert it to 8 bits")
    try:
        return _rgb(image)
    except Exception as error:  # decoders of broken files raise all kinds
        raise ValueError(f"the image can't be decoded: {error}") from None


def _from_array(array: Any) -> Image.Image:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
        array = (array.movedim(0, -1) if array.ndim == 3 else array).numpy()
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or not array.size:
        raise ValueError(
            f"an image of shape {array.shape}: arrays are (height, width), with 1, 3 or 4 "
            "channels last; tensors have them first"
        )
    if np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image's numbers are uint8 or floats from 0 to 1, not {array.dtype}")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _data(source: Any, limits: Limits) -> bytes:
    """The bytes of a file, whole, at most so many."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        head, comma, text = source.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("a data URI of an image begins with data:image/png;base64, or alike")
        blank = sum(map(text.count, _BLANK.decode()))
        _check((len(text) - blank) * 3 // 4 - 2, limits)
        try:
            packed = unquote_to_bytes(text).translate(None, _BLANK)
            return base64.b64decode(packed, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the image's data URI isn't valid base64: {error}") from None
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        raise ValueError(
            f"{source[:200]} is an address: pass what llama.vision.fetch returns for it"
        )
    if isinstance(source, (str, Path)):
        try:
            if not Path(source).is_file():  # a pipe might never end
                raise FileNotFoundError(f"no such image file: {str(source)[:200]}")
            with Path(source).open("rb") as file:
                source = file.read(limits.max_bytes + 1)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"the image {str(source)[:200]!r} can't be read: {reason}") from None
    if isinstance(source, io.BytesIO):
        source = source.getvalue()
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise ValueError(
            "an image is a path, bytes, a data URI, a PIL image, an array or a tensor, not "
            f"{type(source).__name__}"
        )
    _check(len(source), limits)
    return bytes(source)


def _check(nbytes: int, limits: Limits) -> None:
    if nbytes > limits.max_bytes:
        raise ValueError(f"the image's file has more bytes than the limit, {limits.max_bytes}")


def _opened(data: bytes) -> Image.Image:
    """A file's header; its pixels aren't decoded yet."""
    if not data:
        raise ValueError("the image is empty: it has 0 bytes")
    if data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<svg", b"<?xml", b"<!doc")):
        raise ValueError("the image is SVG or another kind of text: convert it to PNG")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(
            f"the image begins with {data[:12]!r}, and is none of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:
        raise ValueError(f"the image can't be opened: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        # Not by ImageOps.exif_transpose, which fails on other tags that it can't write again.
        clear = image.info.get("transparency")
        image = image.transpose(turn)
        image.info |= {} if clear is None else {"transparency": clear}
    if image.mode.startswith("I;16"):  # Pillow would cut off at 255
        values, clear = np.asarray(image), image.info.get("transparency")
        narrow = (values >> 8).astype(np.uint8)
        image = Image.fromarray(narrow if clear is None else np.where(values == clear, 255, narrow))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")
