"""`llama batch --ray` and `llama.ray.Predictor`, on a cluster of three nodes on this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import psutil
import pytest
from batches import LINES, PREFIXES, normal, requests, small_model
from conftest import ROOT
from served import add_node, wait_for

import llama
from llama import Llama
from llama.apps import cli
from llama.ray.bulk import BEGINNING, _cluster, _pool, absolute, blocks, connect
from llama.server.offline import Request, beginning
from llama.server.settings import Settings

CPU = ["--device=cpu", "--dtype=fp32", "--max-seq-len=128"]


def test_what_begins_alike_is_in_one_block():
    for each in (1, 3, 8, 20):
        asked = []
        for name in ("a", "b", "c", "d", "e"):
            for i in range(each):
                body = {"prompt": f"{name * BEGINNING}{i:02}", "max_tokens": i}
                asked.append(Request(len(asked), "/v1/completions", json.dumps(body).encode(), 0))
        found = list(blocks(sorted(asked, key=beginning), 8))
        assert [one for block in found for one in block] == asked
        assert all(1 <= len(block) <= 8 for block in found)
        if each <= 8:
            for name in range(5):
                wanted = {*range(each * name, each * name + each)}
                assert sum(bool(wanted & {r.number for r in block}) for block in found) == 1


def test_an_engine_for_each_machine():
    machines = [{"CPU": 4.0}, {"CPU": 64.0}]
    assert _pool(machines, None, None) == (2, {"num_cpus": 4})
    assert _pool(machines, 4, None) == (4, {"num_cpus": 2})
    assert _pool(machines, None, 4) == (17, {"num_cpus": 4})
    with pytest.raises(ValueError, match="cpus=65 of an engine: the largest machine has 64"):
        _pool(machines, 1, 65)


def test_paths_and_nothing_else_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "t.model", "draft", "x", "int8", "bf16"):
        (tmp_path / name).mkdir()
    others = {"quantize": "int8", "dtype": "bf16", "adapter_dir": None, "seed": 1}
    options = {"ckpt_dir": "m", "tokenizer_path": "t.model", "draft_ckpt_dir": "hf://a/b", **others}
    found, settings = absolute(options, Settings(adapter=["x=x", "y=elsewhere"]))
    here = {"ckpt_dir": f"{tmp_path}/m", "tokenizer_path": f"{tmp_path}/t.model"}
    assert found == {**options, **here}
    assert settings.adapter == [f"x={tmp_path}/x", "y=elsewhere"]


def test_no_cluster_there(monkeypatch):
    import ray

    def init(address, **_):
        raise RuntimeError(f"Version mismatch: {address}")

    monkeypatch.setattr(ray, "init", init)
    with socket.socket() as bound:  # which nobody listens at
        bound.bind(("127.0.0.1", 0))
        place = "{}:{}".format(*bound.getsockname())
        for address in (place, f"ray://{place}"):
            with pytest.raises(ConnectionError, match=f"no cluster at ray={address}: .*refused"):
                connect(address)
        bound.listen()
        with pytest.raises(ConnectionError, match=f"no cluster at ray={place}: Version mismatch"):
            connect(place)
    with pytest.raises(ConnectionError, match="Version mismatch: auto"), _cluster(None):
        pass


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def cluster():
    """Three nodes with one CPU each; yields the address and the processes of each node."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster()
    try:
        add_node(cluster, include_dashboard=False)
        for _ in range(2):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def batch(source, out, model, *options):
    return ["batch", str(source), str(out), str(model), *CPU, *options]


def results(out):
    errors = out.with_name(f"{out.name}.errors.jsonl")
    return [normal(json.loads(line)) for path in (out, errors) for line in path.open()]


