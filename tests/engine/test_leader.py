"""Requests that reach rank 0 alone are computed by all ranks."""

from conftest import TINY, run_ranks, write_checkpoint

from llama import Llama, SamplingParams
from llama.layers.paged import PAGE


def test_two_ranks_serve_what_one_rank_generates(tmp_path):
    path = write_checkpoint(tmp_path / "tiny", TINY)
    prompts = [[1, 2, 3], [9] * 70, [7], [9] * 71]
    llama = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=128)
    options = dict(params=SamplingParams(0.9), n=2, seed=[0, 1, 2, 3], stop_tokens=set())
    expected, _ = llama.generate(prompts, 9, **options)
    report = run_ranks(2, "served", tmp_path / "out.json", ckpt=str(path), prompts=prompts)
    assert report["tokens"] == expected
    assert len(report["text"]) == 6 and set(report["text"]) <= {"a", "b"}
    assert report["error"] == "'mine'"


def test_the_caches_of_all_ranks_are_of_one_size_that_fits(tmp_path):
    path = write_checkpoint(tmp_path / "tiny", TINY)
    report = run_ranks(2, "cache_sizes", tmp_path / "out.json", ckpt=str(path))
    assert report["sharers"] == 2
    assert report["blocks"] == [2000 // 2 // PAGE + (2000 // 2 % PAGE > 0)] * 2
