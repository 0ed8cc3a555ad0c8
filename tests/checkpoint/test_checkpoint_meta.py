"""Meta's format: shards of any number, old and new layouts, broken files."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_weights, run_ranks, write_checkpoint

from llama import Llama, ModelArgs, Transformer, checkpoint
from llama.checkpoint import InMemory, meta
from llama.checkpoint.meta import MetaCheckpoint
from llama.families.vision_encoder import VisionArgs
from llama.layers import parallel

PROMPTS = [[1, 2, 3], [200] * 9]


def whole(path, dtype=None):
    """All weights of a checkpoint, loaded on one rank."""
    parallel.initialize(device="cpu")
    source = checkpoint.open(path)
    model = checkpoint.load(source, Transformer(source.args, device="meta"), dtype=dtype)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_1_to_4_to_2_to_8_to_1_is_bit_exact(tmp_path, dtype):
    weights = random_weights(TINY, dtype=dtype)
    meta.write(InMemory(TINY, weights), tmp_path / "1", 1)
    for before, mp in (("1", 4), ("4", 2), ("2", 8), ("8", 1)):
        to = tmp_path / ("back" if mp == 1 else str(mp))
        meta.write(checkpoint.open(tmp_path / before), to, mp)
        assert len(list(to.glob("*.pth"))) == mp
        assert_same(whole(to), weights)
    first, last = (tmp_path / name / "consolidated.00.pth" for name in ("1", "back"))
    assert_same(torch.load(first), torch.load(last))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_four_shards_load_on_any_number_of_ranks(tiny, tmp_path, world):
    path = write_checkpoint(tmp_path / "four", TINY, mp=4)
    expected, _ = tiny.generate(PROMPTS, 12, temperature=0)
    if world == 1:
        llama = Llama.build(path, device="cpu", dtype="fp32")
        assert llama.generate(PROMPTS, 12, temperature=0)[0] == expected
    else:
        report = run_ranks(
            world, "generate", tmp_path / "out", ckpt=str(path), prompts=PROMPTS, max_gen_len=12
        )
        assert report["tokens"] == expected


def test_shards_are_what_metas_reference_would_hold(tmp_path):
    """Their `reshard_mp` is the oracle, replicated key/value heads included."""
    from llama_models.checkpoint import reshard_mp

    weights = random_weights(TINY)
    for mp in (2, 4, 8):
        meta.write(InMemory(TINY, weights), tmp_path / str(mp), mp)
        for rank in range(mp):
            ours = torch.load(tmp_path / str(mp) / f"consolidated.{rank:02d}.pth")
            repeat = max(mp // TINY.n_kv_heads, 1)
            heads = {
                name: w.view(TINY.n_kv_heads, -1).repeat_interleave(repeat, 0).view(-1, TINY.dim)
                if name.endswith(parallel.KV)
                else w
                for name, w in weights.items()
            }
            assert_same(ours, reshard_mp([heads], size=mp, rank=rank))


def test_embeddings_split_along_dim_as_in_llama_1_and_2(tmp_path):
    """Told by the shapes, not by a version (jetstream-pytorch pull request 101)."""
    weights = random_weights(TINY)
    for mp in (2, 4):
        path = meta.write(InMemory(TINY, weights), tmp_path / str(mp), mp)
        for rank in range(mp):
            file = path / f"consolidated.{rank:02d}.pth"
            shard = torch.load(file)
            width = TINY.dim // mp
            embedding = weights["tok_embeddings.weight"][:, rank * width : (rank + 1) * width]
            shard["tok_embeddings.weight"] = embedding.clone()
            shard["rope.freqs"] = torch.ones(4)
            torch.save(shard, file)
        params = json.loads((path / "params.json").read_text())
        params["vocab_size"] = -1
        (path / "params.json").write_text(json.dumps(params))
        assert checkpoint.open(path).args.vocab_size == TINY.vocab_size
        assert_same(whole(path), weights)


def test_params_of_the_published_models_are_understood(tmp_path):
    def read(**params):
        path = tmp_path / "params.json"
        path.write_text(json.dumps(params))
        return meta.read_params(path)[1]

    llama1 = dict(dim=4096, multiple_of=256, n_heads=32, n_layers=32, norm_eps=1e-6, vocab_size=-1)
    assert ModelArgs(**read(**llama1)).rope_theta == 10000.0
    llama31 = dict(dim=4096, n_layers=32, rope_theta=5e5, use_scaled_rope=True, vocab_size=128256)
    assert ModelArgs(**read(**llama31)).rope_scaling_factor == 8.0
    llama32 = dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, use_scaled_rope=True)
    assert ModelArgs(**read(**llama32)).rope_scaling_factor == 32.0
    assert ModelArgs(**read(dim=3072, n_layers=28, use_scaled_rope=True, n_heads=24)) == ModelArgs(
        dim=3072, n_layers=28, n_heads=24, use_scaled_rope=True, rope_scaling_factor=32.0,
        rope_theta=10000.0,
    )  # fmt: skip
    assert read(dim=64, rope_scaling_factor=4.0, use_scaled_rope=True)["rope_scaling_factor"] == 4.0
    vision = dict(vision_chunk_size=448, vision_max_num_chunks=4)
    vision["vision_num_cross_attention_layers"] = 8
    assert VisionArgs(**read(**llama31, n_heads=32, **vision)).vision_chunk_size == 448
    with pytest.raises(ValueError, match="video_chunk_size"):
        read(dim=4096, video_chunk_size=448)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_dim": 96},
        {"hidden_dim": 1000},
        {"hidden_dim": None, "multiple_of": 32, "ffn_dim_multiplier": 1.3},
        {"hidden_dim": 170, "dim": 64},
        {"head_dim": 16},
        {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "rope_low_freq_factor": 2.0},
        {"tied_embeddings": True, "rope_theta": 1e6, "norm_eps": 1e-6},
    ],
)
def test_written_params_give_the_same_shape_back(tmp_path, fields):
    args = replace(TINY, **fields)
    weights = random_weights(args)
    path = meta.write(InMemory(args, weights), tmp_path / "ckpt")
    found = checkpoint.open(path).args
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim",
                 "vocab_size", "norm_eps", "rope_theta", "use_scaled_rope", "tied_embeddings",
                 "rope_scaling_factor", "rope_low_freq_factor"):  # fmt: skip
        assert getattr(found, name) == getattr(args, name), name
    assert_same(whole(path), weights)


def test_metas_own_code_derives_the_width_we_write():
    for hidden in (96, 170, 171, 172, 1000, 14336):
        params = meta.params_of(replace(TINY, hidden_dim=hidden))
        again = ModelArgs(
            dim=TINY.dim,
            n_heads=TINY.n_heads,
            multiple_of=params["multiple_of"],
            ffn_dim_multiplier=params.get("ffn_dim_multiplier"),
        )
        assert again.hidden_dim == hidden


def test_writing_refuses_what_the_format_cannot_hold(tmp_path):
    source = InMemory(TINY, random_weights(TINY))
    with pytest.raises(ValueError, match="model_parallel_size 3 doesn't divide n_heads=8"):
        meta.write(source, tmp_path / "ckpt", 3)
    with pytest.raises(ValueError, match="hidden_dim=100"):
        meta.write(InMemory(replace(TINY, hidden_dim=100), {}), tmp_path / "ckpt", 8)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        meta.write(source, tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("heads, kv_heads, mp", [(6, 3, 2), (20, 5, 2), (12, 3, 6), (12, 6, 3)])
def test_key_value_heads_are_whole_in_each_shard_or_refused(
    tmp_path, monkeypatch, heads, kv_heads, mp
):
    args = replace(TINY, n_heads=heads, n_kv_heads=kv_heads, dim=heads * 8, vocab_size=516)
    source, path = InMemory(args, random_weights(args)), tmp_path / "ckpt"
    if kv_heads % mp and mp % kv_heads:
        with pytest.raises(ValueError, match=f"{heads} heads on {mp} ranks.* {kv_heads} key/value"):
            meta.write(source, path, mp)
        assert not path.exists()
        with monkeypatch.context() as patched:
            patched.setattr(meta, "check_kv_heads", lambda *_: None)
            meta.write(source, path, mp)
        with pytest.raises(ValueError, match="straddle"):
            checkpoint.open(path)
    else:
        assert_same(whole(meta.write(source, path, mp)), source.weights)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        meta.write(InMemory(TINY, random_weights(TINY)), tmp_path / "ckpt", 2)
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle ran code')",))


def broken(path):
    """Ways to break a two-shard checkpoint, and what the error must name."""
    zero, one, params = (
        path / name for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json")
    )

    def change(file, **tensors):
        torch.save(torch.load(file) | tensors, file)

    def drop(file, name):
        torch.save({k: v for k, v in torch.load(file).items() if k != name}, file)

    def edit(**keys):
        params.write_text(json.dumps(json.loads(params.read_text()) | keys))

    return {
        "missing shard": (zero.unlink, "without a gap"),
        "extra shard": (
            lambda: torch.save(torch.load(zero), path / "consolidated.02.pth"),
            "has the shape",
        ),
        "truncated": (lambda: one.write_bytes(one.read_bytes()[:-5000]), "isn't a readable"),
        "empty": (lambda: one.write_bytes(b""), "isn't a readable"),
        "no pickle": (lambda: one.write_bytes(b"x" * 10000), "isn't a readable"),
        "runs code": (lambda: one.write_bytes(pickle.dumps(Evil())), "isn't a readable"),
        "runs code in a zip": (lambda: torch.save({"x": Evil()}, one), "isn't a readable"),
        "wrong shape": (lambda: change(one, **{"norm.weight": torch.ones(3)}), "norm.weight"),
        "lacks a weight in one": (lambda: drop(one, "output.weight"), "output.weight"),
        "lacks a weight": (
            lambda: [drop(f, "layers.0.ffn_norm.weight") for f in (zero, one)],
            "layers.0.ffn_norm.weight",
        ),
        "unknown weight": (
            lambda: [change(f, surprise=torch.ones(1)) for f in (zero, one)],
            "no place for: surprise",
        ),
        "unknown key": (lambda: edit(moe_args={}), "moe_args"),
        "params don't fit": (lambda: edit(n_layers=3), "lacks layers.2"),
        "wrong dim": (lambda: edit(dim=128), "shape"),
        "no JSON": (lambda: params.write_text("{"), "isn't usable JSON"),
        "a list of no tensors": (lambda: torch.save([1, 2], one), "consolidated.01.pth"),
        "values that aren't tensors": (lambda: torch.save({"a": 1}, one), "consolidated.01.pth"),
    }


@pytest.mark.parametrize("way", broken(__import__("pathlib").Path()))
def test_broken_checkpoints_are_one_clear_error(tmp_path, way):
    path = write_checkpoint(tmp_path / "ckpt", TINY, mp=2)
    damage, named = broken(path)[way]
    damage()
    with pytest.raises(ValueError) as caught:
        Llama.build(path, device="cpu")
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_offsets_are_right_for_tensors_that_share_a_storage(tmp_path):
    """A view into a larger storage is read from its own place."""
    weights = random_weights(replace(TINY, n_layers=1))
    args = replace(TINY, n_layers=1)
    path = meta.write(InMemory(args, weights), tmp_path / "ckpt")
    shard = torch.load(path / "consolidated.00.pth")
    both = torch.stack(
        [shard["layers.0.feed_forward.w1.weight"], shard["layers.0.feed_forward.w3.weight"]]
    )
    shard["layers.0.feed_forward.w1.weight"], shard["layers.0.feed_forward.w3.weight"] = both
    torch.save(shard, path / "consolidated.00.pth")
    assert_same(whole(path), weights)


def test_reading_maps_only_the_rows_that_are_asked_for(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "ckpt", TINY)
    source, mapped = MetaCheckpoint(path), []
    from llama.checkpoint import mapped as module

    original = module.map_bytes
    monkeypatch.setattr(
        module, "map_bytes", lambda p, o, n: (mapped.append(n), original(p, o, n))[1]
    )
    source.read("tok_embeddings.weight", 0, 10, 20)
    assert mapped == [10 * TINY.dim * 4]
