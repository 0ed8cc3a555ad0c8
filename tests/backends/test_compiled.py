"""Layers by torch.compile say what model.py says, and aren't compiled anew as a context grows."""

import gguf
import pytest
import torch
import torch._dynamo
from conftest import run_ranks, write_checkpoint
from test_native import SMALL, difference, ids, pair, stepped

from llama import Llama
from llama.backends import compiled
from llama.backends.quantized import QuantizedLinear
from llama.engine.speculative import DraftLength


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def only(monkeypatch, before="eager", after="eager"):
    """Functions are traced as always and run as traced; the code of each takes 10 s to generate."""
    parts = ((compiled._before, before), (compiled._after, after))
    both = [torch.compile(part, dynamic=True, backend=backend) for part, backend in parts]
    monkeypatch.setattr(compiled, "_compiled", lambda: both)


@pytest.mark.slow
def test_it_says_what_the_plain_layers_say(tmp_path, monkeypatch):
    """fp32: the same tokens; prompts and batches of many sizes, and no graph more for a new one."""
    only(monkeypatch)
    path = write_checkpoint(tmp_path / "model", SMALL)
    plain, fast = (
        Llama.build(
            path, device="cpu", dtype="fp32", compile=False, max_batch_size=8, max_seq_len=300
        )
        for _ in "ab"
    )
    compiled.swap(fast.model)
    calls = [
        [ids(n, seed=n).tolist() for n in lengths] for lengths in ([5], [40], [3, 9, 50], [7, 7])
    ]
    for prompts in calls:
        expected, _ = plain.generate(prompts, 12, temperature=0, stop_tokens=set())
        found, _ = fast.generate(prompts, 12, temperature=0, stop_tokens=set())
        assert found == expected
    known = graphs()
    assert 0 < known <= 12
    for prompts in ([ids(100).tolist()], [ids(n).tolist() for n in (30, 2, 70, 11)]):
        expected, _ = plain.generate(prompts, 150, temperature=0, stop_tokens=set())
        found, _ = fast.generate(prompts, 150, temperature=0, stop_tokens=set())
        assert found == expected
    assert graphs() == known
    monkeypatch.setattr(DraftLength, "choose", lambda self, guesses: 3)  # passes of several tokens
    for n in (10, 11, 30):
        prompts = [[1, 2, 3] * n, [7, 8] * n]
        expected, _ = plain.generate(prompts, 20, temperature=0, stop_tokens=set())
        options = dict(temperature=0, stop_tokens=set(), speculate="lookup")
        assert fast.generate(prompts, 20, **options)[0] == expected
    assert graphs() <= known + 4


@pytest.mark.slow
def test_its_bf16_and_its_blocks_are_close(monkeypatch):
    """By passes of several tokens: single ones have a graph of their own."""
    for kind, dtype, bound in ((None, torch.bfloat16, 0.05), ("int8", torch.float32, 1e-5)):
        plain, _ = pair(SMALL, kind, dtype)
        with torch.inference_mode():
            expected = plain(ids(2, 40))
        compiled.swap(plain)
        assert difference(stepped(plain, ids(2, 40), 30, 2), expected) < bound
        only(monkeypatch, before="inductor")  # blocks become weights in both parts alike


@pytest.mark.slow
def test_blocks_that_the_gguf_package_dequantizes(monkeypatch):
    only(monkeypatch, "aot_eager", "aot_eager")
    plain, _ = pair(SMALL, "int8")
    for layer in plain.layers.modules():
        if isinstance(layer, QuantizedLinear):
            values = layer.blocks.dense(torch.float32).numpy()
            layer.data = torch.from_numpy(gguf.quantize(values, gguf.GGMLQuantizationType.Q5_0))
            layer.kind = "Q5_0"
    with torch.inference_mode():
        expected = plain(ids(2, 9))
    compiled.swap(plain)
    assert difference(stepped(plain, ids(2, 9), 5, 2), expected) < 1e-5


@pytest.mark.slow
def test_ranks_say_what_one_says(tmp_path):
    path = write_checkpoint(tmp_path / "model", SMALL)
    prompts = [[1, 2, 3], [7] * 20]
    plain = Llama.build(path, device="cpu", dtype="fp32", compile=False)
    options = dict(temperature=0, stop_tokens=set(), logprobs=True, echo=True)
    tokens, logprobs = plain.generate(prompts, 1, **options)  # in one pass: one graph
    found = run_ranks(2, "by_torch_compile", tmp_path / "out", ckpt=str(path), prompts=prompts)
    assert found["tokens"] == tokens
    for ours, expected in zip(found["logprobs"], logprobs, strict=True):
        assert ours[1:] == pytest.approx(expected[1:], abs=1e-4)
