"""`llama plan`: what it says follows from the machine's figures, and holds under simulation."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT
from vision import TINY_LLAMA4, without_images

from llama.apps import cli, machines, measuring, planning
from llama.apps.plan_options import PlanOptions
from llama.engine.simulation import Pass
from llama.families.variants import VariantArgs

SMALL = PlanOptions("8b", requests=60, max_rows=16, prompt=200, answer=30, max_seq_len=2048)


def replica(options=SMALL, tensor=1):
    found = planning.replicas(options)[2]
    return next(one for one in found if one.tensor == tensor)


def test_a_pass_takes_what_the_machine_needs():
    """Reading the weights for few tokens, products for many; less on more devices, but for what
    they tell each other."""
    kind, args = machines.KINDS["h100"], machines.SHAPES["8b"]
    weights, flops = machines.work(args, 16_060_522_496)
    one, many = Pass.of([(1, 0)]), Pass.of([(512, 0)] * 8)

    def cost(tensor, network=1e10):
        ideal = machines.Efficiency(1, 1, 0)
        return machines.estimated(
            kind, args, tensor, 16_060_522_496 // tensor, 131072 / tensor, 2, ideal, network
        )

    launched = args.n_layers * machines.LAYER
    assert cost(1)(one) == pytest.approx(launched + weights / kind.bandwidth, rel=1e-3)
    assert cost(1)(many) == pytest.approx(launched + 4096 * flops / kind.flops, rel=0.05)
    assert cost(8)(many) < cost(4)(many) < cost(2)(many) < cost(1)(many)
    assert cost(16)(many) > cost(8)(many)  # over the network
    assert cost(16, 1e11)(many) < cost(16)(many)


def test_a_token_takes_its_own_experts():
    """And a pass of text neither reads nor computes the image encoder."""
    dense = machines.work(TINY_LLAMA4, 10**6)[1]
    fewer = replace(TINY_LLAMA4, num_experts=2)
    assert machines.work(fewer, 10**6)[1] == pytest.approx(dense, rel=0.01)  # but for the router
    both = replace(TINY_LLAMA4, top_k=2)
    expert = 3 * TINY_LLAMA4.dim * TINY_LLAMA4.expert_dim
    assert machines.work(both, 10**6)[1] - dense == 2 * TINY_LLAMA4.n_layers * expert
    assert machines.work(without_images(TINY_LLAMA4), 10**6)[1] == dense


def test_memory_is_that_of_the_estimate():
    kind, _, found = planning.replicas(replace(SMALL, model="70b"))
    assert [one.tensor for one in found] == [4, 8]  # 141 GB of weights
    for one in found:
        assert one.weights == pytest.approx(141.1e9 / one.tensor, rel=0.01)
        assert one.weights + one.cache <= kind.memory * planning.USABLE
    over = planning.replicas(replace(SMALL, model="405b"))[2]
    assert [one.tensor for one in over] == [16, 32, 64]  # over machines, since none holds it
    halved = planning.replicas(replace(SMALL, model="70b", quantize="int4"))[2]
    assert halved[0].tensor == 1 and halved[0].weights < 50e9


def test_no_replica_generates_more_than_its_passes():
    one = replica()
    requests, tokens = planning.capacity(one, SMALL)
    least = one.cost(Pass.of([(1, 1)] * SMALL.max_rows))
    assert 0 < requests < tokens <= SMALL.max_rows / least
    found = planning.plan(replace(SMALL, replicas=2, tensor=1, rate=10 * requests))["plans"]
    assert found[0]["load"] == pytest.approx(5, rel=0.01)
    assert found[0]["tokens_per_s"] == found[0]["capacity_tokens_per_s"]


def test_more_replicas_never_make_requests_wait_longer():
    one = replica()
    rate = planning.capacity(one, SMALL)[0]
    waits = [
        planning.figures(one, SMALL, [1.2 * rate / copies], 1).first_p99 for copies in (1, 2, 4, 8)
    ]
    assert waits == sorted(waits, reverse=True) and waits[0] > waits[-1]


def test_what_is_recommended_meets_the_targets_and_is_least():
    options = replace(SMALL, rate=200, first=0.3, between=0.05)
    best, *others = planning.plan(options)["plans"]
    assert best["load"] <= 0.9 and others
    assert all(best["machines"] <= other["machines"] for other in others)
    for found in (best, *others):
        assert found["first_p99"]["mean"] <= options.first + found["first_p99"]["within"]
        assert found["machines"] * 8 >= found["replicas"] * found["tensor"]


def test_a_study_simulates_as_much_whatever_its_size(monkeypatch):
    """1,000 replicas and 10 million requests a day: samples of one replica's hours."""
    simulated = []
    simulate = planning.simulate

    def counting(scheduler, arrivals, cost):
        simulated.append(len(arrivals))
        return simulate(scheduler, arrivals, cost)

    monkeypatch.setattr(planning, "simulate", counting)
    seen = []
    for per_day, copies in ((1e4, 1), (1e7, 1000)):
        simulated.clear()
        options = replace(SMALL, per_day=per_day, replicas=copies, tensor=1, answer=5)
        seen.append((planning.plan(options)["plans"][0]["first_p99"], sum(simulated)))
    (few, of_few), (many, of_many) = seen
    assert of_few == of_many == 4 * 16 + 100 + 5 * 24 * 20
    assert few == many  # a replica's share is the same


