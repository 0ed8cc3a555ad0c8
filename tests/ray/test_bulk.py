"""`llama batch --ray` and `llama.ray.Predictor`, on a cluster of three nodes on this machine."""

import json
import os
import subprocess
import sys
from collections import Counter

import psutil
import pytest
from batches import LINES, PREFIXES, normal, requests
from conftest import ROOT
from served import wait_for

import llama
from llama.apps import cli
from llama.apps.server.offline import Request, beginning
from llama.ray.bulk import BEGINNING, blocks

CPU = ["--device=cpu", "--dtype=fp32", "--max-seq-len=128"]


def test_what_begins_alike_is_in_one_block():
    for each in (1, 3, 8, 20):
        asked = []
        for name in ("a", "b", "c", "d", "e"):
            for i in range(each):
                body = {"prompt": name * BEGINNING + str(i), "max_tokens": i}
                asked.append(Request(len(asked), "/v1/completions", json.dumps(body).encode(), 0))
        found = list(blocks(sorted(asked, key=beginning), 8))
        assert [one for block in found for one in block] == asked
        assert all(1 <= len(block) <= 8 for block in found)
        if each <= 8:
            for name in range(5):
                wanted = {*range(each * name, each * name + each)}
                assert sum(bool(wanted & {r.number for r in block}) for block in found) == 1


@pytest.fixture(scope="module")
def cluster():
    """Three nodes with one CPU each; yields the address and the processes of each node."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        yield cluster
    finally:
        cluster.shutdown()


def batch(source, out, tiny_dir, *options):
    return ["batch", str(source), str(out), str(tiny_dir), *CPU, *options]


def results(out):
    errors = out.with_name(f"{out.name}.errors.jsonl")
    return [normal(json.loads(line)) for path in (out, errors) for line in path.open()]


@pytest.mark.slow
def test_a_worker_a_node_and_the_driver_are_killed(cluster, tiny_dir, tmp_path):
    """No line is lost, none comes twice, and each is the local run's."""
    source, out, local = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "local.jsonl"
    source.write_text("\n".join(map(json.dumps, requests(LINES))))
    partial = tmp_path / ".out.jsonl.partial"
    command = batch(source, out, tiny_dir, f"--ray={cluster.address}", "--engines=3")

    def kept():
        return [json.loads(x)["line"] for x in partial.open()][1:] if partial.exists() else []

    def run_until(count):
        """A driver, once so many results are there."""
        process = subprocess.Popen(
            [sys.executable, "-m", "llama", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(kept()) >= count or process.poll() is not None)
        return process

    driver = run_until(LINES // 8)
    assert driver.poll() is None, driver.stderr.read()
    node = cluster.list_all_nodes()[-2]
    [raylet] = node.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children(recursive=True)
    [engine] = [one for one in workers if "MapWorker" in "".join(one.cmdline())]
    engine.kill()
    wait_for(lambda: len(kept()) >= LINES // 4 or driver.poll() is not None)
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    wait_for(lambda: len(kept()) >= LINES // 2 or driver.poll() is not None)
    driver.kill()
    driver.communicate()
    before = kept()
    assert LINES // 2 <= len(before) == len({*before}) <= LINES
    cli.parse(command)()  # on the nodes that are left
    cli.parse(batch(source, local, tiny_dir))()
    assert results(out) == results(local)
    names = Counter(line["custom_id"] for line in results(out))
    assert len(names) == LINES and {*names.values()} == {1}


@pytest.mark.slow
def test_predictor_in_a_pipeline(cluster, tiny, tiny_dir):
    """Ray Data's own stages around it; each row as `Llama` answers it."""
    import ray

    ray.init(cluster.address, log_to_driver=False)
    try:
        prompts = [f"{prefix} {i}" for prefix in PREFIXES for i in range(3)] + ["a" * 200]
        rows = ray.data.from_items([{"id": i, "prompt": p} for i, p in enumerate(prompts)])
        found = rows.map_batches(
            llama.ray.Predictor,
            batch_size=4,
            compute=ray.data.ActorPoolStrategy(size=1),
            fn_constructor_kwargs={
                "ckpt_dir": str(tiny_dir), "body": {"temperature": 0, "max_tokens": 8},
                "device": "cpu", "dtype": "fp32", "max_seq_len": 128,
            },
        ).filter(lambda row: row["id"] != 1)  # fmt: skip
        answers = {row["prompt"]: row for row in found.take_all()}
    finally:
        ray.shutdown()
    assert len(answers) == len(prompts) - 1
    failed = answers.pop("a" * 200)
    assert "the context" in failed["error"] and failed["generation"] is None
    alone = tiny.text_completion([*answers], temperature=0, max_gen_len=8)
    for row, expected in zip(answers.values(), alone, strict=True):
        assert row["error"] is None
        assert {name: row[name] for name in expected} == expected
