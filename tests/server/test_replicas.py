"""`llama serve --ray`: two replicas on two nodes of a Ray cluster, as one server.

The cluster needs LLAMA_RAY_NODES=2, as in `make soak`: Ray Serve gives its processes fixed times to
start, which are too short where other tests take the cores. With it, test_openai_sdk.py runs
against such a server, too.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import test_openai_sdk as sdk
import yaml
from conftest import ROOT
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from served import PATIENCE, ray_cluster, serve, wait_for

from llama import Llama
from llama.apps import serve as command
from llama.ray.ingress import merged
from llama.ray.routing import choose, decoded, keys_of, references
from llama.ray.serving import app
from llama.server.app import make_app
from llama.server.service import Service
from llama.server.settings import Settings

pytestmark = pytest.mark.slow
KEY, MODEL = sdk.KEY, sdk.MODEL
LONG = 100_000  # tokens, more than any machine makes while a test lasts
LIMITS = ("--device=cpu", "--dtype=fp32", f"--max_seq_len={LONG}", "--max_batch_size=8")


# Fixtures and tests of its own, for this module's server.
ask, asynchronous, client, options = sdk.ask, sdk.asynchronous, sdk.client, sdk.options
test_a_wrong_key, test_models = sdk.test_a_wrong_key, sdk.test_models
test_pages_of_input_items = sdk.test_pages_of_input_items
test_responses_are_kept_and_deleted = sdk.test_responses_are_kept_and_deleted


@pytest.fixture(scope="module")
def cluster():
    if "LLAMA_RAY_NODES" not in os.environ:
        pytest.skip("a Ray Serve cluster needs the machine for itself: make soak")
    with ray_cluster(2) as found:
        yield found


@pytest.fixture(scope="module")
def server(cluster, tiny_dir):
    with serve(
        tiny_dir, *LIMITS, f"--ray={cluster.address}", "--replicas=2", f"--served_name={MODEL}",
        "--cache_tokens=400000", env={"LLAMA_API_KEY": KEY},
    ) as running:  # fmt: skip
        running.client.headers["authorization"] = f"Bearer {KEY}"
        yield running
        assert running.end(signal.SIGINT) == 0


def replicas(server) -> dict[str, float]:
    """How many tokens each replica has looked up in its cache, by its name."""
    answer = server.client.get("/metrics")
    text = answer.text if answer.status_code == 200 else ""  # there may be none just now
    for family in text_string_to_metric_families(text):
        if family.name == "vllm:prefix_cache_queries":
            return {one.labels["replica"]: one.value for one in family.samples}
    return {}


def process_of(replica: str) -> psutil.Process:
    """The one that writes this replica's log."""
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(f"Replica_{replica}." in file.path for file in one.open_files()):
                return one
    raise LookupError(replica)


def body_of(messages, **more) -> dict:
    return {"messages": messages, "max_tokens": 4, **more}


def said(*texts: str) -> list[dict]:
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# --- which replica --------------------------------------------------------------------------------


