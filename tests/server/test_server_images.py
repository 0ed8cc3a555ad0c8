"""Images in requests over HTTP: the `openai` package, what is refused, and limits."""

import asyncio
import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from conftest import write_checkpoint
from openai import APIStatusError, AsyncOpenAI
from PIL import Image
from vision import PER_TILE, TINY_LLAMA4, TINY_VISION, write_llama4_checkpoint

from llama import Llama
from llama.server.app import make_app
from llama.server.offline import Offline, Request
from llama.server.service import Service
from llama.server.settings import UNLIMITED, Settings
from llama.vision.images import DEFAULTS


def png(seed: int, width: int = 90, height: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def asked(*parts) -> list:
    """A message with texts, and images by their addresses or bytes."""
    content = []
    for part in parts:
        if isinstance(part, str) and ":" not in part:
            content.append({"type": "text", "text": part})
        else:
            url = part if isinstance(part, str) else uri(part)
            content.append({"type": "image_url", "image_url": {"url": url, "detail": "auto"}})
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("seeing") / "model", TINY_VISION)


@pytest.fixture(scope="module")
def llama(path) -> Llama:
    return Llama.build(path, device="cpu", dtype="fp32", max_batch_size=8, max_seq_len=512)


@pytest.fixture(scope="module")
def files():
    """A server of images on loopback: /1 is the image of seed 1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(int(self.path[1:])))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def serving(llama, test, **settings):
    """Run a test with a client of OpenAI's, and the service behind it."""
    given = Settings(log="off", **settings)

    async def run():
        async with llama.async_engine() as engine:
            app = make_app(given, contextlib.nullcontext, [])
            app.state.service = service = Service(llama, engine, given, "tiny")
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            base = "http://localhost/v1"
            async with (
                httpx.AsyncClient(transport=transport, base_url=base) as http,
                AsyncOpenAI(
                    base_url=base, api_key="x", http_client=http, max_retries=0,
                    _strict_response_validation=True,
                ) as client,
            ):  # fmt: skip
                found = await test(client, http)
            assert service.images.held == 0
            return found

    return asyncio.run(run())


OPTIONS = dict(model="tiny", temperature=0, max_tokens=6, extra_body={"ignore_eos": True})


async def chat(client, messages, **options):
    found = await client.chat.completions.create(messages=messages, **OPTIONS, **options)
    return found.choices[0].message.content


async def streamed(client, messages):
    text, options = "", {"stream_options": {"include_usage": True}}
    async for chunk in await client.chat.completions.create(
        messages=messages, stream=True, **OPTIONS, **options
    ):
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    return text


DIALOGS = [
    asked(png(1), "What?"),
    asked("No image"),
    asked("a", png(2), "b", png(3, 30, 100)),
    asked(png(1), "What?") + [{"role": "assistant", "content": "c"}] + asked("d", png(4)),
]


def test_eight_users_at_once_with_and_without_images(llama):
    """Each gets what it gets alone, and what `chat_completion` gives; whole or streamed."""

    async def test(client, _):
        alone = [await chat(client, dialog) for dialog in DIALOGS]
        users = [chat(client, dialog) for dialog in DIALOGS]
        users += [streamed(client, dialog) for dialog in DIALOGS]
        assert await asyncio.gather(*users) == alone * 2
        return alone

    found = serving(llama, test)
    options = dict(temperature=0, max_gen_len=6, stop_tokens=set())
    by_python = [llama.chat_completion([dialog], **options)[0] for dialog in DIALOGS]
    assert found == [one["generation"]["content"] for one in by_python]
    assert len(set(found)) > 2


