"""Ranks on several machines: the documented commands, files that differ, ranks that fail.

`LLAMA_NODE_STARTS` is how often a job is started to see where its rank 0 is (2 by default); with
10, as in `make soak`, torchrun's restarts are tested too.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import vision
from conftest import ROOT, TINY, run_ranks, torchrun, write_checkpoint
from forked import NODE
from namespaces import Node, network

from llama import Llama
from llama.apps import cli
from llama.checkpoint.adapter import Adapter, Pair, write_adapter
from llama.checkpoint.convert import convert

STARTS = int(os.environ.get("LLAMA_NODE_STARTS", 2))
PATIENCE = 240  # seconds, for what takes a few where machines are fast
TIMEOUT = 10.0  # seconds without a sign of life, in tests
PROMPTS = [[1, 2, 3], [7] * 20, [250, 0, 13, 99, 5]]
BIN = Path(sys.executable).parent

# Heads that three ranks can share.
THREE = replace(TINY, dim=96, n_heads=12, n_kv_heads=6)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("three") / "mp1", THREE)


def answers(ckpt_dir, **options):
    llama = Llama.build(ckpt_dir, max_seq_len=64, device="cpu", dtype="fp32", **options)
    return llama.generate(PROMPTS, 9, temperature=0, stop_tokens=set())[0]


def documented(torchrun: str = f"{BIN}/torchrun") -> list[str]:
    """What docs/distributed.md has people type on each machine."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"^```\n(export .*?)```", text, flags=re.DOTALL | re.MULTILINE)
    return [block.replace(".venv/bin/torchrun", torchrun) for block in blocks]


def start(nodes: list[Node], commands: list[str], folder: Path) -> list[subprocess.Popen]:
    """A command for each node, as a shell there runs it; what it prints goes into files."""
    started = []
    for i, (node, command) in enumerate(zip(nodes, commands, strict=True)):
        with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            environment[NODE] = str(node.pid)
            started.append(
                node.popen(["sh", "-c", command], ROOT, stdout=out, stderr=err, env=environment)
            )
    return started


def finish(nodes: list[Node], commands: list[str], folder: Path) -> list[str]:
    """The same, to their end: what each has printed."""
    statuses = [process.wait(PATIENCE) for process in start(nodes, commands, folder)]
    errors = [(folder / f"{i}.err").read_text() for i in range(len(nodes))]
    assert not any(statuses), "\n".join(errors)[-6000:]
    return [(folder / f"{i}.out").read_text() for i in range(len(nodes))]


def until(reached, what: str):
    """Wait for something to become true; returns it."""
    for _ in range(10 * PATIENCE):
        if found := reached():
            return found
        time.sleep(0.1)
    pytest.fail(f"waited in vain for {what}")


# --- one model on several machines ----------------------------------------------------------------


def test_the_documented_commands_say_on_the_first_machine_what_one_rank_says(
    smollm2_path, tmp_path, capfd
):
    commands = documented(shlex.join(torchrun()))
    assert cli.main(["complete", str(smollm2_path), "--prompt", "The capital of France is",
                     "--max-gen-len", "4"]) == 0  # fmt: skip
    alone = capfd.readouterr().out
    assert "Paris" in alone
    with network(len(commands)) as nodes:
        assert finish(nodes, commands, tmp_path) == [alone, ""]


def test_rank_zero_is_on_the_machine_with_node_rank_zero(tmp_path):
    """Whichever comes first; what they run makes no difference. One start is the test above."""
    script = tmp_path / "who.py"
    script.write_text("import os, socket\nprint(os.environ['RANK'], socket.gethostname())\n")
    job = re.compile(r"-m llama .*", flags=re.DOTALL)
    commands = [job.sub(str(script), command) for command in documented(shlex.join(torchrun()))]
    with network(2) as nodes:
        for number in range(1, STARTS):
            delayed = [f"sleep {number % 2 * 2}; {commands[0]}", commands[1]]
            first, second = finish(nodes, delayed, tmp_path)
            assert sorted(first.split()) == ["0", "1", "node0", "node0"]
            assert second.split() == ["2", "node1"]


@pytest.mark.parametrize("places", [(0, 0, 1), (0, 1, 2)])
def test_ranks_on_several_machines_say_what_one_says(three, tmp_path, places):
    with network(max(places) + 1) as nodes:
        report = run_ranks(
            3, "generate", tmp_path / "out", [nodes[i] for i in places],
            ckpt=str(three), prompts=PROMPTS, max_gen_len=9, stop_tokens=[],
        )  # fmt: skip
    assert report["all_ranks"] == [answers(three)] * 3


