"""The benchmark's parts work and compare equal work; figures are for people, not for tests.

transformers takes half a minute to decode a GGUF file: it does in `make soak`, and else
reads the same weights in Hugging Face's format.
"""

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
from conftest import ROOT, THOROUGH, TINY, write_checkpoint

from benchmarks import adapters, flax_speed, loading, peers, planning, savings
from benchmarks.sides import Side
from llama import checkpoint

PROMPTS = [[504, 3575, 282, 4649, 314], [1604, 3987, 46477, 24, 94, 727, 2367], [9, 8]]


def test_loading_the_demo_model_stays_within_its_memory_bound(smollm2_path):
    """Peak resident memory <= 1.3 x the weights, beside what imports take."""
    run = loading.measure("load", smollm2_path, "fp32")
    assert abs(run["weights_mb"] - 134_515_008 * 4 / 1e6) < 1
    print(run)
    assert run["rss_peak_mb"] - run["rss_before_mb"] <= 1.3 * run["weights_mb"]


def test_a_quantized_file_costs_little_more_than_itself(smollm2_path):
    """To the first token, beside what imports take: the mapped file, its vocabulary, a cache."""
    run = loading.measure("first int4", smollm2_path, "")
    assert run["rss_peak_mb"] - run["rss_before_mb"] <= 2 * run["weights_mb"]


def test_sides_take_turns_in_new_processes():
    calls = []

    class Spy:
        def __init__(self, label):
            calls.append(f"start {label}")

        def run(self, prompts, n):
            calls.append((len(prompts), n))
            return n

        def close(self):
            calls.append("end")

    one, two = peers.Case("decode", "one", [[1]], 5), peers.Case("batch", "two", [[1], [2]], 7)
    answers = peers.take_turns(Spy, ["a", "b, eager"], [one, two], 2)
    both = ["start a", (1, 4), (2, 2), (1, 5), (2, 7), "end"]
    assert calls == [*both, "start b, eager", (1, 4), (1, 5), "end"] * 2
    assert answers == {"one": {"a": [5, 5], "b, eager": [5, 5]}, "two": {"a": [7, 7]}}


@pytest.fixture(scope="module")
def answers(smollm2_path, smollm2_hf):
    """What each side makes of three prompts: (label, seconds and tokens)."""
    theirs = smollm2_path if THOROUGH else smollm2_hf
    found = {}
    for kind, dtype, path in (
        ("llama", "fp32", smollm2_path),
        ("llama", "eager-fp32", smollm2_path),
        ("transformers", "fp32", theirs),
        ("llama.cpp", "", smollm2_path),
    ):
        side = Side(kind, path, dtype, 1)
        found[f"{kind} {dtype}"] = side.run(PROMPTS, 12)
        side.close()
    return found


def test_all_sides_do_the_same_work(answers):
    expected = answers["transformers fp32"]["tokens"]
    assert [len(row) for row in expected] == [12] * 3
    assert answers["llama fp32"]["tokens"] == answers["llama eager-fp32"]["tokens"] == expected
    theirs = answers["llama.cpp "]["tokens"]  # which rounds activations to 8 bits
    assert [len(row) for row in theirs] == [12] * 3
    assert sum(a[0] == b[0] for a, b in zip(theirs, expected, strict=True)) >= 2


def test_all_sides_say_how_long_they_took(answers):
    for answer in answers.values():
        assert answer["first"] > 0 and answer["rest"] >= 0


def test_the_machine_is_measured_too(smollm2_path):
    side = Side("limit", smollm2_path, "bf16", 1)
    found = side.run([], 0)
    side.close()
    assert 1e9 < found["bytes_per_s"] < 1e12 and 1e9 < found["flop_per_s"] < 1e14


