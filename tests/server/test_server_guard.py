"""What every request passes before it reaches the model: no model is needed here."""

import asyncio
import contextlib
import json

import httpx
import pytest

from llama.server.app import make_app
from llama.server.bodies import Chat, parse
from llama.server.responses import Responses
from llama.server.settings import Settings


def ask(settings=None, keys=(), method="GET", path="/v1/models", host="localhost", **request):
    """The answer of a server that is still loading its model."""
    app = make_app(settings or Settings(log="off"), contextlib.nullcontext, list(keys))

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, **request)

    return asyncio.run(run())


def test_a_server_isnt_ready_while_it_loads():
    for path in ("/health", "/v1/models", "/models", "/metrics"):
        reply = ask(path=path)
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert "loaded" in reply.json()["error"]["message"]
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert ask(method="POST", path="/v1/chat/completions", json=body).status_code == 503


@pytest.mark.parametrize(
    "header, fits",
    [
        (None, False), ("Bearer", False), ("Bearer wrong", False), ("Basic one", False),
        ("Bearer one", True), ("bearer two", True), ("Bearer one two", False),
    ],
)  # fmt: skip
def test_keys(header, fits):
    headers = {} if header is None else {"Authorization": header}
    reply = ask(keys=["one", "two"], headers=headers)
    assert reply.status_code == (503 if fits else 401)
    if not fits:
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert ask(keys=["one"], path="/health").status_code == 503  # needs no key


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    monkeypatch.setenv("LLAMA_API_KEY", "three")
    assert Settings(api_key_file=str(file)).keys() == ["three", "one", "two"]
    monkeypatch.delenv("LLAMA_API_KEY")
    file.write_text("\n")
    with pytest.raises(ValueError, match="no key"):
        Settings(api_key_file=str(file)).keys()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:80", "LOCALHOST"])
def test_hosts_of_loopback_are_answered(host):
    assert ask(host=host).status_code == 503


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example"]
)
def test_other_hosts_are_refused_unless_public(host):
    assert ask(host=host).status_code == 403
    assert ask(Settings(log="off", host="0.0.0.0"), host=host).status_code == 503


def test_pages_of_other_origins_need_to_be_named():
    headers = {
        "Origin": "https://a.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "Authorization, X-Stainless-OS",  # openai's in a browser
    }  # fmt: skip
    assert "access-control-allow-origin" not in ask(headers=headers).headers
    assert ask(method="OPTIONS", headers=headers).status_code == 405
    settings = Settings(log="off", cors=["https://a.example"])
    preflight = ask(settings, ["key"], "OPTIONS", headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    assert "X-Stainless-OS" in preflight.headers["access-control-allow-headers"]
    assert "DELETE" in preflight.headers["access-control-allow-methods"]
    reply = ask(settings, headers=headers)
    assert reply.headers["access-control-allow-origin"] == "https://a.example"
    for method in ("GET", "OPTIONS"):
        other = ask(settings, method=method, headers={**headers, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_an_origin_may_be_given_with_a_slash_but_no_path():
    settings = Settings(log="off", cors=["https://a.example/"])
    headers = ask(settings, headers={"Origin": "https://a.example"}).headers
    assert headers["access-control-allow-origin"] == "https://a.example"
    exposed = headers["access-control-expose-headers"].lower().split(", ")
    assert exposed == ["x-ignored-parameters", "retry-after", "x-request-id"]
    for origin in ("https://a.example/page", "a.example", "https://"):
        with pytest.raises(ValueError, match=f"cors='{origin}'"):
            Settings(cors=[origin])
    assert Settings(cors=["*", "null", "http://localhost:3000"])


def test_large_bodies_are_refused_before_they_are_read():
    settings = Settings(log="off", max_body_mb=0.001)
    reply = ask(settings, method="POST", path="/v1/completions", content=b"x" * 1001)
    assert reply.status_code == 413 and "0.001 MB" in reply.json()["error"]["message"]

    async def pieces():
        for _ in range(3):
            yield b"x" * 500

    reply = ask(settings, method="POST", path="/v1/completions", content=pieces())
    assert reply.status_code == 413


def test_log_lines_hold_no_prompts_and_no_control_characters(capsys):
    body = {"prompt": "a secret", "unknown": "another secret"}
    headers = {"Authorization": "Bearer key-secret"}
    for log in ("text", "json"):
        ask(
            Settings(log=log), ["key-secret"], "POST", "/v1/completions", json=body, headers=headers
        )
        ask(Settings(log=log), path="/x%1b[31m%0a")
    out = capsys.readouterr().out
    assert "secret" not in out and "\x1b" not in out
    text, strange, line, _ = out.splitlines()
    assert "POST /v1/completions 400" in text and r"\x1b" in strange
    assert json.loads(line)["status"] == 400


def test_ignored_parameters_are_named(capsys):
    body = {"prompt": "x", "unknwon": 1, "ü\n": 2}
    reply = ask(method="POST", path="/v1/completions", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "unknwon"
    assert "--lenient" in reply.json()["error"]["message"]
    settings = Settings(log="off", lenient=True)
    assert ask(settings, method="POST", path="/v1/completions", json=body).status_code == 503


CHAT = {"messages": [{"role": "user", "content": "x"}]}
CODEX = {  # as Codex CLI asks
    "input": [{"type": "message", "role": "user",
               "content": [{"type": "input_text", "text": "x"}]}],
    "tools": [{"type": "function", "name": "f"}, {"type": "web_search"}, {"type": "namespace"}],
    "reasoning": {"effort": "medium", "summary": "auto"}, "text": {"verbosity": "low"},
    "store": False, "client_metadata": {"a": "b"},
}  # fmt: skip
WISHES = {
    "reasoning_effort": "low", "verbosity": "high", "store": True, "service_tier": "flex",
    "prompt_cache_retention": "24h",
}  # fmt: skip


@pytest.mark.parametrize(
    "path, body, names",
    [
        ("/v1/chat/completions", {**CHAT, **WISHES}, list(WISHES)),
        ("/v1/responses", CODEX, ["client_metadata", "tools.web_search", "tools.namespace",
                                  "reasoning.effort", "reasoning.summary", "text.verbosity"]),
    ],
    ids=["chat", "codex"],
)  # fmt: skip
def test_what_a_lenient_server_leaves_out(path, body, names):
    """Wishes that it can't meet, and tools that it would have to run itself."""
    kind = Chat if path.endswith("completions") else Responses
    found, ignored = parse(json.dumps(body).encode(), kind, True)
    assert ignored == names
    assert kind is Chat or [tool["name"] for tool in found.tools] == ["f"]
    settings = Settings(log="off", lenient=True)
    assert ask(settings, method="POST", path=path, json=body).status_code == 503
    body.pop("client_metadata", None)
    error = ask(method="POST", path=path, json=body).json()["error"]
    assert error["param"] in names and "--lenient" in error["message"]


def test_the_page_is_served_with_a_policy():
    for path, kind in (
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/markdown.js", "text/javascript"),
    ):
        reply = ask(keys=["key"], path=path)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert ask(path="/page.py").status_code == 404