def test_files_or_options_that_differ_are_an_error_that_says_where(three, tmp_path):
    one = str(three)
    wrong, right = tmp_path / "wrong.model", (three / "tokenizer.model").read_bytes()
    first, second, *rest = right.splitlines()
    words = [first.split()[0], second.split()[0]]
    wrong.write_bytes(b"\n".join([words[1] + b" 0", words[0] + b" 1", *rest]))
    cases = {
        "weights": {"ckpt_dir": write_checkpoint(tmp_path / "weights", THREE, seed=1)},
        "n_layers": {"ckpt_dir": write_checkpoint(tmp_path / "l", replace(THREE, n_layers=3))},
        "stored": {"ckpt_dir": convert(three, tmp_path / "s", "hf", dtype=torch.float16)},
        "tokenizer": {"ckpt_dir": one, "tokenizer_path": wrong},
        "dtype": {"ckpt_dir": one, "dtype": "bf16"},
        "max_seq_len": {"ckpt_dir": one, "max_seq_len": 32},
        "no checkpoint": {"ckpt_dir": tmp_path / "nowhere"},
    }
    cases = {case: {name: str(v) for name, v in given.items()} for case, given in cases.items()}
    cases["max_seq_len"]["max_seq_len"] = 32
    same = {"the same": {"ckpt_dir": str(convert(three, tmp_path / "same", "hf"))}}
    with network(2) as nodes:
        report = run_ranks(
            3, "everywhere", tmp_path / "out", [nodes[0], nodes[0], nodes[1]],
            builds=[[{"ckpt_dir": one}] * 2 + [c] for c in [*cases.values(), *same.values()]],
            prompts=PROMPTS,
        )  # fmt: skip
    *found, last = report["found"]
    assert last == [answers(three)] * 3  # the same model in another format
    for (name, theirs), errors in zip(cases.items(), found, strict=True):
        assert len(set(errors)) == 1 and name in errors[0], (name, errors)
        assert "rank 2 on host node1" in errors[0] and "rank 1" not in errors[0]
        if name == "no checkpoint":
            assert errors[0].startswith("FileNotFoundError") and theirs["ckpt_dir"] in errors[0]
            assert "copy it there, or pass broadcast_weights" in errors[0]
        else:
            assert errors[0].startswith("ValueError") and "rank 0 on host node0" in errors[0]


def test_weights_that_only_the_first_machine_has(three, tmp_path):
    adapter, draft = tmp_path / "adapter", write_checkpoint(tmp_path / "draft", THREE, seed=5)
    A, B = torch.randn(2, 4, 96, generator=torch.Generator().manual_seed(0))
    pairs = {"layers.1.attention.wq.weight": Pair(A, B.T, 0.5)}
    write_adapter(Adapter(pairs), adapter, THREE)
    q8 = convert(three, tmp_path / "q8.gguf", "gguf", quant="q8_0")
    cases = [
        {"ckpt_dir": three},
        {"ckpt_dir": convert(three, tmp_path / "hf", "hf"), "draft_ckpt_dir": draft},
        {"ckpt_dir": q8, "quantize": "int8", "tokenizer_path": three / "tokenizer.model"},
        {"ckpt_dir": three, "adapter_dir": adapter, "quantize": "int8"},
    ]
    cases = [{name: str(value) for name, value in case.items()} for case in cases]
    lacking = {"ckpt_dir": str(tmp_path / "a"), "draft_ckpt_dir": str(tmp_path / "b")}
    lacking["tokenizer_path"] = str(tmp_path / "c")
    builds = []
    for case in cases:
        there = {name: lacking.get(name, value) for name, value in case.items()}
        builds.append([{**of, "broadcast_weights": True} for of in (case, there, there)])
    builds[0][1] = builds[0][0]  # has it, on the same machine
    builds.append([{"ckpt_dir": str(tmp_path / "a"), "broadcast_weights": True}] * 3)
    with network(2) as nodes:
        report = run_ranks(
            3, "everywhere", tmp_path / "out", [nodes[0], nodes[0], nodes[1]],
            builds=builds, prompts=PROMPTS,
        )  # fmt: skip
    *found, nowhere = report["found"]
    assert found == [[answers(**case)] * 3 for case in cases]
    assert all(error.startswith("FileNotFoundError: no checkpoint at") for error in nowhere)


def test_weights_of_more_than_two_dimensions_are_sent(tmp_path):
    path = write_checkpoint(tmp_path / "sees", vision.ARGS)
    builds = [{"ckpt_dir": str(place)} for place in (path, tmp_path / "a")]
    builds = [{**of, "broadcast_weights": True} for of in builds]
    report = run_ranks(2, "everywhere", tmp_path / "out", builds=[builds], prompts=PROMPTS)
    assert report["found"] == [[answers(path)] * 2]


# --- ranks that fail ------------------------------------------------------------------------------

STRIKES = {
    "killed": lambda process, node: process.kill(),
    "hanging": lambda process, node: process.suspend(),
    "cut off": lambda process, node: node.cut(),
}


