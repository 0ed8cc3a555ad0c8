"""Clients that leave, stall, flood or send nonsense: the others are served as if alone."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx
import psutil
import pytest
from served import PATIENCE, serve

CONNECTIONS = int(os.environ.get("LLAMA_CONNECTIONS", 1500))
SECONDS = float(os.environ.get("LLAMA_LOAD_SECONDS", 5))
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "What is the capital of France?"}]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
LONG = {"messages": HELLO, "max_tokens": 1900, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server(smollm2_path):
    with serve(
        smollm2_path, "--device=cpu", "--max_queue=48", "--timeout=120", forked=False
    ) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(tiny_dir):
    """A server that closes what is slow."""
    with serve(tiny_dir, "--device=cpu", "--dtype=fp32", "--timeout=2") as running:
        yield running


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    found = socket.create_connection((host, int(port)), timeout=PATIENCE)
    return found


def post(body: dict, path: str = CHAT) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def is_served(server) -> bool:
    return server.chat("Hi", max_tokens=2, temperature=0).status_code == 200


def test_a_killed_client_frees_its_request(server):
    code = (
        "import json, sys, httpx\n"
        "with httpx.stream('POST', sys.argv[1], json=json.loads(sys.argv[2]), timeout=None) as r:\n"
        "    for line in r.iter_lines(): print(line, flush=True)\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", code, server.url + CHAT, json.dumps(LONG)], stdout=subprocess.PIPE
    )
    client.stdout.readline()
    client.send_signal(signal.SIGKILL)
    client.communicate()
    server.wait_idle()


@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, LONG),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 1900, "stream": True}),
        ("/v1/responses", {"input": "Hi", "stream": True}),
        ("/v1/responses", {"input": "Hi", "stream": True, "metadata": {"a": "\ud800"}}),
    ],
)
def test_a_client_that_leaves_at_once_frees_its_place(server, path, body):
    """It may be gone before its answer begins; or the answer's first event can't be written."""
    for _ in range(6):
        with connect(server) as client:
            client.sendall(post(body, path))
    server.wait_idle()


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 1e-40},
        {"logit_bias": {"5": 1e308}},
        {"repetition_penalty": 1e-300},
        {"presence_penalty": -1e308},
        {"frequency_penalty": -1e39},
    ],
    ids=str,
)
def test_extreme_parameters_fail_alone(server, more):
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 1.0, **more}
    reply = server.client.post(CHAT, json=body)
    assert reply.status_code == 400 and "milder" in reply.text
    assert is_served(server)


def test_a_reader_that_stops_reading_holds_up_only_itself(server):
    with connect(server) as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall(post({**LONG, "logprobs": True, "top_logprobs": 20}))
        stalled.recv(100)
        assert is_served(server)
    server.wait_idle()


def test_slow_requests_are_closed(impatient):
    """Heads, bodies, and connections on which nothing comes at all."""
    for sent in (b"", b"GET /health HTTP/1.1\r\nHos", post({"prompt": "x" * 99})[:-9]):
        with connect(impatient) as slow:
            slow.sendall(sent)
            while slow.recv(1000):  # until the server closes it
                pass
    assert impatient.client.get("/health").status_code == 200


def test_a_stalled_reader_is_dropped(impatient):
    with connect(impatient) as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        many = {"prompt": "x", "max_tokens": 100, "n": 16, "logprobs": 20, "stream": True,
                "ignore_eos": True}  # fmt: skip
        stalled.sendall(post(many, "/v1/completions") * 8)
        impatient.wait_idle()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 5000,
        HEAD + b"Content-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_nonsense_is_answered_or_closed(server, data):
    with connect(server) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while more := client.recv(10_000):
                answer += more
        except ConnectionResetError:
            pass
        assert b" 200 " not in answer[:20]
    assert server.client.get("/health").status_code == 200


def test_pipelined_requests_are_answered_in_order(server):
    bodies = [{"messages": HELLO, "max_tokens": n, "ignore_eos": True} for n in (3, 1)]
    with connect(server) as client:
        client.sendall(b"".join(map(post, bodies)))
        answer = b""
        while answer.count(b'"completion_tokens":') < 2:
            answer += (more := client.recv(10_000))
            assert more, answer
    found = [int(part.split(b",")[0]) for part in answer.split(b'"completion_tokens":')[1:]]
    assert found == [3, 1]


def test_a_declared_gigabyte_is_refused_at_once(server):
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        assert b" 413 " in client.recv(1000)


def test_many_open_connections(server):
    idle = []
    try:
        for _ in range(CONNECTIONS):
            try:
                idle.append(connect(server))
            except OSError:  # the server's bound, or this process's
                break
        assert len(idle) >= min(CONNECTIONS, 800)
        assert is_served(server)
    finally:
        for one in idle:
            one.close()


# --- mutations of valid bodies --------------------------------------------------------------------

STRANGE = [
    None, True, -1, 0, 2**63, 1e308, 1e-320, "", "x", "\0", "\ud800", [], {}, [[]], [None],
    {"": None},
    "x" * 10_000, ["a"] * 100, -(2**70), 0.5, {"type": "json_schema", "json_schema": {"schema": 1}},
    {"type": "json_object"}, [1, 2, 3], {"1": 5}, {"99999999999": 1}, [{"role": "user"}],
]  # fmt: skip
VALID = {
    CHAT: {"messages": HELLO, "max_tokens": 2, "temperature": 1, "top_p": 0.9, "n": 1, "seed": 1,
           "stop": ["x"], "stream": False, "logprobs": True, "top_logprobs": 1,
           "logit_bias": {"5": 1}, "presence_penalty": 0.1, "frequency_penalty": 0.1,
           "response_format": {"type": "text"},
           "tools": [], "tool_choice": "auto", "top_k": 5, "min_p": 0.1, "typical_p": 0.9,
           "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": False, "stop_token_ids": [1],
           "priority": 1, "cache_prompt": True, "chat_template_kwargs": {}, "user": "u",
           "add_generation_prompt": True, "continue_final_message": False},
    "/v1/completions": {"prompt": "a", "max_tokens": 2, "echo": True, "logprobs": 1, "n": 1,
                        "stream": False, "guided_choice": None, "suffix": None, "best_of": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 2, "store": False, "stream": False,
                      "text": {"format": {"type": "text"}}, "tools": [], "instructions": "b"},
    "/v1/embeddings": {"input": "a", "dimensions": 5, "encoding_format": "float"},
    "/tokenize": {"prompt": "a", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2]},
    "/apply-template": {"messages": HELLO},
}  # fmt: skip


def mutated(value, rng: random.Random):
    """A copy with one part replaced, removed, repeated or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, rng.choice(["x", "", "n ", key + "s"]): rng.choice(STRANGE)}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + rng.randrange(2) :]]
    return rng.choice(STRANGE)


