"""Opening and loading, whatever the format: strictness, and resharding as arithmetic on slices."""

import ast
import re
from dataclasses import replace
from graphlib import TopologicalSorter

import pytest
import torch
from conftest import ROOT, TINY, random_weights, write_checkpoint
from safetensors.torch import load_file, save_file

from llama import Llama, Transformer, checkpoint
from llama.checkpoint import InMemory, local_shape, read_shard, shapes, weight_shapes
from llama.checkpoint.convert import convert
from llama.checkpoint.listing import checkpoint_files
from llama.layers import parallel

ODD = replace(TINY, dim=72, n_heads=9, n_kv_heads=3, hidden_dim=100, vocab_size=500)


def assemble(args, name, world):
    """What all ranks hold of a weight, put together again; replicas must agree."""
    source = InMemory(args, random_weights(args))
    shards = [read_shard(source, name, rank, world) for rank in range(world)]
    for rank, shard in enumerate(shards):
        assert tuple(shard.shape) == local_shape(args, name, rank, world)
    axis, whole = parallel.shard_axis(name), source.weights[name]
    if axis is None:
        assert all(torch.equal(shard, whole) for shard in shards)
        return shards[0], whole
    if name.endswith(parallel.KV):
        heads = {}
        for rank, shard in enumerate(shards):
            held = parallel.kv_heads(rank, world, args.n_heads, args.n_kv_heads)
            for head, part in zip(held, shard.split(args.head_dim), strict=True):
                assert torch.equal(heads.setdefault(head, part), part)
        return torch.cat([heads[head] for head in sorted(heads)]), whole
    joined = torch.cat(shards, axis)
    assert not joined.narrow(axis, whole.shape[axis], joined.shape[axis] - whole.shape[axis]).any()
    return joined.narrow(axis, 0, whole.shape[axis]), whole


@pytest.mark.parametrize("args, worlds", [(TINY, (1, 2, 4, 8)), (ODD, (1, 3, 9))])
def test_ranks_together_hold_each_weight_bit_for_bit(args, worlds, monkeypatch):
    monkeypatch.setattr(shapes, "CHUNK_ELEMENTS", 1000)  # several reads a weight
    for world in worlds:
        for name in weight_shapes(args):
            joined, whole = assemble(args, name, world)
            assert torch.equal(joined, whole), (name, world)


def test_model_and_plan_agree_on_every_shape():
    parallel.initialize(device="cpu")
    for args in (TINY, ODD, replace(TINY, tied_embeddings=True)):
        model = Transformer(args, device="meta")
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert shapes == {name: local_shape(args, name, 0, 1) for name in weight_shapes(args)}


def test_loading_is_strict_about_names_and_shapes():
    parallel.initialize(device="cpu")
    weights = random_weights(TINY)

    def load(changed):
        return checkpoint.load(InMemory(TINY, changed), Transformer(TINY, device="meta"))

    lacking = {name: w for name, w in weights.items() if name != "layers.1.attention.wq.weight"}
    with pytest.raises(ValueError, match=r"lacks layers\.1\.attention\.wq\.weight \(1 in all\)"):
        load(lacking)
    with pytest.raises(ValueError, match=r"no place for: layers\.0\.attention\.wq\.bias"):
        load(weights | {"layers.0.attention.wq.bias": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"norm\.weight has the shape \(32,\).*asks for \(64,\)"):
        load(weights | {"norm.weight": torch.ones(32)})


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: re.sub(r"\.(\d)\.", r".\1._checkpoint_wrapped_module._orig_mod.", name),
    ],
    ids=["DDP", "torch.compile", "layers alone"],
)
def test_names_of_wrappers_are_taken_off(tmp_path, wrapped):
    """Of torch.compile, DDP and FSDP, from `torch.save(model.state_dict())`."""
    plain = write_checkpoint(tmp_path / "meta", TINY)
    convert(plain, tmp_path / "hf", "hf", quiet=True)
    for path, file, read, write in (
        (plain, "consolidated.00.pth", torch.load, torch.save),
        (tmp_path / "hf", "model.safetensors", load_file, save_file),
    ):
        source = checkpoint.open(path)
        expected = {
            name: source.read(name, 0, 0, shape[0]).clone()
            for name, shape in weight_shapes(TINY).items()
        }
        weights = {name: weight.clone() for name, weight in read(path / file).items()}
        write({wrapped(name): weight for name, weight in weights.items()}, path / file)
        source = checkpoint.open(path)
        checkpoint.check_shapes(source)
        for name, weight in expected.items():
            assert torch.equal(source.read(name, 0, 0, len(weight)), weight)
        name, weight = next(iter(weights.items()))
        write({**weights, f"module.{name}": weight + 1}, path / file)
        with pytest.raises(ValueError, match="no place for: module"):  # which of the two?
            checkpoint.check_shapes(checkpoint.open(path))