@pytest.mark.parametrize(
    "strike, rank", [("killed", 2), ("killed", 0), ("hanging", 2), ("cut off", 2)]
)
def test_the_others_end_and_say_who_has_failed(three, tmp_path, strike, rank):
    out = tmp_path / "out"
    files = [Path(f"{out}.{i}") for i in range(3)]

    def generating() -> bool:
        return all(file.exists() and file.read_text() for file in files)

    def during() -> None:
        until(generating, "ranks that generate")
        ranks = [psutil.Process(int(file.read_text())) for file in files]
        others = [process for i, process in enumerate(ranks) if i != rank]
        try:
            began = time.monotonic()
            STRIKES[strike](ranks[rank], places[rank])
            left = psutil.wait_procs(others, PATIENCE)[1]
            print(f"{strike}: the others have ended after {time.monotonic() - began:.1f} s")
            if strike == "hanging":
                ranks[rank].resume()  # late: it ends, too
            left += psutil.wait_procs(ranks, PATIENCE)[1]
            assert not left
        finally:
            for process in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    with network(2) as nodes:
        places = [nodes[0], nodes[0], nodes[1]]
        report = run_ranks(
            3, "endless", out, places, during, ckpt=str(three), timeout=TIMEOUT
        )  # fmt: skip
    assert all(report["statuses"])
    said = report["stderr"]
    store = r"error: the job's store at 10\.0\.0\.1:29500, beside rank 0 on host node0, has "
    waiting = r".*; rank {} on host {} waited for \w+ in .*\(llama/\S+:\d+\)"
    gone = rf"error: .*rank {rank} on host {places[rank].name} has not answered for \d+ s"
    for other in {0, 1, 2} - {rank}:
        reason = store + "closed the connection" if rank == 0 else gone
        assert re.search(reason + waiting.format(other, places[other].name), said), (other, said)
    if strike == "cut off":
        reason = store + f"not answered for {TIMEOUT:g} s"
        assert re.search(reason + waiting.format(rank, "node1"), said), said


@pytest.mark.skipif(STARTS < 10, reason="several starts of all ranks: make soak")
@pytest.mark.parametrize("strike", STRIKES)
def test_torchrun_starts_all_ranks_again(smollm2_path, tmp_path, strike):
    """By itself where a rank was killed or hangs; else when the same commands are given again."""
    restarts = 0 if strike == "cut off" else 1
    commands = [
        command.replace(" -m llama", f" --max_restarts {restarts} -m llama").replace(
            "--max-gen-len 4", f"--max-gen-len 200 --rank_timeout {TIMEOUT:g}"
        )
        for command in documented()
    ]
    with network(2) as nodes:
        alone, _ = finish(nodes, commands, tmp_path)
        started = start(nodes, commands, tmp_path)
        until(lambda: (tmp_path / "0.out").read_text(), "the first words")
        victim = next(p for p in nodes[0].processes() if p.environ().get("RANK") == "1")
        began = time.monotonic()
        STRIKES[strike](victim, nodes[1])
        statuses = [process.wait(PATIENCE) for process in started]
        print(f"{strike}: all have ended after {time.monotonic() - began:.1f} s, {statuses}")
        assert not nodes[0].processes() and not nodes[1].processes()
        if strike == "cut off":
            assert all(statuses)
            nodes[1].restore()
            assert finish(nodes, commands, tmp_path) == [alone, ""]
        else:
            assert statuses == [0, 0]
            printed = (tmp_path / "0.out").read_text()
            assert printed.endswith(alone) and len(printed) > len(alone)


def test_a_rank_that_does_not_start_is_not_waited_for_forever(three, tmp_path):
    report = run_ranks(2, "absent", tmp_path / "out", during=lambda: None, ckpt=str(three))
    assert report["statuses"][0] and not report["statuses"][1]
    late = r"error: ranks 1 have not started after \d+ s; rank 0 on host .* waited for init_process"
    assert re.search(late, report["stderr"]), report["stderr"]


def test_without_the_right_to_make_namespaces_a_test_fails_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "unshare").write_text("#!/bin/sh\necho unshare failed: no >&2\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    for path in (tmp_path, tmp_path / "nothing"):
        monkeypatch.setenv("PATH", str(path), prepend=os.pathsep if path.exists() else None)
        with pytest.raises(pytest.fail.Exception, match="no network namespaces") as failure:
            network(1).__enter__()
        assert "\n" not in str(failure.value) and not failure.value.pytrace


def test_namespaces_end_with_their_test():
    with pytest.raises(ZeroDivisionError), network(2) as nodes:
        process = nodes[1].popen(["sleep", "1000"])
        until(nodes[1].processes, "a process")
        raise ZeroDivisionError
    assert process.returncode
    assert not any(psutil.pid_exists(node.pid) for node in nodes)