def test_keys_are_those_of_the_beginning():
    system = [{"role": "system", "content": "Be brief."}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    first, more = said("Hello"), said("Hello", "Hi!", "How are you?")
    assert keys_of(body_of(first)) == keys_of(body_of(more)) != keys_of(body_of(said("Hi")))
    shared, own = keys_of(body_of(system + first)).split()
    assert keys_of(body_of(system + more)) == f"{shared} {own}"
    assert keys_of(body_of(system + said("Hi"))).split()[0] == shared
    assert shared not in keys_of(body_of(system + first, tools=tools))
    assert shared not in keys_of(body_of(system + first, model="an adapter"))
    for other in ({"input": "Hello"}, {"input": first}, {"input": more}):
        assert keys_of(other) == keys_of(body_of(first))
    text = "".join(f"{i} " for i in range(300))
    one, two = (keys_of({"prompt": prompt}) for prompt in (text, [text + "."]))
    assert one == two != keys_of({"prompt": "x" + text})
    assert keys_of({"messages": 1, "tools": 2}) == keys_of({}) == ""


def test_bodies_that_a_replica_refuses():
    for bad in (b"", b"{", b"[]", b"1", b"[" * 10**6, b'"\xff"'):
        assert decoded(bad) == {}
    for odd in ({"messages": [1]}, {"prompt": [[]]}, {"input": [{"role": []}, 1]}, {"prompt": [1]}):
        assert keys_of(odd)
        assert references(odd) == []
    item = {"type": "item_reference", "id": "b"}
    assert references({"previous_response_id": "a", "input": [item, {"id": "c"}]}) == ["a", "b"]


def test_the_busy_replica_gets_no_more():
    loads = {name: 0 for name in "abcd"}
    keys = [f"shared own{i}" for i in range(400)]
    [home] = {choose(one, loads, 8) for one in keys}
    busy = loads | {home: 9}
    others = Counter(choose(one, busy, 8) for one in keys)
    assert set(others) == {*loads} - {home} | {None}  # None: the conversation's is `home`, too
    assert min(others.values()) > 50
    assert {choose(one, loads | {home: 8}, 8) for one in keys} == {home}
    assert choose("", loads, 8) is None
    assert choose("c", loads | {"c": 99}, 8) == "c"  # which alone has what is asked for


def test_a_replica_that_goes_moves_its_own_conversations_only():
    before, keys = {name: 0 for name in "abcd"}, [f"key{i}" for i in range(400)]
    after = {name: 0 for name in "abc"}
    for key in keys:
        old = choose(key, before, 8)
        assert choose(key, after, 8) == old or old == "d"
    assert min(Counter(choose(key, before, 8) for key in keys).values()) > 50


def test_metrics_of_several_are_one_text():
    one = '# HELP a A.\n# TYPE a counter\na{replica="x"} 1.0\n# HELP b B.\n# TYPE b gauge\n'
    two = one.replace('"x"', '"y"')
    assert merged([one, two]) == one.replace("1.0\n", '1.0\na{replica="y"} 1.0\n')


def test_wrong_options():
    with pytest.raises(ValueError, match="replica: llama serve has no such options"):
        app({"ckpt_dir": "x", "replica": 2})
    with pytest.raises(ValueError, match="replicas=0 must be at least 1"):
        app({"ckpt_dir": "x", "replicas": 0})
    with pytest.raises(ValueError, match="max_replicas=1 is less than replicas=2"):
        app({"ckpt_dir": "x", "replicas": 2, "max_replicas": 1})


def test_replicas_get_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ("ckpt_dir", "tokenizer_path", "draft_ckpt_dir", "adapter_dir")
    for name in (*paths, "x"):
        (tmp_path / name).mkdir()
    made = app({**{name: name for name in paths}, "adapter": ["x=x"]})
    replica = made._bound_deployment.init_args[0]._bound_deployment
    options, settings, _ = replica.init_args
    assert all(options[name] == str(tmp_path / name) for name in paths)
    assert settings.adapters == {"x": str(tmp_path / "x")}


def test_without_ray(monkeypatch, tiny_dir):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("llama.ray.serving", "llama.ray.routing"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"needs ray: pip install llama-reference\[ray\]"):
        command.serve(command.ServedModel(tiny_dir), replicas=command.OnRay(ray="local"))
    with pytest.raises(ValueError, match="give its address, or --ray local"):
        command.serve(command.ServedModel(tiny_dir), replicas=command.OnRay(replicas=2))


# --- one server -----------------------------------------------------------------------------------


def talk(post) -> int:
    """20 conversations of 10 turns, of which 4 have a common system prompt; the cached tokens.

    Args:
        post: sends a body, and returns the answer.
    """

    def conversation(number: int) -> int:
        messages, cached = [], 0
        if number >= 16:
            messages = [{"role": "system", "content": "You know all about lighthouses. " * 8}]
        for turn in range(10):
            messages += said(f"Conversation {number}, question {turn}: why?")
            answer = post({"messages": messages, "max_tokens": 2, "temperature": 0})
            cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            messages += [{"role": "assistant", "content": f"Because of {turn}."}]
        return cached

    with ThreadPoolExecutor(4) as threads:
        return sum(threads.map(conversation, range(20)))


def test_prefixes_are_found_as_by_one_engine(server, tiny_dir):
    before = replicas(server)
    found = talk(lambda body: server.client.post("/v1/chat/completions", json=body).json())
    after = replicas(server)
    assert all(after[name] > before[name] for name in before) and len(before) == 2

    async def alone() -> int:
        settings, tiny = Settings(log="off"), Llama.build(tiny_dir, device="cpu", dtype="fp32")
        served = make_app(settings, nullcontext, [])
        async with tiny.async_engine() as engine:
            served.state.service = Service(tiny, engine, settings, "tiny")
            url = "http://localhost"
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(served), base_url=url
            ) as one:
                loop = asyncio.get_running_loop()

                def post(body):
                    sent = one.post("/v1/chat/completions", json=body)
                    return asyncio.run_coroutine_threadsafe(sent, loop).result(PATIENCE).json()

                return await asyncio.to_thread(talk, post)

    assert found >= 0.9 * asyncio.run(alone()) > 0


