"""The estimate before loading: right to the byte, kept while loading, refused if it can't fit."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, write_byte_tokenizer

from llama import Llama
from llama.backends import memory
from llama.checkpoint import InMemory, meta, weight_shapes


def test_estimate_is_what_is_allocated(tiny):
    need = memory.estimate(tiny.model.params, 1, torch.float32)
    assert need.weights == sum(p.nbytes for p in tiny.model.parameters())
    cache = tiny.model.new_cache(tiny.model.params.max_batch_size)
    assert need.cache == cache.nbytes
    assert need.total == need.weights + need.cache


def test_estimate_of_a_rank_counts_replicated_heads():
    whole, eighth = (memory.estimate(TINY, world, torch.float32) for world in (1, 8))
    assert eighth.cache == whole.cache / 2  # two key/value heads on eight ranks: one each
    assert whole.weights / 8 < eighth.weights < whole.weights / 4


def test_tied_embeddings_are_counted_once():
    tied = memory.estimate(replace(TINY, tied_embeddings=True), 1, torch.bfloat16)
    free = memory.estimate(TINY, 1, torch.bfloat16)
    assert free.weights - tied.weights == 512 * 64 * 2


def test_what_cannot_fit_is_refused_before_loading(tiny_dir, monkeypatch, capfd):
    monkeypatch.setattr("llama.generation.Transformer", None)  # not even built
    with pytest.raises(ValueError) as caught:
        Llama.build(tiny_dir, max_seq_len=10**9, max_batch_size=1000, device="cpu", dtype="fp32")
    for part in ("can't fit", "weights", "cache", "1000 rows of 1000000000 tokens", "max_seq_len"):
        assert part in str(caught.value)
    assert "loaded" not in capfd.readouterr().err


def test_ranks_on_one_machine_share_its_memory(monkeypatch):
    args = replace(TINY, max_seq_len=2048)
    need = memory.estimate(args, 2, torch.float32).total
    monkeypatch.setattr(memory, "available", lambda _: int(need * 1.5))
    memory.preflight(args, 2, torch.float32, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="on each of 2 ranks"):
        memory.preflight(args, 2, torch.float32, torch.device("cpu"))


def test_the_estimate_is_printed_on_stderr(tiny_dir, capfd):
    Llama.build(tiny_dir, device="cpu", dtype="fp32", max_seq_len=64, max_batch_size=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "weights 0.49 MB + cache 0.03 MB (2 rows of 64 tokens) as float32" in err


def test_available_is_positive_and_not_more_than_the_machine_has():
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.available(torch.device("cpu")) <= pages


def test_what_the_allocator_of_a_gpu_holds_unused_is_available(monkeypatch):
    """What another model has left there, for example."""
    for name, value in (
        ("mem_get_info", (5, 100)), ("memory_reserved", 60), ("memory_allocated", 20),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.available(torch.device("cuda")) == 45


@pytest.mark.parametrize("dtype, itemsize", [("bf16", 2), ("fp32", 4)])
@pytest.mark.slow
def test_loading_holds_little_more_than_the_weights(tiny_dir, tmp_path, dtype, itemsize):
    """Peak resident memory <= 1.3 x the weights, beside what imports and a warm-up took.

    That is 240 MB with a torch for the CPU alone, and several times as much with CUDA's libraries.
    """
    args = replace(
        TINY, dim=1024, n_layers=8, n_heads=16, n_kv_heads=4, hidden_dim=4096, vocab_size=16384
    )
    half = torch.tensor(0.5)
    weights = {name: half.expand(shape) for name, shape in weight_shapes(args).items()}
    path = meta.write(InMemory(args, weights), tmp_path / "big", 2)
    write_byte_tokenizer(path / "tokenizer.model")
    code = (
        "from llama import Llama\n"
        "def held(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(line for line in lines if key in line).split()[1]) * 1024\n"
        f"Llama.build({str(tiny_dir)!r}, device='cpu', dtype={dtype!r}, max_seq_len=64)\n"
        "before = held('VmRSS')\n"
        f"Llama.build({str(path)!r}, device='cpu', dtype={dtype!r})\n"
        "print(before, held('VmHWM'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    size = memory.estimate(args, 1, torch.float32).weights // 4 * itemsize
    before, peak = map(int, done.stdout.split())
    print(f"{before / 1e6:.0f} MB before, then {(peak - before) / size:.3f} x the weights")
    assert peak - before <= 1.3 * size
