"""Requests with images for Llama 4, as `test_images.py` has them for Llama 3.2 Vision; dialogs."""

import io

import numpy as np
import pytest
from conftest import run_ranks
from PIL import Image
from vision import (
    LLAMA4_TOKENS,
    PER_TILE,
    check,
    greedy,
    llama4_ids,
    llama4_tiles,
    write_llama4_checkpoint,
)

from llama import Llama
from llama.engine.beam import beam_search
from llama.engine.seeing import laid_out
from llama.text import guard
from llama.text.encoder import image_id
from llama.vision.images import tile

OPTIONS = dict(temperature=0, logprobs=True, stop_tokens=set())
ONE, TWO = llama4_tiles((1, 2), 1), llama4_tiles((2, 2), 2)
ROWS = [
    [3, *llama4_ids((1, 2)), 5, 6, 7],
    [*range(40, 90)],
    [*llama4_ids((2, 2)), 9, *llama4_ids((1, 2)), 11],
]
IMAGES = [[ONE], [], [TWO, ONE]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_llama4_checkpoint(tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(scope="module", params=[None, False])
def llama(request, path) -> Llama:
    """With the CPU kernels, and without."""
    how = dict(device="cpu", dtype="fp32", compile=request.param)
    return Llama.build(path, max_batch_size=8, max_seq_len=512, **how)


def test_rows_with_no_one_and_two_images_in_a_batch(llama):
    tokens, logprobs = llama.generate(ROWS, 8, images=IMAGES, **OPTIONS)
    for i, row in enumerate(ROWS):
        check((tokens[i], logprobs[i]), greedy(llama, row, IMAGES[i], 8))


@pytest.mark.parametrize("chunk", [7, 200])
def test_in_chunks_beside_others(llama, chunk):
    engine = llama.engine(max_tokens_per_step=chunk, max_rows=2)
    requests = [
        engine.add(row, 6, images=[of_row], **OPTIONS)
        for row, of_row in zip(ROWS, IMAGES, strict=True)
    ]
    for request, row, of_row in zip(requests, ROWS, IMAGES, strict=True):
        events = list(engine.events(request))
        found = [e.token for e in events], [e.logprob for e in events]
        check(found, greedy(llama, row, of_row, 6))


def test_features_are_held_only_while_a_prompt_is_computed(llama):
    engine = llama.engine()
    request = engine.add(ROWS[2], 6, images=[IMAGES[2]], **OPTIONS)
    engine.step()
    [row] = request.rows
    assert len(row.views) == 2
    engine.step()
    assert row.views is None and not request.finished


def test_prefixes_are_of_the_same_images(llama):
    engine, calls, encode = llama.engine(cache_tokens=2048), [], llama.model.encode
    text = [7, *llama4_ids((1, 2)), *range(20, 150)]
    one, other = llama4_tiles((1, 2), 5), llama4_tiles((1, 2), 6)

    def ask(image):
        [*_, last] = events = list(engine.events(engine.add(text, 4, images=[[image]], **OPTIONS)))
        check(([e.token for e in events], [e.logprob for e in events]),
              greedy(llama, text, [image], 4))  # fmt: skip
        return last.cached_tokens

    n = len(text) - 1
    assert [ask(one), ask(other), ask(one), ask(other)] == [0, 2, n, n]
    engine.images.clear()
    with pytest.MonkeyPatch.context() as patch:  # what is cached needs no image any more
        patch.setattr(llama.model, "encode", lambda *a: calls.append(a) or encode(*a))
        list(engine.events(engine.add(text, 4, images=[[one]], **OPTIONS)))
    assert not calls


def test_the_token_of_an_image_stands_for_its_tiles(llama):
    token = image_id(llama.tokenizer)
    short = [[3, token, 5, 6, 7], ROWS[1], [token, 9, token, 11]]
    assert laid_out(llama.model, llama.tokenizer, short, IMAGES) == ROWS
    assert laid_out(llama.model, llama.tokenizer, ROWS, IMAGES) == ROWS
    tokens, logprobs = llama.generate(ROWS, 4, images=IMAGES, **OPTIONS)
    assert llama.generate(short, 4, images=IMAGES, **OPTIONS) == (tokens, logprobs)
    with pytest.raises(ValueError, match="prompt 1 has 0 images, and 1 tokens for them"):
        llama.generate([[1], [token]], 1, images=[[], []])
    with pytest.raises(ValueError, match="prompt 0 has 0 images, and 1 tokens for them"):
        llama.generate([[token]], 1)
    with pytest.raises(ValueError, match="prompt 0 has 1 images, and 5 tokens for them"):
        llama.generate([[LLAMA4_TOKENS["<|patch|>"]] * 5], 1, images=[[llama4_tiles((1, 1))]])
    with pytest.raises(ValueError, match="prompt 0 has .* tokens, and max_seq_len is 512"):
        llama.generate([[token] * 6], 1, images=[[llama4_tiles((4, 4))] * 6])


def test_beams_are_of_text(llama, monkeypatch):
    """The token of images is none of theirs, however probable: it would ask for an image."""
    patch, logits = LLAMA4_TOKENS["<|patch|>"], llama.model.logits

    def probable(h):
        found = logits(h)
        found[..., patch] = found.amax(-1) + 1
        return found

    with monkeypatch.context() as patched:
        patched.setattr(llama.model, "logits", probable)
        beams = beam_search(llama._calls.plain, [3, 4], 4, 2, stop_tokens=set())
    assert len(beams) == 2 and all(patch not in beam.tokens for beam in beams)
    for call in (llama.beam_search, llama.stream_beams):
        with pytest.raises(ValueError, match="prompt 1 has an image.*text_completion"):
            call(["a", [{"type": "image", "image": picture(1)}, "What?"]], 2, 4)


# --- dialogs -------------------------------------------------------------------------------------


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(*parts) -> dict:
    content = [p if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


DIALOGS = [
    [user(picture(1), "What?")],
    [{"role": "user", "content": "No image."}],
    [user("a", picture(2, 20, 20), "b"), {"role": "assistant", "content": "c"},
     user(picture(3, 30, 200), picture(1), "d")],
]  # fmt: skip


def test_a_dialog_with_images_is_its_ids_and_its_tiles(llama):
    ids = [llama.formatter.encode_dialog_prompt(dialog) for dialog in DIALOGS]
    parts = [[p for m in dialog for p in m["content"] if isinstance(p, dict)] for dialog in DIALOGS]
    args = llama.model.params
    tiles = [[tile(part["image"], **args.tiling) for part in row] for row in parts]
    assert [one.aspect_ratio for one in tiles[2]] == [(1, 1), (4, 1), (2, 2)]
    tokens, logprobs = llama.generate(ids, 6, 0, logprobs=True, stop_tokens=set(), images=tiles)
    how = dict(OPTIONS, max_gen_len=6)
    found = llama.chat_completion(DIALOGS, **how)
    assert [p["logprobs"] for p in found] == logprobs
    texts = [llama.tokenizer.decode(row) for row in tokens]
    assert [p["generation"]["content"] for p in found] == texts
    alone = [llama.chat_completion([dialog], **how)[0]["tokens"] for dialog in DIALOGS]
    assert alone == [p["tokens"] for p in found]
    streamed = [""] * 3
    for event in llama.stream_chat(DIALOGS, **how):
        streamed[event.row] += event.text
    assert streamed == texts
    others = [[user(picture(9), "What?")], *DIALOGS[1:]]
    assert llama.chat_completion(others, **how)[0]["logprobs"] != logprobs[0]


def test_speculation_reads_text_with_images_as_well(llama):
    how = dict(OPTIONS, images=IMAGES, logprobs=False)
    expected = llama.generate(ROWS, 24, **how)
    assert llama.generate(ROWS, 24, speculate="lookup", **how) == expected


def test_a_guard_judges_what_it_is_shown(path, monkeypatch):
    llama = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=4096)
    asked, make = [], llama._calls.make
    monkeypatch.setattr(
        llama._calls, "make", lambda *a, **k: asked.append(made := make(*a, **k)) or made
    )
    monkeypatch.setattr(llama.tokenizer, "decode", lambda ids: "safe")
    assert guard.classify(llama, [[user(picture(1), "How?")]]) == [guard.Verdict(True)]
    [row] = asked[0].rows
    assert len(row.image_places) == 5 * PER_TILE
    with pytest.raises(ValueError, match="prompt 0 has 0 images, and 1 tokens for them"):
        llama.generate([guard.prompt(llama.tokenizer, [{"type": "image", "image": b""}])], 1)


@pytest.mark.slow
def test_two_ranks_give_the_same(path, llama, tmp_path):
    file = io.BytesIO()
    picture(7).save(file, "PNG")
    (tmp_path / "0.png").write_bytes(file.getvalue())
    dialog = [user(str(tmp_path / "0.png"), "What?")]
    dialog[0]["content"][0] = {"type": "image", "image": str(tmp_path / "0.png")}
    report = run_ranks(2, "chat_with_images", tmp_path / "out", ckpt=str(path), dialogs=[dialog])
    how = dict(temperature=0, max_gen_len=6, stop_tokens=set())
    assert report["answers"] == [llama.chat_completion([dialog], **how)[0]["generation"]["content"]]
