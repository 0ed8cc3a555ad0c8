"""Images on the command line and in the conversation."""

import io
import subprocess

import numpy as np
import pytest
from conftest import ROOT, llama_command, write_checkpoint
from PIL import Image
from rich.console import Console
from vision import TINY_VISION

from llama import Llama
from llama.apps import repl
from llama.apps.pictures import blocks, pasted
from llama.text.messages import image_sources


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("seeing") / "model", TINY_VISION)


@pytest.fixture(scope="module")
def llama(path) -> Llama:
    return Llama.build(path, device="cpu", dtype="fp32", max_batch_size=1, max_seq_len=512)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a photo.png")
    return tmp_path / "a photo.png"


def test_what_terminals_paste_is_recognized(photo):
    escaped = str(photo).replace(" ", "\\ ")
    for line in (escaped, f"'{photo}'", f'"{photo}"', f"file://{escaped}", photo.as_uri()):
        assert pasted(line) == str(photo), line
    assert pasted("data:image/png;base64,AAAA") == "data:image/png;base64,AAAA"
    assert pasted("https://example.org/a.jpg") == "https://example.org/a.jpg"
    for line in ("What is a.png?", "none.png", "it's", str(photo.parent), "/etc/passwd", "a b.png"):
        assert pasted(line) is None, line


def test_a_conversation_with_images(llama, photo):
    session = repl.Session(llama, max_gen_len=4)
    reply = session.take(f"/image {photo}")
    assert reply.text == "1 image(s) for the next message" and reply.image.size == (36, 24)
    for i, dropped in enumerate((str(photo).replace(" ", "\\ "), f"'{photo}'", photo.as_uri())):
        other = repl.Session(llama, max_gen_len=4)  # after the command, as alone
        assert other.take(f"/image {dropped}").text.startswith("1 image(s)"), i
    assert session.take(f"'{photo}'").text.startswith("2 image(s)")
    assert session.take("What?").wants_answer
    assert "".join(session.answer()) == session.dialog[-1]["content"]
    assert image_sources(session.dialog) == [str(photo)] * 2
    assert session.take("And?").wants_answer and session.dialog[-1]["content"] == "And?"
    list(session.answer())
    saved = photo.with_suffix(".json")
    session.take(f"/save {saved}")
    other = repl.Session(llama, max_gen_len=4)
    other.take(f"/load {saved}")
    assert other.dialog == session.dialog
    assert [other.take("/undo").text for _ in (1, 2)][1] == "taken back: [image] [image] What?"
    for line, said in (
        ("/image", "takes the path"),
        ("/image none.png", "no such image file: none.png"),
        (f"/image {saved}", "is none of PNG"),
    ):
        with pytest.raises(ValueError, match=said):
            session.take(line)


def test_a_model_that_reads_only_text_says_so(tiny, photo):
    session = repl.Session(tiny)
    with pytest.raises(ValueError, match="reads only text"):
        session.take(f"/image {photo}")
    assert session.take(f"'{photo}'").wants_answer  # a text like any other


def test_the_preview_shows_two_pixels_in_a_character():
    image = Image.new("RGB", (2, 4), "red")
    image.putpixel((0, 1), (0, 0, 255))
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system="truecolor", width=80).print(blocks(image))
    assert file.getvalue().count("▀") == 4
    assert "38;2;255;0;0;48;2;0;0;255m▀" in file.getvalue()  # red above blue
    assert blocks(Image.new("RGB", (1, 1))).plain == "▀"


def run(*arguments, said=""):
    return subprocess.run(
        [*llama_command(), *map(str, arguments)], cwd=ROOT, input=said, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def test_images_on_the_command_line(llama, path, photo):
    options = ["--device=cpu", "--dtype=fp32", "--max_seq_len=512", "--temperature=0"]
    parts = [{"type": "image", "image": photo}, {"type": "image", "image": photo}]
    [chat] = llama.chat_completion(
        [[{"role": "user", "content": [*parts, "What?"]}]], 0, max_gen_len=4
    )
    told = ["--max_gen_len=4", "--image", photo, "--image", photo]
    done = run("chat", path, *options, *told, said="What?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == chat["generation"]["content"] + "\n"
    [text] = llama.text_completion([[*parts, "What?"]], 0, max_gen_len=4)
    done = run("complete", path, *options, *told, "--prompt", "What?")
    assert done.returncode == 0, done.stderr
    assert done.stdout == text["generation"] + "\n"
    done = run("complete", path, *options, "--image", "none.png", "--prompt", "What?")
    assert done.returncode == 1 and done.stderr.endswith("error: no such image file: none.png\n")