def test_responses_take_images(llama):
    parts = [
        {"type": "input_image", "image_url": uri(png(1)), "detail": "auto"},
        {"type": "input_text", "text": "What?"},
    ]
    given = dict(model="tiny", temperature=0, max_output_tokens=6)

    async def test(client, http):
        options = {"temperature": 0, "max_tokens": 6}
        expected = await http.post("/chat/completions", json={"messages": DIALOGS[0], **options})
        asked_ = [{"role": "user", "content": parts}]
        found = await client.responses.create(input=asked_, **given)
        assert found.output_text == expected.json()["choices"][0]["message"]["content"]
        counted = await client.responses.input_tokens.count(input=asked_)
        assert counted.input_tokens == found.usage.input_tokens
        goes_on = await client.responses.create(
            input="And?", previous_response_id=found.id, **given
        )
        assert goes_on.usage.input_tokens > found.usage.input_tokens
        listed = await client.responses.input_items.list(found.id)
        assert listed.data[0].content[0].image_url == uri(png(1))
        with pytest.raises(APIStatusError, match="input_image.*images by image_url"):
            file = [{"type": "input_image", "file_id": "file-1", "detail": "auto"}]
            await client.responses.create(input=[{"role": "user", "content": file}], **given)

    serving(llama, test)


def test_images_by_their_address(llama, files):
    """Private ones only if the server is told so; the rest is in tests/vision/test_fetch.py."""

    async def test(client, _):
        return await chat(client, asked(f"{files}/1", "What?"))

    async def refused(client, _):
        for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "10.0.0.1"):
            port = files.rpartition(":")[2]
            for scheme in ("http", "https"):
                with pytest.raises(APIStatusError, match="isn't public") as caught:
                    await chat(client, asked(f"{scheme}://{host}:{port}/1", "What?"))
                assert caught.value.status_code == 400

    by_data = serving(llama, lambda client, _: chat(client, asked(png(1), "What?")))
    assert serving(llama, test, allow_private_images=True) == by_data
    serving(llama, refused)


REFUSED = {
    "a path": ("file:///etc/hostname", "http.s. address or a data URI"),
    "a bare path": ("/etc/hostname:", "http.s. address or a data URI"),
    "no image": (uri(b"hello"), "is none of PNG"),
    "empty": (uri(b""), "0 bytes"),
    "broken": (uri(png(1)[:400]), "can't be decoded"),
    "base64": ("data:image/png;base64,?", "isn't valid base64"),
    "too large": (uri(png(1, 500, 500)), "more bytes than the limit, 500000"),
    "too many pixels": (uri(png(1, 300, 300)), "300 x 300 pixels, and the limit is 80000"),
}


def test_what_is_no_image_is_an_error_of_the_request(llama):
    async def test(client, http):
        for url, said in REFUSED.values():
            with pytest.raises(APIStatusError, match=said) as caught:
                await chat(client, asked("What?", url))
            error = caught.value
            assert (error.status_code, error.code, error.param) == (
                400,
                "invalid_image",
                "messages",
            )
        for part in ({"type": "image_url"}, {"type": "image_url", "image_url": {}}):
            body = {"messages": [{"role": "user", "content": [part]}]}
            reply = await http.post("/chat/completions", json=body)
            assert reply.status_code == 400 and "a part of a message" in reply.text
        many = asked(*[png(i, 8, 8) for i in range(5)], "What?")
        with pytest.raises(APIStatusError, match="5 images: this server takes 4") as caught:
            await chat(client, many)
        assert await chat(client, asked(png(1), "What?"))  # it goes on

    serving(llama, test, max_images=4, max_image_mb=0.5, max_image_pixels=80_000)


def test_images_that_wait_are_counted(llama):
    """Two at once where there is room for three images: one is asked to come again."""

    async def test(client, _):
        users = [chat(client, asked(png(i), png(i + 1), "What?")) for i in (1, 3)]
        found = await asyncio.gather(*users, return_exceptions=True)
        [error] = [one for one in found if isinstance(one, Exception)]
        assert error.status_code == 429 and "retry-after" in error.response.headers
        assert await chat(client, asked(png(1), png(2), "What?")) in found

    serving(llama, test, max_images=3)


def test_tokens_of_images_are_shown(llama):
    async def test(_, http):
        body = {"messages": asked(png(1), "What?")}
        applied = (await http.post("/apply-template", json=body)).json()
        assert "<|end_header_id|>\n\n<|image|>What?<|eot_id|>" in applied["prompt"]
        counted = (await http.post("/tokenize", json={**body, "with_pieces": True})).json()
        assert {"id": 512, "piece": "<|image|>"} in counted["tokens"]
        assert [one["id"] for one in counted["tokens"]] == applied["tokens"]

    serving(llama, test)


