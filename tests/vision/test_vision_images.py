"""Tiles against Meta's and transformers'; images of all kinds, broken ones, and hostile ones."""

import base64
import io
import os
import random
import struct
import subprocess
import sys
import types
import zlib
from dataclasses import replace
from functools import partial, reduce
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin
from vision import LLAMA4_TOKENS, TINY_LLAMA4

from llama.text.llama4 import image_ids
from llama.vision.images import Limits, open_image, tile


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Coarse noise: neighbouring pixels differ, and differ otherwise elsewhere."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (min(height, 97), min(width, 89), 3), dtype=np.uint8)
    repeated = np.tile(small, (-(-height // small.shape[0]), -(-width // small.shape[1]), 1))
    return Image.fromarray(repeated[:height, :width]).convert(mode)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def metas():
    """Imports of Meta's modules. What they take of torchvision, which need not be installed, is
    here in the words of torchvision's documentation: to_tensor divides by 255 and puts channels
    first, normalize subtracts the mean and divides by the deviation, resize is Pillow's."""

    class ToTensor:
        def __call__(self, image):
            array = torch.from_numpy(np.array(image, np.uint8))
            return array.permute(2, 0, 1).contiguous().to(torch.float32).div(255)

    class Normalize:
        def __init__(self, mean, std, inplace):
            self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

        def __call__(self, tensor):
            return tensor.sub_(self.mean).div_(self.std)

    def resize(image, size, interpolation=Image.Resampling.BILINEAR):
        return image.resize(size[::-1], interpolation)

    def compose(steps):
        return lambda image: reduce(lambda value, step: step(value), steps, image)

    modules = {
        "torchvision": types.ModuleType("torchvision"),
        "torchvision.transforms": types.ModuleType("torchvision.transforms"),
    }
    modes = types.SimpleNamespace(BILINEAR=Image.Resampling.BILINEAR)
    modules["torchvision.transforms"].__dict__.update(
        ToTensor=ToTensor, Normalize=Normalize, InterpolationMode=modes, Compose=compose,
        Resize=lambda size: partial(resize, size=size),
        functional=types.SimpleNamespace(resize=resize),
    )  # fmt: skip
    modules["torchvision"].transforms = modules["torchvision.transforms"]
    names = [
        "llama_models.llama3.multimodal.image_transform", "llama_models.llama4.preprocess",
        "llama_models.llama4.chat_format",
    ]  # fmt: skip

    def load(name):
        with pytest.MonkeyPatch.context() as patch:
            for one, module in modules.items():
                patch.setitem(sys.modules, one, module)
            for one in names:  # others may have imported them without, and will
                patch.delitem(sys.modules, one, raising=False)
            found = import_module(name)
            for one in names:
                sys.modules.pop(one, None)
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # which Llama 4's set, for the whole process
        return found

    return load


@pytest.fixture(scope="module")
def meta_transform(metas):
    found = metas("llama_models.llama3.multimodal.image_transform")
    return found.VariableSizeImageTransform


@pytest.fixture(scope="module")
def meta_llama4(metas):
    """Llama 4's way of images into prompts, with bytes as tokens, and tiles of 64 pixels."""
    form, args = metas("llama_models.llama4.chat_format"), metas("llama_models.llama4.args")
    side = args.Size(height=64, width=64)
    vision = args.VisionArgs(
        image_size=side, patch_size=args.Size(height=16, width=16), dim=8, n_layers=1, n_heads=1,
        mlp_ratio=4.0, output_dim=8, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    words = types.SimpleNamespace(
        special_tokens=LLAMA4_TOKENS, encode=lambda s, bos, eos: list(s.encode())
    )
    return form.ChatFormat(words, vision)


SIDES = st.one_of(
    st.integers(1, 3000), st.sampled_from([1, 2, 447, 448, 449, 559, 560, 561, 1120, 2240])
)


@settings(max_examples=40)
@given(SIDES, SIDES, st.sampled_from([448, 560]), st.integers(1, 4))
@example(1, 1, 560, 4)
@example(3000, 200, 448, 4)
@example(200, 3000, 560, 3)
@example(560, 560, 560, 4)
@example(1121, 1119, 560, 4)
@example(2240, 560, 560, 4)
def test_pixels_are_metas_to_the_bit(meta_transform, width, height, size, max_tiles):
    image = noise(min(width, 200 * height), min(height, 200 * width), width + height)
    expected, ratio = meta_transform(size)(image, max_tiles)
    tiles = tile(image, size=size, max_tiles=max_tiles)
    assert tiles.aspect_ratio == ratio
    assert tiles.pixels.dtype == torch.float32 and tiles.pixels.is_contiguous()
    assert torch.equal(tiles.pixels, expected)


def test_aspect_ratios_are_metas_for_all_proportions(meta_transform):
    """Without pixels: what both choose for every proportion, at small and large sizes."""
    theirs = meta_transform(64)
    for max_tiles in (1, 4, 6):
        grids = torch.tensor(theirs.find_supported_resolutions(max_tiles, 64))
        for width in (1, 7, 50, 63, 64, 65, 128, 200, 256, 333):
            for height in range(1, 340, 11):
                best = theirs.get_best_fit((width, height), grids)
                found = tile(Image.new("RGB", (width, height)), size=64, max_tiles=max_tiles)
                assert found.aspect_ratio == (best[1] // 64, best[0] // 64), (width, height)


@settings(max_examples=30)
@given(st.integers(1, 400), st.integers(1, 400))
@example(64, 64)
@example(65, 64)
@example(1024, 64)
@example(256, 256)
@example(1000, 900)
def test_llama4s_tiles_and_ids_are_metas_to_the_bit(meta_llama4, width, height):
    from llama_models.datatypes import RawMediaItem, RawTextItem

    image = noise(width, height, width)
    content = [RawMediaItem(data=io.BytesIO(saved(image))), RawTextItem(text="What?")]
    theirs = meta_llama4.encode_content(content)
    ours = tile(image, **replace(TINY_LLAMA4, vision_chunk_size=64, vision_patch_size=16).tiling)
    assert torch.equal(ours.pixels, theirs.images[0])
    ids = image_ids(LLAMA4_TOKENS, ours.aspect_ratio, 4)
    assert [LLAMA4_TOKENS["<|begin_of_text|>"], *ids, *b"What?"] == theirs.tokens
    assert len(ours.pixels) * 4 == ids.count(LLAMA4_TOKENS["<|patch|>"])


@pytest.mark.slow
def test_pixels_are_transformers():
    """Its processor for Pillow, which multiplies by 1/255 where Meta divides: 1e-6 apart."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    for width, height in [(1, 1), (300, 800), (3000, 200), (1000, 1000), (1, 10_000)]:
        image = noise(width, height)
        theirs = MllamaImageProcessorPil(
            size={"height": 448, "width": 448},
            max_image_tiles=4,
            image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711],
        )(image, return_tensors="pt")
        ours = tile(image, size=448)
        rows, columns = ours.aspect_ratio
        pixels = theirs["pixel_values"][0, 0, : theirs["num_tiles"][0][0]]
        assert rows * columns == theirs["num_tiles"][0][0]
        assert (ours.pixels - pixels).abs().max() <= 1e-6


def test_digests_tell_pixels_apart():
    image = noise(100, 50)
    other = image.copy()
    other.putpixel((99, 49), (1, 2, 3))
    digests = {
        tile(one, size=size, max_tiles=n).digest
        for one, size, n in [(image, 56, 4), (other, 56, 4), (image, 28, 4), (image, 56, 1)]
    }
    assert len(digests) == 4
    assert tile(image.copy(), size=56).digest == tile(image, size=56).digest
    # The same bytes as 1 x 4 and as 2 x 2 tiles.
    black = [tile(Image.new("RGB", size), size=8).digest for size in [(32, 8), (16, 16)]]
    assert black[0] != black[1]


def test_sources_of_an_image_are_the_same_image(tmp_path):
    image = noise(30, 20)
    data = saved(image)
    path = tmp_path / "a.jpeg"  # the extension says nothing
    path.write_bytes(data)
    array = np.array(image)
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    lines = "data:image/jpeg;base64,\n " + base64.encodebytes(data).decode()  # of 76 characters
    sources = [
        path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), uri, image,
        uri.replace("+", "%2B"), lines, lines.replace("\n", "%0D%0A"), array, array / 255,
        (array / 255).astype(np.float16), tensor, tensor / 255, (tensor / 255).requires_grad_(),
    ]  # fmt: skip
    for source in sources:
        found = open_image(source)
        assert found.mode == "RGB" and np.array_equal(np.array(found), array), type(source)
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for source in (gray, gray[..., None], torch.from_numpy(gray)[None]):
        assert np.array_equal(np.array(open_image(source)), np.stack([gray] * 3, -1))
    clear = np.zeros((2, 2, 4), np.uint8)
    assert np.array(open_image(clear)).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    """Against the specification: which side of the scene row 0 and column 0 of the file are."""
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(np.array(open_image(data))[..., 0], upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind, value", [(2, b"wd\0\0"), (9, b"\xff\xff\xff\xfb")])
def test_exif_rotation_needs_no_other_tag(kind, value):
    """An ImageWidth that is a text, or negative: Pillow can't write these again."""
    tags = b"\1\0" + kind.to_bytes(2) + b"\0\0\0\1" + value  # ImageWidth, one value
    tags += b"\1\x12\0\3\0\0\0\1\0\6\0\0"  # Orientation
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + tags + b"\0\0\0\0"
    found = open_image(saved(noise(40, 30), "JPEG", exif=exif))
    assert found.size == (30, 40)


def test_kinds_of_pixels_are_read_as_they_are_meant():
    def pixel(data):
        return open_image(data).getpixel((0, 0))

    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):  # the first frame
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert pixel(data) == (255, 0, 0), kind
    r, g, b = pixel(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert r > 250 and g < 5 and b < 5
    clear = Image.fromarray(np.array([[0, 65535, 512]], np.uint16))
    found = np.array(open_image(saved(clear, transparency=0)))[..., 0]
    assert found.tolist() == [[255, 255, 2]]
    deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)  # 16 bits
    found = np.array(open_image(saved(Image.fromarray(deep))))[0, :, 0]
    assert found.tolist() == [0, 0, 1, 128, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for transparency in (0, bytes([0, 255])):  # an index, or alpha of each color
        image = open_image(saved(palette, transparency=transparency))
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]
    assert pixel(saved(Image.new("LA", (1, 1), (0, 0)))) == (255, 255, 255)
    assert pixel(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))) == (204, 204, 204)
    assert pixel(saved(Image.new("RGB", (1, 1), "red"), transparency=(255, 0, 0))) == (255,) * 3
    assert pixel(saved(Image.new("1", (1, 1), 1))) == (255, 255, 255)
    narrow = tile(open_image(saved(noise(10_000, 1))))
    assert narrow.aspect_ratio == (1, 4) and bool(narrow.pixels.isfinite().all())
    assert tile(open_image(saved(noise(1, 10_000)))).aspect_ratio == (4, 1)


def png(width: int, height: int, compressed: bytes = b"", *chunks: bytes) -> bytes:
    """A PNG file of 8-bit gray, with any pixels and further chunks."""

    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    bodies = [header, *chunks, b"IDAT" + compressed, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, bodies))


REFUSED = {
    "empty": (b"", "0 bytes"),
    "text": (b"hello", "is none of PNG, JPEG, GIF, WEBP, BMP"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "svg with a head": (b"\n<?xml version='1.0'?><svg/>", "SVG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of"),
    "truncated": (saved(noise(50, 50))[:-900], "can't be decoded"),
    "truncated JPEG": (saved(noise(50, 50), "JPEG")[:-300], "can't be decoded"),
    "only a header": (saved(noise(50, 50))[:20], "begins with|can't be opened"),
    "bomb": (png(20_000, 20_000, zlib.compress(bytes(20_001))), "400000000|20000 x 20000"),
    "bomb below Pillow's limit": (png(8_000, 8_000), "8000 x 8000 pixels, and the limit is 500000"),
    "no pixels": (png(0, 5), "can't be opened|is none of"),
    "bomb in a text": (
        png(1, 1, zlib.compress(b"00"), b"zTXta\0\0" + zlib.compress(bytes(90_000_000))),
        "can't be opened|can't be decoded",
    ),
    "too many bytes": (bytes(20_000_001), "more bytes than the limit, 20000000"),
    "data without base64": ("data:image/png,abc", "base64"),
    "data of another kind": ("data:image/png;base64,AA*A", "isn't valid base64"),
    "address": ("https://example.com/a.png", "llama.vision.fetch"),
    "long data": ("data:image/png;base64," + "A" * 30_000_000, "more bytes than the limit"),
    "long name": ("x" * 5000, "can't be read"),
    "a list": ([1, 2], "not list"),
    "none": (None, "not NoneType"),
    "integers": (np.zeros((2, 2), np.int64), "uint8 or floats from 0 to 1, not int64"),
    "floats beyond 1": (np.full((2, 2), 255.0), "not float64"),
    "nan": (np.full((2, 2), np.nan), "not float64"),
    "channels": (np.zeros((2, 2, 5), np.uint8), r"\(2, 2, 5\)"),
    "no rows": (np.zeros((0, 2, 3), np.uint8), r"\(0, 2, 3\)"),
    "32 bits": (Image.new("F", (2, 2)), "32-bit pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_one_clear_error(name):
    source, said = REFUSED[name]
    with pytest.raises(ValueError, match=said) as caught:
        open_image(source)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_files_that_are_not_there_or_never_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "pipe", "a\0b"):
        with pytest.raises(FileNotFoundError, match="no such image file"):
            open_image(path)
    (tmp_path / "large").write_bytes(saved(noise(50, 50)))
    with pytest.raises(ValueError, match="more bytes than the limit, 100"):
        open_image(tmp_path / "large", Limits(max_bytes=100))


MEMORY = """
import re, sys
from pathlib import Path
from llama.vision.images import open_image, tile
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
for path in sys.argv[1:]:
    try:
        tile(open_image(path))
    except ValueError:
        pass
    print((peak() - before) // 1000)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_limit_of_pixels(tmp_path):
    """A text of 90 MB, hundreds of millions of pixels in a few bytes, the largest accepted."""
    files = {
        "webp": saved(Image.new("RGB", (8_000, 8_000)), "WEBP", lossless=True, method=0),
        "text": REFUSED["bomb in a text"][0],
        "bomb": REFUSED["bomb"][0],
        "largest": saved(Image.new("L", (10_000, 5_000)), "PNG", compress_level=1),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in files)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *refused, accepted = map(int, run.stdout.split())  # MB
    assert max(refused) < 150
    assert 50 < accepted < 450  # less than 9 bytes a pixel


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, left out, put in or repeated; lengths and sizes most of all."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        at = rng.randrange(min(len(data), rng.choice([64, len(data)])) or 1)
        match rng.randrange(6):
            case 0 | 1:
                data[at : at + 1] = bytes([rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])])
            case 2:
                data[at : at + 4] = struct.pack(rng.choice("><") + "I", rng.getrandbits(32))
            case 3:
                del data[at : at + rng.choice([1, 4, 50])]
            case 4:
                data[at:at] = data[at : at + rng.choice([1, 16, 300])]
            case 5 if rng.random() < 0.2:
                del data[at:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_mutated_files_are_images_or_clear_errors():
    """LLAMA_IMAGES of them: a tiled image, or ValueError, and nothing else."""
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 100, zip=True)
    image = noise(40, 30)
    frames = [noise(40, 30, seed) for seed in (1, 2)]
    seeds = [
        saved(image, pnginfo=text, exif=exif),
        saved(image, "JPEG", exif=exif),
        saved(image, "JPEG", progressive=True),
        saved(image.convert("CMYK"), "JPEG"),
        saved(image, "GIF", save_all=True, append_images=frames),
        saved(image, "WEBP"),
        saved(image, "WEBP", save_all=True, append_images=frames, lossless=True),
        saved(image, "BMP"),
        saved(image.convert("P"), "BMP"),
        saved(image.convert("P"), transparency=0),
        saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))),
    ]
    counts = {"image": 0, "error": 0}
    for seed in range(int(os.environ.get("LLAMA_IMAGES", 120))):
        rng = random.Random(seed)
        data = mutated(rng.choice(seeds), rng)
        try:
            found = tile(open_image(data, Limits(max_pixels=4_000_000)), size=28)
            assert bool(found.pixels.isfinite().all())
            counts["image"] += 1
        except ValueError as error:
            assert "\n" not in str(error)
            counts["error"] += 1
    assert min(counts.values()) > sum(counts.values()) // 10, counts  # both kinds occur