def test_a_day_has_its_requests_and_its_peak():
    found = planning.rates(replace(SMALL, per_day=86400.0, peak=1.5))
    assert sum(found) / 24 == pytest.approx(1) and found[0] == max(found) == 1.5


def test_quantiles_with_weights():
    values = [(3.0, 1.0), (1.0, 8.0), (2.0, 1.0)]
    assert [planning.quantile(values, q) for q in (0.5, 0.8, 0.85, 1)] == [1, 1, 2, 3]


def test_measured_here_and_planned_for(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    monkeypatch.setattr(measuring, "CONTEXTS", (0, 128))
    monkeypatch.setattr(measuring, "CHUNKS", (1, 4, 16, 64))
    path, asked = tmp_path / "here.json", ["plan", str(tiny_dir), "--dtype", "fp32"]
    assert cli.main([*asked, "--measure", str(path)]) == 0
    said = capsys.readouterr().out
    assert cli.main([*asked, "--measure", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(path) and f"{path}: {told['passes']} passes; 1 token" in said
    assert told["one_token_s"] > 0 and told["most_tokens"] == 64
    found = machines.Measured.read(str(path))
    assert {made.tokens for made, _ in found.passes} == {1, 4, 16, 64}
    assert all(seconds > 0 for _, seconds in found.passes)
    asked += ["--machine", str(path), "--requests", "20", "--rate", "0.001", "--first", "1e9"]
    asked += ["--between", "1e9", "--max-seq-len", "4096", "--max-rows", "4", "--json"]
    assert cli.main(asked) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [(one["machines"], one["tensor"], one["fitted"]) for one in plans] == [(1, 1, True)]
    # Another model's passes follow from what these reached of the machine.
    assert cli.main([*asked[:1], "1b", *asked[2:-1]]) == 0
    assert "Estimated" in capsys.readouterr().out


def test_measurements_of_a_model_whose_shape_has_tuples(tmp_path, monkeypatch):
    """SmolLM3's, of which JSON makes lists: they fit it, and say what others take."""
    args = VariantArgs(**{**vars(machines.SHAPES["1b"]), "no_rope_layers": (3, 7)})
    monkeypatch.setitem(machines.SHAPES, "odd", args)
    path = tmp_path / "here.json"
    options = replace(SMALL, model="odd", machine=str(path))
    passes = [[1, n, n, n, 0.1 * n] for n in (1, 2, 4, 8)]
    written = {
        "model": machines.identity(args, options, None), "work": machines.work(args, 10**9),
        "kind": machines.KINDS["xeon"]._asdict(), "passes": passes,
    }  # fmt: skip
    path.write_text(json.dumps(written))
    for model, fitted in (("odd", True), ("3b", False)):
        assert planning.replicas(replace(options, model=model))[2][0].fitted == fitted


MISTAKES = {
    "machine": ("8b --machine b52", "machine='b52': choose one of h100, h200, "),
    "no measurements": ("8b --machine LICENSE", "machine='LICENSE': choose one of"),
    "model": ("9b", "; or name a shape: 1b, 3b, 8b"),
    "no room": (
        "405b --machine l4 --tensor 8",
        "405b fits no split: of 8 devices each needs weights of",
    ),
    "heads": ("8b --tensor 3", "tensor=3 doesn't divide the 32 heads of 8b: choose one of 1, 2"),
    "targets": ("8b --first 1e-6 --requests 20", "keeps first=1e-06 s and between=0.1 s"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, monkeypatch, capsys):
    text, message = MISTAKES[mistake]
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", *text.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_values_out_of_range_are_named():
    for words, message in (
        (["--rate", "0"], "rate=0.0 must be more than 0"),
        (["--rate", "inf"], "rate=inf must be more than 0, and finite"),
        (["--per-day", "nan"], "per_day=nan must be more than 0, and finite"),
        (["--peak", "3"], "peak=3.0 must be between 1 and 2"),
        (["--replicas", "0"], "replicas=0 must be at least 1"),
        (["--prompt", "9000"], "are 9129 tokens, and max_seq_len=8192"),
    ):
        with pytest.raises(Exception, match=message):
            cli.parse(["plan", "8b", *words])
