"""The benchmark's parts work and compare equal work; figures are for people, not for tests."""

import torch
from transformers import LlamaForCausalLM

from benchmarks import loading
from benchmarks.peers import alternate, ours, peer


def test_loading_the_demo_model_stays_within_its_memory_bound(smollm2_path):
    """Peak resident memory <= 1.3 x the weights + 300 MB, torch and all imports included."""
    run = loading.measure("load", smollm2_path, "fp32")
    assert abs(run["weights_mb"] - 134_515_008 * 4 / 1e6) < 1
    assert run["rss_peak_mb"] <= 1.3 * run["weights_mb"] + 300


def test_sides_take_turns_and_medians_are_reported():
    calls = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4 and set(seconds) == {"a", "b"}


def test_both_sides_generate_the_same_tokens(smollm2_path):
    model = LlamaForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    prompts = [[504, 3575, 282, 4649, 314], [1604, 3987, 46477, 24, 94, 727, 2367], [9, 8]]
    mine, theirs = (
        ours(smollm2_path, "fp32", 3)(prompts, 12),
        peer(model, torch.float32)(prompts, 12),
    )
    assert mine == theirs and [len(row) for row in mine] == [12] * 3