def test_a_model_that_reads_only_text_says_so(tiny):
    async def test(client, _):
        with pytest.raises(APIStatusError, match="the model reads only text") as caught:
            await chat(client, DIALOGS[0])
        assert caught.value.status_code == 400

    serving(tiny, test)


def test_batches_read_the_images_of_this_machine(path, llama, tmp_path):
    """Lines of `llama batch` are those of whoever started it, and may name files."""
    (tmp_path / "a.png").write_bytes(png(1))
    bodies = [
        {"messages": asked(png(1), "What?")},
        {"messages": asked("What?")},
    ]
    named = asked("x:", "What?")
    named[0]["content"][0] = {"type": "image_url", "image_url": str(tmp_path / "a.png")}
    bodies.append({"messages": named})
    named = asked("x:", "What?")
    named[0]["content"][0] = {"type": "image_url", "image_url": str(tmp_path / "none.png")}
    bodies.append({"messages": named})
    options = dict(ckpt_dir=str(path), device="cpu", dtype="fp32", max_seq_len=512)
    with Offline(options, Settings(max_images=1)) as model:  # others wait
        requests = [
            Request(i, "/v1/chat/completions", json.dumps({**body, "temperature": 0}).encode(), 1)
            for i, body in enumerate(bodies)
        ]
        replies = {r.number: r for some in model.answers(requests) for r in some}
    texts = {
        i: json.loads(r.body)["choices"][0]["message"]["content"]
        for i, r in replies.items() if r.status == 200
    }  # fmt: skip
    assert texts[0] == texts[2] != texts[1]
    assert replies[3].status == 400 and b"no such image file" in replies[3].body


def test_batches_take_images_as_large_as_python_does(path, tmp_path):
    """A photo of 24 million pixels, which a server refuses."""
    assert UNLIMITED["max_image_pixels"] == DEFAULTS.max_pixels
    Image.new("L", (6000, 4000)).save(photo := tmp_path / "photo.png")
    part = {"type": "image_url", "image_url": str(photo)}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    options = dict(ckpt_dir=str(path), device="cpu", dtype="fp32", max_seq_len=64)
    for settings, status in (({}, 400), (UNLIMITED, 200)):
        with Offline(options, Settings(**settings)) as model:
            request = Request(1, "/v1/chat/completions", json.dumps(body).encode(), 1)
            assert model.submit(request).result().status == status


def test_llama4s_images_are_counted_by_their_tokens(tmp_path):
    """Whole and streamed, beside others, and in what tells tokens without an answer."""
    path = write_llama4_checkpoint(tmp_path / "model")
    llama = Llama.build(path, device="cpu", dtype="fp32", max_batch_size=8, max_seq_len=512)
    large = asked(png(1), "What?")  # of 2 x 2 tiles, and one of all of it
    tall = asked(png(1, 20, 900), *[png(2, 20, 900)] * 7, "What?")

    async def test(client, http):
        alone = [await chat(client, dialog) for dialog in DIALOGS]
        users = [chat(client, dialog) for dialog in DIALOGS]
        users += [streamed(client, dialog) for dialog in DIALOGS]
        assert await asyncio.gather(*users) == alone * 2
        told = (await http.post("/tokenize", json={"messages": large})).json()
        assert told["tokens"].count(TINY_LLAMA4.vision_token) == 5 * PER_TILE
        found = await client.chat.completions.create(messages=large, **OPTIONS)
        assert found.usage.prompt_tokens == told["count"]
        parts = [{"type": "input_image", "image_url": uri(png(1)), "detail": "auto"},
                 {"type": "input_text", "text": "What?"}]  # fmt: skip
        counted = await client.responses.input_tokens.count(
            model="tiny", input=[{"role": "user", "content": parts}]
        )
        assert counted.input_tokens == told["count"]
        with pytest.raises(APIStatusError, match="the prompt has .* tokens, and the context") as e:
            await chat(client, tall)
        assert (e.value.status_code, e.value.code) == (400, "context_length_exceeded")
        return alone

    found = serving(llama, test)
    options = dict(temperature=0, max_gen_len=6, stop_tokens=set())
    by_python = [llama.chat_completion([dialog], **options)[0] for dialog in DIALOGS]
    assert found == [one["generation"]["content"] for one in by_python]
    assert len(set(found)) > 2
