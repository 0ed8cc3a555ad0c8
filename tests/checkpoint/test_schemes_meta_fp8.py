"""Meta's FP8 releases: what shards and their scales mean, on ranks too, and damaged files."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_weights, run_ranks, write_byte_tokenizer
from published_floats import rounded
from test_model import TOLERANCE, gap, ids, to_hugging_face
from test_schemes import load, mutations
from web import point_hub_at, serving

from llama import checkpoint
from llama.checkpoint import InMemory, hub, meta
from llama.checkpoint.remote import local_path

ARGS = replace(TINY, dim=256, hidden_dim=512, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=32)


def publish(path, shards: int, args=ARGS, dtype=torch.float8_e4m3fn):
    """Write a release of random weights, those of inner layers in FP8; returns their meaning."""
    weights = random_weights(args)
    meta.write(InMemory(args, weights), path, shards)
    for rank in range(shards):
        file, scales = path / f"consolidated.{rank:02}.pth", {}
        tensors = torch.load(file)
        for layer in range(1, args.n_layers - 1):
            for key, axis in (("w1", 0), ("w3", 0), ("w2", 1)):
                name = f"layers.{layer}.feed_forward.{key}.weight"
                q, scale = rounded(tensors[name], 1, tensors[name].shape[1])
                tensors[name] = q.to(dtype)
                scales[f"{layer}_feed_forward.{key}_{rank}"] = scale.view(-1)
                part = weights[name].chunk(shards, axis)[rank]
                part.copy_((q.double() * scale.double()).float())
        torch.save(tensors, file)
        torch.save(scales, path / f"fp8_scales_{rank}.pt")
    return weights


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_with_scales_mean_what_they_say(tmp_path, shards, dtype):
    weights = publish(tmp_path / "m", shards, dtype=dtype)
    source = checkpoint.open(tmp_path / "m")
    checkpoint.check_shapes(source)
    for name, expected in weights.items():
        assert source.stored_as(name) == ("FP8" if "layers.1.feed" in name else "F32")
        found = source.read(name, 0, 0, len(expected))
        assert torch.allclose(found, expected, rtol=3e-7, atol=0), name
        stop = min(130, len(found))
        assert torch.equal(source.read(name, 0, 5, stop), found[5:stop])
    tokens = ids(2, 30)
    with torch.no_grad():
        expected = to_hugging_face(ARGS, weights)(tokens).logits
        assert gap(load(tmp_path / "m")(tokens), expected) <= TOLERANCE


@pytest.mark.parametrize("url", ["{}/m", "hf://o/n", "download"])
def test_the_scales_are_fetched_too(tmp_path, monkeypatch, url):
    weights = publish(tmp_path / "m", 2, dtype=torch.bfloat16)
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        server.add(tmp_path / "m", "m")
        server.repo = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
        point_hub_at(server.url, tmp_path / "hub", monkeypatch)
        if url == "download":
            path, _ = hub.download(hub.parse("o/n"), tmp_path / "n")
        else:
            path = local_path(url.format(server.url))
    name = "layers.1.feed_forward.w2.weight"
    found = checkpoint.open(path).read(name, 0, 0, ARGS.dim).float()
    assert torch.allclose(found, weights[name], rtol=3e-7, atol=0)


def test_ranks_share_it(tmp_path):
    publish(tmp_path / "m", 2)
    write_byte_tokenizer(tmp_path / "m" / "tokenizer.model")
    one, four = (
        run_ranks(
            n, "generate", tmp_path / f"{n}.json", ckpt=str(tmp_path / "m"),
            prompts=[[1, 2, 3], [200] * 9], build={"max_seq_len": 64}, no_stops=True,
        )
        for n in (1, 4)
    )  # fmt: skip
    assert one["tokens"] == four["tokens"]


def test_mutated_files_load_or_are_one_error(tmp_path):
    publish(tmp_path / "m", 2, replace(ARGS, dim=128, hidden_dim=128, n_heads=4, vocab_size=24))
    mutations(tmp_path / "m")


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda path: (path / "fp8_scales_1.pt").unlink(), "lacks fp8_scales_1.pt"),
        (lambda path: torch.save({"x": torch.ones(2)}, path / "fp8_scales_0.pt"), "x is no weight"),
        (lambda path: torch.save({}, path / "fp8_scales_0.pt"), "scales in 1 of 2 files"),
    ],
)
def test_scales_that_do_not_belong_are_refused(tmp_path, break_it, message):
    publish(tmp_path / "m", 2)
    break_it(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        checkpoint.open(tmp_path / "m")