@pytest.mark.parametrize("path", VALID)
def test_no_body_makes_the_server_fail(server, path):
    count, rng = int(os.environ.get("LLAMA_MUTATIONS", 60)), random.Random(0)
    for _ in range(count):
        body = VALID[path]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            body = mutated(body, rng)
        if isinstance(body, dict) and isinstance(body.get("max_tokens"), int):
            body["max_tokens"] = min(body["max_tokens"], 4)
        reply = server.client.post(path, content=json.dumps(body).encode())
        assert reply.status_code in (200, 400, 404), (reply.status_code, body, reply.text)
        if reply.status_code != 200 and path != "/tokenize":
            assert reply.json()["error"]["message"], body
    server.wait_idle()


# --- load -----------------------------------------------------------------------------------------


def test_load(server):
    """64 connections with mixed requests, a third of which leave early."""
    server.wait_idle()
    for _ in range(3):
        is_served(server)
    memory, worst = psutil.Process(server.process.pid).memory_info, 0
    found: Counter = Counter()

    async def one(client: httpx.AsyncClient, rng: random.Random, end: float) -> None:
        nonlocal worst
        while time.monotonic() < end:
            length = rng.choice((5, 30, 300))
            body = {
                "prompt": f"{rng.random()} " + "word " * length, "max_tokens": rng.randrange(1, 24),
                "ignore_eos": True, "stream": rng.random() < 0.7,
            }  # fmt: skip
            leaves = rng.random() < 1 / 3
            try:
                async with asyncio.timeout(rng.random() if leaves else None):
                    async with client.stream("POST", "/v1/completions", json=body) as reply:
                        text = await reply.aread()
                        found[reply.status_code] += 1
                        assert b'"error"' not in text or reply.status_code in (429, 503)
            except TimeoutError:
                found["left"] += 1
            worst = max(worst, (await client.get("/stats")).json()["rows"])

    async def run() -> None:
        end = time.monotonic() + SECONDS
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=server.url, timeout=PATIENCE, limits=limits
        ) as client:
            await asyncio.gather(*(one(client, random.Random(i), end) for i in range(60)))

    asyncio.run(run())
    before = memory().rss
    server.wait_idle()
    assert set(found) <= {200, 429, 503, "left"} and found[200], found
    assert worst <= 48
    if SECONDS >= 60:  # a second half, against what the first has left
        asyncio.run(run())
        server.wait_idle()
        assert memory().rss <= 1.02 * before, (before, memory().rss)
    print(dict(found), worst, before, memory().rss)


def test_it_still_ends_well(server):
    assert is_served(server)
    assert server.end() == 0
    assert not server.find("Traceback"), "".join(server.lines)