@pytest.mark.slow
def test_a_worker_a_node_and_the_driver_are_killed(cluster, model, tmp_path):
    """No line is lost, none comes twice, and each is the local run's."""
    source, out, local = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "local.jsonl"
    asked = requests(LINES)
    for line in asked:  # takes seconds, of which each kill is in the middle
        line["body"] |= {"max_tokens": 90, "n": 8} if "max_tokens" in line["body"] else {}
    source.write_text("\n".join(map(json.dumps, asked)))
    partial = tmp_path / ".out.jsonl.partial"
    command = batch(source, out, model, f"--ray={cluster.address}", "--engines=3")

    def kept():
        """The numbers of the lines that are finished."""
        whole = partial.read_bytes().rpartition(b"\n")[0] if partial.exists() else b""
        return [json.loads(line)["line"] for line in whole.splitlines()[1:]]

    said = tmp_path / "said"
    driver = subprocess.Popen(
        [sys.executable, "-m", "llama", *command], cwd=ROOT, stderr=said.open("w")
    )

    def stopped_at(count):
        def there():  # a line after the header's, each; parsing them would keep a core busy
            return partial.exists() and partial.read_bytes().count(b"\n") > count

        try:
            wait_for(lambda: there() or driver.poll() is not None)
        except AssertionError as late:
            late.add_note(f"{len(kept())} lines are finished; {said.read_text()}")
            raise
        driver.send_signal(signal.SIGSTOP)  # so that nothing ends while something is killed
        assert driver.poll() is None and len(kept()) < LINES, said.read_text()

    try:
        stopped_at(LINES // 8)
        [raylet] = cluster.list_all_nodes()[-2].all_processes["raylet"]
        workers = psutil.Process(raylet.process.pid).children(recursive=True)
        [engine] = [one for one in workers if "MapWorker" in "".join(one.cmdline())]
        engine.kill()
        driver.send_signal(signal.SIGCONT)
        stopped_at(LINES // 4)
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)  # kill -9
        driver.send_signal(signal.SIGCONT)
        stopped_at(LINES // 2)
    finally:
        driver.kill()
        driver.wait()
    before = kept()
    assert LINES // 2 <= len(before) == len({*before}) < LINES
    # Without Ray, or with thousands of lines on the nodes that are left.
    cli.parse(command if LINES > 1000 else batch(source, out, model))()
    cli.parse(batch(source, local, model))()
    assert results(out) == results(local)
    names = Counter(line["custom_id"] for line in results(out))
    assert len(names) == LINES and {*names.values()} == {1}


def test_predictor(model):
    """Without Ray: rows as `Llama` answers them; errors are values."""
    predictor = llama.ray.Predictor(
        str(model), {"temperature": 0.9, "max_tokens": 8}, device="cpu", dtype="fp32",
        max_seq_len=128,
    )  # fmt: skip
    alone = Llama.build(model, device="cpu", dtype="fp32", max_seq_len=128, max_batch_size=16)
    prompts = [f"{prefix} {i}" for prefix in PREFIXES for i in range(3)]
    seeds = np.arange(13)
    rows = {"id": seeds, "prompt": np.array([*prompts, "a" * 200], object)}
    one, two = predictor(rows), predictor({name: column[::-1] for name, column in rows.items()})
    assert list(one["generation"]) == list(two["generation"][::-1])  # seeds are the rows' own
    assert "the context" in one["error"][12] and one["generation"][12] is None
    found = predictor({**rows, "seed": seeds})
    options = {"temperature": 0.9, "max_gen_len": 8, "seed": [*range(12)]}
    for i, expected in enumerate(alone.text_completion(prompts, **options)):
        assert found["error"][i] is None
        assert {name: found[name][i] for name in expected} == expected
    dialog = [{"role": "user", "content": "Hi"}]
    column = np.empty(1, object)
    column[0] = np.array(dialog, object)  # as Arrow's lists come
    found = predictor({"messages": column, "seed": np.array([3])})
    [expected] = alone.chat_completion([dialog], temperature=0.9, max_gen_len=8, seed=3)
    assert found["generation"][0] == expected["generation"]["content"]
    rows = [b"Hello", b"\xff", np.array([1, 2]), [np.int64(1), 2], object()]
    column = np.empty(len(rows), object)
    column[:] = rows
    found = predictor({"prompt": column, "seed": np.zeros(len(rows))})
    [expected] = alone.text_completion(["Hello"], temperature=0.9, max_gen_len=8, seed=0)
    assert found["generation"][0] == expected["generation"]
    assert [error is None for error in found["error"]] == [True, False, True, True, False]
    assert found["generation"][2] == found["generation"][3]
    assert "row 1: 'utf-8'" in found["error"][1] and "row 4: Object" in found["error"][4]
    with pytest.raises(ValueError, match="columns text: give one of prompt and messages"):
        predictor({"text": column})


@pytest.mark.parametrize("body", [{"n": 2}, {"stream": True}, {"tools": [{}]}, {"logprobs": True}])
def test_a_predictor_refuses_what_its_columns_would_lose(body):
    with pytest.raises(ValueError, match=f"body: {next(iter(body))}=.*llama batch"):
        llama.ray.Predictor("nowhere", body)
    with pytest.raises(FileNotFoundError):
        llama.ray.Predictor("nowhere", {"n": 1, "stream": False, "tools": None, "logprobs": False})


@pytest.mark.slow
def test_the_pipeline_of_the_docs(cluster, model):
    import ray

    text = (ROOT / "docs" / "batch.md").read_text()
    [code] = re.findall(r"```\n(import ray\n.*?)```", text, re.DOTALL)
    code = code.replace("checkpoints/SmolLM2-135M-Instruct", str(model))
    found: dict = {}
    ray.init(cluster.address, log_to_driver=False)
    try:
        exec(code.replace('"max_seq_len": 512', '"max_seq_len": 128, "device": "cpu"'), found)
        rows = {row["id"]: row for row in found["answers"].take_all()}
    finally:
        ray.shutdown()
    assert sorted(rows) == [1, 2] and all(row["generation"] for row in rows.values())
