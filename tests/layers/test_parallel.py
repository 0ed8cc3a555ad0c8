"""Ranks: the arithmetic of who holds what, and real processes that must agree."""

import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run_ranks, write_checkpoint

from llama.layers import parallel

PROMPTS = [[1, 2, 3], [7] * 20, [250, 0, 13, 99, 5], [42]]


def test_ranges_of_all_ranks_cover_each_weight_exactly_once():
    for size in (1, 7, 96, 512):
        for world in (1, 2, 3, 4, 8, 9):
            covered = [
                i
                for rank in range(world)
                for start, stop in parallel.shard_ranges(
                    "output.weight", size, rank, world, n_heads=72, n_kv_heads=8
                )
                for i in range(start, stop)
            ]
            assert covered == list(range(size))
            assert parallel.padded(size, world) % world == 0
            assert 0 <= parallel.padded(size, world) - size < world


@pytest.mark.parametrize(
    "n_heads, n_kv_heads", [(8, 2), (9, 3), (32, 8), (12, 12), (64, 8), (8, 1), (24, 4), (12, 6)]
)
def test_each_query_head_finds_its_own_key_value_head_on_its_rank(n_heads, n_kv_heads):
    """Local query head j uses local key/value head j // (local heads per key/value head)."""
    group = n_heads // n_kv_heads
    for world in (w for w in range(1, n_heads + 1) if n_heads % w == 0):
        local = n_heads // world
        counts = set()
        for rank in range(world):
            held = parallel.kv_heads(rank, world, n_heads, n_kv_heads)
            counts.add(len(held))
            assert local % len(held) == 0
            for j in range(local):
                assert held[j // (local // len(held))] == (rank * local + j) // group
        assert len(counts) == 1  # all ranks have weights of one shape
        if n_kv_heads % world == 0:
            assert counts == {n_kv_heads // world}  # nothing is replicated without need
        elif world % n_kv_heads == 0:
            assert counts == {1}


def test_axes_by_name():
    assert parallel.shard_axis("layers.17.attention.wo.weight") == 1
    assert parallel.shard_axis("layers.0.feed_forward.w2.weight") == 1
    assert parallel.shard_axis("layers.0.attention.wk.weight") == 0
    assert parallel.shard_axis("tok_embeddings.weight") == 0
    assert parallel.shard_axis("output.weight") == 0
    assert parallel.shard_axis("norm.weight") is None
    assert parallel.shard_axis("layers.3.ffn_norm.weight") is None


def test_it_starts_in_a_plain_process_quietly_and_without_environment(tiny_dir, tmp_path):
    """A notebook has no RANK, no MASTER_ADDR (llama issue 391), and stdout is the user's."""
    code = (
        "import sys; out = sys.stdout\n"
        "from llama import Llama\nfrom llama.layers import parallel\n"
        f"for _ in range(2): llama = Llama.build({str(tiny_dir)!r}, device='cpu')\n"
        "assert sys.stdout is out and parallel.world_size() == 1\n"
        "print(len(llama.generate([[1, 2]], 5, temperature=0)[0][0]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5\n"


def test_one_process_cannot_be_two_ranks(tiny_dir):
    from llama import Llama

    with pytest.raises(ValueError, match=r"model_parallel_size=2 .*torchrun --nproc_per_node 2"):
        Llama.build(tiny_dir, model_parallel_size=2, device="cpu")
    with pytest.raises(ValueError, match="model_parallel_size=0"):
        parallel.initialize(0, device="cpu")


def test_a_gpu_that_is_not_there_is_refused():
    import torch

    with pytest.raises(ValueError, match=f"this machine has {torch.cuda.device_count()} GPUs"):
        parallel.pick_device("cuda:99")
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="mps was requested and this machine has none"):
            parallel.pick_device("mps")


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_number_of_ranks_gives_the_tokens_of_one(tiny, tiny_dir, tmp_path, world):
    """2 key/value heads: whole at 2 ranks, replicated at 4 and 8. Every rank has the tokens."""
    expected, logprobs = tiny.generate(PROMPTS, 16, temperature=0, logprobs=True)
    report = run_ranks(world, "generate", tmp_path / "out", ckpt=str(tiny_dir), prompts=PROMPTS)
    assert report["all_ranks"] == [expected] * world
    for row, reference in zip(report["logprobs"], logprobs, strict=True):
        assert max(abs(a - b) for a, b in zip(row, reference, strict=True)) <= 1e-4


def test_sizes_that_do_not_divide_are_padded(tmp_path):
    """3 ranks, a vocabulary of 512 and a width of 100: zeros fill up what the last rank lacks."""
    from dataclasses import replace

    from llama import Llama

    args = replace(TINY, dim=72, n_heads=9, n_kv_heads=3, hidden_dim=100)
    path = write_checkpoint(tmp_path / "ckpt", args)
    llama = Llama.build(path, max_seq_len=128, device="cpu", dtype="fp32")
    expected, _ = llama.generate(PROMPTS, 16, temperature=0)
    report = run_ranks(3, "generate", tmp_path / "out", ckpt=str(path), prompts=PROMPTS)
    assert report["tokens"] == expected


def test_sampling_is_decided_by_rank_0(tiny_dir, tmp_path):
    """Ranks that draw for themselves drift apart (gpt-oss issue 270)."""
    report = run_ranks(
        2, "generate", tmp_path / "out", ckpt=str(tiny_dir), prompts=PROMPTS, temperature=9.0
    )
    assert report["all_ranks"][0] == report["all_ranks"][1]
    assert len({tuple(row) for row in report["tokens"]}) == len(PROMPTS)


def test_bfloat16_on_two_ranks(tiny_dir, tmp_path):
    report = run_ranks(
        2,
        "generate",
        tmp_path / "out",
        ckpt=str(tiny_dir),
        prompts=PROMPTS,
        build={"dtype": "bf16"},
        stop_tokens=[],
    )
    assert report["all_ranks"][0] == report["all_ranks"][1]
    assert [len(row) for row in report["tokens"]] == [16] * 4


def test_messages_and_starting_twice(tiny_dir, tmp_path):
    report = run_ranks(2, "messages", tmp_path / "a", ckpt=str(tiny_dir))
    assert report["gathered"] == [["said by rank 0", [7], [3.0, 3.0, 3.0]]] * 2
    report = run_ranks(2, "twice", tmp_path / "b", ckpt=str(tiny_dir))
    assert report["same"] and "torch._dynamo" not in report["imported"]  # it takes a second


def test_only_rank_0_prints_and_fairscale_is_quiet(tiny_dir, tmp_path):
    report = run_ranks(2, "generate", tmp_path / "out", ckpt=str(tiny_dir), prompts=PROMPTS)
    assert report["stdout"] == ""
    assert report["stderr"].count("loaded") == 1


def test_ranks_that_cannot_share_the_heads_are_told_so(tiny_dir, tmp_path):
    report = run_ranks(3, "too_many", tmp_path / "out", ckpt=str(tiny_dir))
    assert report["error"] == "3 ranks can't share 8 heads: use a number that divides 8"


def test_a_silent_peer_is_an_error_and_not_a_hang(tiny_dir, tmp_path):
    report = run_ranks(2, "silent_peer", tmp_path / "out", ckpt=str(tiny_dir))
    assert "imed out" in report["error"]


def test_replicas_work_side_by_side(tiny, tiny_dir, tmp_path):
    expected, _ = tiny.generate(PROMPTS, 8, temperature=0)
    report = run_ranks(2, "replicas", tmp_path / "out", ckpt=str(tiny_dir), prompts=PROMPTS)
    assert report["world"] == 1 and report["tokens"] == expected


def test_smollm2_on_three_ranks_gives_the_reference(smollm2_path, parity, tmp_path):
    prompts = [case["ids"] for case in parity["completions"]]
    report = run_ranks(
        3,
        "generate",
        tmp_path / "out",
        ckpt=str(smollm2_path),
        prompts=prompts,
        max_gen_len=16,
        stop_tokens=[],
    )
    assert report["tokens"] == [case["greedy"][:16] for case in parity["completions"]]
