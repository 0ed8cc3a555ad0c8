"""Conversion to GGUF in the types as stored, exactly, or in the nearest, saying what is lost."""

import re
import warnings

import pytest
import torch
from conftest import TINY, random_weights
from published import INTEGERS, publish, publish_meta
from test_checkpoint_gguf import Type, write

from llama import checkpoint
from llama.checkpoint import InMemory, gguf, weight_shapes
from llama.checkpoint.convert import convert

# Those that GGUF has a type for, and the type; others are refused, and the nearest type.
EXACT = {"GPTQ": "Q4_0", "GPTQ, 8 bit": "Q8_0", "GPTQ, activation order": "F32"}
NEAREST = {
    "AWQ, groups of 32": "Q4_1",
    "GPTQ v2": "Q4_1",
    "GPTQ v2, 8 bit": "Q8_0",
    "w4a16": "Q4_0",
    "w8a8": "Q8_0",
    "LLM.int8()": "Q8_0",
}
MATRIX = "layers.1.attention.wk.weight"


def largest_error(source, written) -> float:
    """Relative to the largest value of the weight."""
    found = []
    for name, shape in weight_shapes(source.args).items():
        ours, theirs = (c.read(name, 0, 0, shape[0]).float() for c in (source, written))
        found.append(((ours - theirs).abs().max() / ours.abs().max()).item())
    return max(found)


@pytest.mark.parametrize("name", EXACT)
def test_what_gguf_has_a_type_for_is_kept_exactly(tmp_path, name):
    publish(tmp_path / "ckpt", INTEGERS[name])
    source = checkpoint.open(tmp_path / "ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = convert(source, tmp_path / "m.gguf", "gguf", quant="keep", verify=True, quiet=True)
    written = checkpoint.open(path)
    assert written.stored_as(MATRIX) == EXACT[name]
    assert largest_error(source, written) == 0


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "Q5_1"])
def test_types_of_gguf_are_copied_also_where_they_are_not_computed(tmp_path, kind):
    source = checkpoint.open(write(tmp_path / "a.gguf", quantization=Type[kind]))
    path = convert(source, tmp_path / "b.gguf", "gguf", quant="keep", verify=True, quiet=True)
    written = checkpoint.open(path)
    assert written.stored_as(MATRIX) == source.stored_as(MATRIX) == kind
    assert largest_error(source, written) == 0


@pytest.mark.parametrize("name", NEAREST)
def test_what_it_has_none_for_is_refused_or_rounded_as_said(tmp_path, name):
    publish(tmp_path / "ckpt", INTEGERS[name])
    source = checkpoint.open(tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"--quant nearest rounds: .* are off by up to"):
        convert(source, tmp_path / "m.gguf", "gguf", quant="keep", quiet=True)
    assert not (tmp_path / "m.gguf").exists()
    with pytest.warns(UserWarning, match=f"as {NEAREST[name]}, are off by up to") as said:
        path = convert(
            source, tmp_path / "m.gguf", "gguf", quant="nearest", verify=True, quiet=True
        )
    written = checkpoint.open(path)
    assert written.stored_as(MATRIX) == NEAREST[name]
    stated = max(float(re.search(r"up to (\S+) of", str(one.message))[1]) for one in said)
    found = largest_error(source, written)
    assert found == pytest.approx(stated, rel=0.06) and found < 0.005


def test_metas_int4_has_nearest_types(tmp_path):
    publish_meta(tmp_path / "ckpt", True, False)
    source = checkpoint.open(tmp_path / "ckpt")
    with pytest.warns(UserWarning, match="a rotation added as Q8_0"):
        path = convert(source, tmp_path / "m.gguf", "gguf", quant="nearest", quiet=True)
    written = checkpoint.open(path)
    kinds = [
        written.stored_as(f"layers.0.{name}.weight") for name in ("attention.wq", "feed_forward.w2")
    ]
    assert kinds == ["Q4_0", "Q8_0"] and written.stored_as("output.weight") == "Q8_0"
    assert largest_error(source, written) < 0.005


@pytest.mark.parametrize("kind", ["q4_k_m", "q4_0", "bf16", "f32"])
def test_a_gguf_file_is_kept_to_the_bit(tmp_path, kind):
    source = checkpoint.open(
        gguf.write(InMemory(TINY, random_weights(TINY)), tmp_path / "a.gguf", kind)
    )
    path = convert(source, tmp_path / "b.gguf", "gguf", quant="keep", verify=True, quiet=True)
    written = checkpoint.open(path)
    for name, shape in weight_shapes(TINY).items():
        assert written.stored_as(name) == source.stored_as(name)
        assert torch.equal(*(c.read(name, 0, 0, shape[0]) for c in (source, written)))
