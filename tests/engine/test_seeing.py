"""Dialogs and texts with images, as a Llama's calls take them."""

import base64
import io

import numpy as np
import pytest
from conftest import run_ranks, write_checkpoint
from PIL import Image
from vision import TINY_VISION

from llama import Llama
from llama.text import guard
from llama.vision.images import tile

OPTIONS = dict(temperature=0, max_gen_len=6, logprobs=True, stop_tokens=set())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("seeing") / "model", TINY_VISION)


@pytest.fixture(scope="module")
def llama(path) -> Llama:
    return Llama.build(path, device="cpu", dtype="fp32", max_batch_size=4, max_seq_len=256)


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def part(image) -> dict:
    return {"type": "image", "image": image}


def user(*parts) -> dict:
    return {"role": "user", "content": [*parts]}


def plain(predictions):
    return [(p["generation"], p["tokens"], p["logprobs"]) for p in predictions]


def test_a_dialog_with_images_is_its_ids_and_its_tiles(llama):
    dialogs = [
        [user(part(picture(1)), "What?")],
        [{"role": "user", "content": "No image."}],
        [user("a", part(picture(2)), "b"), {"role": "assistant", "content": "c"},
         user(part(picture(3, 30, 100)), part(picture(1)), "d")],
    ]  # fmt: skip
    images = [[picture(1)], [], [picture(2), picture(3, 30, 100), picture(1)]]
    tiles = [[tile(one, size=56) for one in row] for row in images]
    ids = [llama.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
    assert [row.count(512) for row in ids] == [1, 0, 3]
    tokens, logprobs = llama.generate(ids, 6, 0, logprobs=True, stop_tokens=set(), images=tiles)
    found = llama.chat_completion(dialogs, **OPTIONS)
    assert [p["logprobs"] for p in found] == logprobs
    texts = [llama.tokenizer.decode(row) for row in tokens]
    assert [p["generation"]["content"] for p in found] == texts
    alone = [llama.chat_completion([dialog], **OPTIONS)[0]["tokens"] for dialog in dialogs]
    assert alone == [p["tokens"] for p in found]
    streamed = [""] * 3
    for event in llama.stream_chat(dialogs, **OPTIONS):
        streamed[event.row] += event.text
    assert streamed == texts


def test_what_an_image_shows_changes_the_answer(llama):
    def scores(image):
        return llama.chat_completion([[user(part(image), "What?")]], **OPTIONS)[0]["logprobs"]

    assert scores(picture(1)) == scores(picture(1)) != scores(picture(2))


def test_sources_of_images_are_all_the_same_to_the_model(llama, tmp_path):
    image, file = picture(4), io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "a").write_bytes(file.getvalue())
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    sources = [image, file.getvalue(), tmp_path / "a", str(tmp_path / "a"), uri, np.array(image)]
    first, *others = [
        plain(llama.chat_completion([[user(part(source), "What?")]], **OPTIONS))
        for source in sources
    ]
    assert all(other == first for other in others)


def test_a_text_to_be_completed_may_have_images(llama):
    """As in Meta's: the image before the text, after bos."""
    prompt = [part(picture(5)), "If I had to write"]
    ids = [llama.tokenizer.bos_id, 512, *b"If I had to write"]
    tiles = [tile(picture(5), size=56)]
    tokens, _ = llama.generate(
        [ids, ids[:1] + ids[2:]], 6, 0, stop_tokens=set(), images=[tiles, []]
    )
    found = llama.text_completion([prompt, prompt[1]], **OPTIONS)
    assert [p["generation"] for p in found] == [llama.tokenizer.decode(row) for row in tokens]
    streamed = "".join(e.text for e in llama.stream_text([prompt], **OPTIONS))
    assert streamed == found[0]["generation"]


def test_a_guard_judges_what_it_is_shown(path, monkeypatch):
    """Llama Guard 3 Vision: the task's ids and the image's tiles reach the model."""
    llama = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=4096)
    asked, generate = [], llama.generate

    def spy(prompts, *given, images, **options):
        asked.append((prompts, images, generate(prompts, *given, images=images, **options)))
        return [llama.tokenizer.encode("unsafe\nS2", bos=False, eos=False)] * len(prompts), None

    monkeypatch.setattr(llama, "generate", spy)
    dialogs = [[user(part(picture(1)), "How do I open it?")], [user("How do I open a lock?")]]
    assert guard.classify(llama, dialogs) == [guard.Verdict(False, ("S2",))] * 2
    [(prompts, images, (_, _))] = asked
    assert prompts == [guard.prompt(llama.tokenizer, guard.task(dialog)) for dialog in dialogs]
    assert [row.count(512) for row in prompts] == [1, 0] == [len(row) for row in images]
    assert images[0][0].digest == tile(picture(1), size=56).digest


def test_images_of_turns_that_are_dropped_are_dropped(llama):
    long = [user(part("no such file"), "x" * 200), {"role": "assistant", "content": "y"}]
    last = [user(part(picture(6)), "z")]
    system = [{"role": "system", "content": "s"}]
    [cut] = llama.chat_completion([system + long + last], truncate="oldest_turns", **OPTIONS)
    [whole] = llama.chat_completion([system + last], **OPTIONS)
    assert cut["truncated"] == long and plain([cut]) == plain([whole])
    with pytest.raises(FileNotFoundError, match="no such image file: no such file"):
        llama.chat_completion([system + long + last], **OPTIONS)


def test_a_model_that_reads_only_text_says_so(tiny, smollm2):
    """Whether its vocabulary and its template know images, or don't."""
    for llama in (tiny, smollm2):
        for answer in (llama.chat_completion, llama.stream_chat):
            with pytest.raises(ValueError, match="reads only text.*Llama 3.2 Vision"):
                answer([[user(part("not/opened.png"), "What?")]])
        for answer in (llama.text_completion, llama.stream_text):
            with pytest.raises(ValueError, match="reads only text"):
                answer([[part("not/opened.png"), "What?"]])


def test_saved_prefixes_are_of_text(path, tmp_path):
    llama = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=256, prefix_cache_mb=9)
    with pytest.raises(ValueError, match="saved prefixes are of text.*before the image"):
        llama.save_prefix(tmp_path / "p", [user("What?", part(picture(1)))])


def test_broken_images_are_errors_of_the_call(llama):
    with pytest.raises(ValueError, match="the image is empty"):
        llama.chat_completion([[user(part(b""), "What?")]])
    with pytest.raises(ValueError, match="isn't public"):
        llama.chat_completion([[user(part("http://127.0.0.1:9/a.png"), "What?")]])


@pytest.mark.slow
def test_rank_zero_reads_the_images_of_all_ranks(path, llama, tmp_path):
    """What the other ranks have under the name doesn't matter."""
    picture(7).save(tmp_path / "0.png")
    dialog = [user(part(str(tmp_path / "0.png")), "What?")]
    missing = [user(part(str(tmp_path / "none.png")), "What?")]
    out = tmp_path / "out"
    found = run_ranks(2, "chat_with_images", out, ckpt=str(path), dialogs=[missing, dialog])
    error, answer = found["answers"]
    assert "no such image file" in error
    assert answer == llama.chat_completion([dialog], **OPTIONS)[0]["generation"]["content"]