def test_tied_embeddings_share_one_tensor():
    parallel.initialize(device="cpu")
    args = replace(TINY, tied_embeddings=True)
    model = checkpoint.load(InMemory(args, random_weights(args)), Transformer(args, device="meta"))
    assert model.output.weight is model.tok_embeddings.weight


def test_dtype_is_converted_on_the_way():
    parallel.initialize(device="cpu")
    source = InMemory(TINY, random_weights(TINY))
    model = checkpoint.load(source, Transformer(TINY, device="meta"), dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, source.weights[name].bfloat16())


def test_files_import_each_other_in_no_circle():
    """Checkpoints and text: at the top of a file only, and in an order."""
    files = [ROOT / "llama" / "tokenizer.py", *(ROOT / "llama" / "checkpoint").rglob("*.py")]
    files += (ROOT / "llama" / "text").rglob("*.py")
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    graph = {}
    for name, file in names.items():
        tree = ast.parse(file.read_text())
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        for node in imports:
            module = getattr(node, "module", None) or node.names[0].name
            if module.split(".")[0] == "llama":
                assert node in tree.body, f"{name} imports {module} late"
                found = {module, f"{module}.__init__", *(f"{module}.{n.name}" for n in node.names)}
                found &= names.keys()
                if len(found) > 1:  # a module of a package, not what the package hands on
                    found.discard(f"{module}.__init__")
                graph.setdefault(name, set()).update(found)
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_what_is_not_a_checkpoint_is_named(tmp_path, tiny_dir):
    with pytest.raises(FileNotFoundError, match="llama download smollm2"):
        Llama.build(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected params\.json"):
        checkpoint.open(tmp_path)
    text = tmp_path / "model.txt"
    text.write_text("no weights")
    with pytest.raises(ValueError, match="isn't a GGUF file"):
        checkpoint.open(text)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="isn't a GGUF file"):
        checkpoint.open(tmp_path / "empty.gguf")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter.*--adapter-dir .*/adapter"):
        checkpoint.open(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["meta", "hf", "gguf"])
def test_files_of_other_formats_beside_a_checkpoint(tmp_path, kind):
    """As Mistral's repositories and those with GGUF files have them."""
    source, path = InMemory(TINY, random_weights(TINY)), tmp_path / "model"
    to = path / "m.gguf" if kind == "gguf" else path
    convert(source, to, kind, quiet=True)
    others = ["config.json", "consolidated.safetensors"]
    others += {"meta": ["m.gguf"], "hf": ["params.json", "m.gguf"], "gguf": []}[kind]
    for name in others:
        if not (path / name).exists():
            (path / name).write_text("{}")
    assert type(checkpoint.open(path)) is type(checkpoint.open(to))
    names = {file.name for file in path.iterdir()}
    found = checkpoint_files("here", names.__contains__, lambda n: (path / n).read_bytes(), names)
    for file in names - set(found):
        (path / file).unlink()
    norm = checkpoint.open(path).read("norm.weight", 0, 0, TINY.dim)
    assert torch.equal(norm, source.weights["norm.weight"]) and not {*found} & {*others[1:]}


def test_a_directory_with_two_gguf_files_is_ambiguous(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"name one of them: a\.gguf, b\.gguf"):
        checkpoint.open(tmp_path)


def test_a_missing_or_foreign_tokenizer_is_named(tmp_path, smollm2_path):
    path = write_checkpoint(tmp_path / "ckpt", TINY)
    with pytest.raises(ValueError, match=r"49152 tokens .* knows 512: they don't belong together"):
        Llama.build(path, smollm2_path, device="cpu")
    (path / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model .* pass tokenizer_path"):
        Llama.build(path, device="cpu")
    with pytest.raises(FileNotFoundError, match="no tokenizer file at"):
        Llama.build(path, tmp_path / "nothing", device="cpu")