@contextlib.contextmanager
def load(server, retries: int):
    """Clients that ask one question after the other, all of which must be answered.

    Yields what waits until each has had so many more answers.
    """
    counts, stop = Counter(), threading.Event()

    def work(number: int) -> None:
        with OpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, timeout=PATIENCE, max_retries=retries
        ) as one:
            while not stop.is_set():
                whole = one.chat.completions.create(
                    model=MODEL, messages=said(f"Question {number}.{counts[number]}"),
                    max_tokens=3, extra_body={"ignore_eos": True},
                )  # fmt: skip
                assert whole.usage.completion_tokens == 3
                counts[number] += 1

    def answered(more: int) -> None:
        before = [counts[number] for number in range(3)]
        for number, one in enumerate(working):
            wait_for(lambda n=number, w=one: counts[n] >= before[n] + more or w.done())

    with ThreadPoolExecutor(3) as threads:
        working = [threads.submit(work, number) for number in range(3)]
        try:
            answered(1)
            yield answered
        finally:
            stop.set()
    for one in working:
        one.result()


def test_a_client_that_leaves_ends_its_request(server, client):
    """And what is told of all replicas together."""
    body = dict(model=MODEL, max_tokens=LONG // 2, stream=True, extra_body={"ignore_eos": True})
    streams = [
        client.chat.completions.create(messages=said(f"Question {i}"), **body) for i in range(4)
    ]
    for one in streams:
        next(iter(one))
    assert server.stats()["running"] == 4
    for one in streams:
        one.close()
    server.wait_idle()


def test_a_replica_that_is_killed_fails_only_what_it_was_answering(server, client):
    """Streams that it had begun end with an error; all else is answered by the other."""
    names = sorted(replicas(server))
    body = dict(model=MODEL, max_tokens=LONG // 2, stream=True, extra_body={"ignore_eos": True})
    streams = {}
    for name in names:
        question = next(
            question
            for question in map("Question {}".format, itertools.count())
            if choose(keys_of(body_of(said(question), model=MODEL)), dict.fromkeys(names, 0), 8)
            == name
        )
        streams[name] = client.chat.completions.create(messages=said(question), **body)
        next(iter(streams[name]))
    killed, other = names
    with load(server, retries=2) as answered:
        process_of(killed).kill()
        with pytest.raises(openai.APIError, match="the replica has ended"):
            list(streams[killed])
        next(iter(streams[other]))
        streams[other].close()
        wait_for(lambda: len({*replicas(server)} - {killed}) == 2)  # there is a new one
        answered(2)
    server.wait_idle()


def test_a_rolling_update_fails_nothing(server, cluster, tiny_dir, tmp_path):
    """By `serve run` with what deploy/ray-serve.yaml says; clients don't try again."""
    config = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())
    [application] = config["applications"]
    (tmp_path / "keys").write_text(KEY)
    application["args"] |= {
        "ckpt_dir": str(tiny_dir), "api_key_file": str(tmp_path / "keys"), "device": "cpu",
        "served_name": MODEL,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    before = set(replicas(server))
    with load(server, retries=0) as answered:
        command = [Path(sys.executable).parent / "serve", "run", "--non-blocking"]
        command += [f"--address={cluster.address}", tmp_path / "config.yaml"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        wait_for(lambda: len(after := replicas(server)) == 2 and not before & {*after})
        answered(2)