def test_the_limit_of_a_step_is_reading_its_weights(smollm2_path):
    args = checkpoint.open(smollm2_path).args
    case = peers.Case("decode", "", [[0] * 128], 65)
    limit = {"bytes_per_s": 1e9, "flop_per_s": 1e20}
    read = 270e6 + (128 + 65 / 2) * 2 * args.n_layers * args.n_kv_heads * args.head_dim * 2
    assert case.best(args, 270e6, limit) == pytest.approx(1e9 / read)
    matrices = 2 * 134_515_008  # norms are 35 thousand of these
    assert peers.weights_bytes(smollm2_path, "bf16") == pytest.approx(matrices, rel=1e-3)
    slow = {"bytes_per_s": 1e20, "flop_per_s": 1e9}
    assert case.best(args, 270e6, slow) == pytest.approx(1e9 / matrices, rel=1e-3)


def test_a_run_is_kept_with_its_plots(tmp_path):
    """The results that the README shows can be drawn and tabled anew from their figures."""
    kept = ROOT / "benchmarks" / "results"
    results = json.loads((kept / "results.json").read_text())
    text = [peers.table(results["generation"]), peers.table_of_ratios(results["ratios"])]
    assert peers.ratios(results["generation"]) == results["ratios"]
    peers.keep(results, text, tmp_path)
    assert (tmp_path / "results.md").read_text() == (kept / "results.md").read_text()
    for group in ("first", "decode", "batch"):
        assert (tmp_path / f"{group}.png").stat().st_size > 5000 and (
            kept / f"{group}.png"
        ).exists()


def test_what_adapters_cost_is_measured(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "model", replace(TINY, head_dim=32))
    adapters.main(str(path), rounds=1, rows=(2,))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*report["rows"]["2"]} == {"none loaded", "none used", "one", "four"}
    assert all(took > 0 for took in report["rows"]["2"].values())


def test_plans_are_checked_against_the_engine(tmp_path, monkeypatch, capsys):
    """Both serve the same requests to the end; how fast is the machine's business."""
    monkeypatch.setattr(planning.measuring, "CONTEXTS", (0, 128))
    monkeypatch.setattr(planning.measuring, "CHUNKS", (1, 4, 16, 64))
    path = write_checkpoint(tmp_path / "tiny", replace(TINY, head_dim=32))
    planning.main(str(path), demo=False, seconds=0.01, out=str(tmp_path))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tiny"]["loads"]
    assert [load["requests"] for load in found.values()] == [8, 8]
    for load in found.values():
        assert load["measured"].keys() == load["predicted"].keys()
        assert all(value > 0 for side in ("measured", "predicted") for value in load[side].values())
    assert (tmp_path / "planning.md").read_text().count("| tiny, ") == 2


def test_savings_are_of_equal_texts_and_answers_fit(smollm2_path, monkeypatch):
    """The parts that check what they measure do so; the kept figures are all of them."""
    monkeypatch.setattr(savings, "TURNS", 1)
    llama = savings.build(str(smollm2_path))
    prompts = json.loads(savings.PROMPTS.read_text())
    assert savings.speedups(llama, "lookup", 0, prompts["quote"][:1])[0] > 0
    assert savings.per_token(llama, 2, 0, {"type": "regex", "regex": "[a-z ]{200}"}) > 0
    found = savings.validity(str(smollm2_path), 1)
    assert found["texts of 5 schemas"] == 5 and found["valid of those"] == 1
    kept = json.loads((ROOT / "benchmarks" / "results" / "savings.json").read_text())
    assert found.keys() <= kept.keys() and len(kept) == 23


def test_what_llama_cpp_was_compiled_for_is_told():
    side, build = peers.llama_cpp()
    assert (side == "llama.cpp compiled") == bool(find_spec("llama_cpp"))
    assert "AVX" in build or "NEON" in build


@pytest.mark.slow
def test_flax_speed(tmp_path):
    """Each side starts, answers and is measured, on a model whose widths all sides take."""
    args = replace(TINY, dim=128, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=128)
    path = write_checkpoint(tmp_path / "tiny", args)
    found = flax_speed.compare(str(path), "fp32", [1, 2, 3], 100, turns=1, threads=1)
    assert {key.split(":")[0] for key in found} == {f"fp32, {side}" for side in flax_speed.SIDES}
    # A decoding step is a difference of two times, which noise can make negative.
    assert len(found) == 9 and all(map(math.isfinite, found.values()))
