"""The twin in Flax against the model in torch: logits, gradients, tokens, weights, devices."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Later, random_model, random_weights
from test_model import SHAPES, TOLERANCE, ids

from llama import Llama, checkpoint
from llama.checkpoint import InMemory
from llama.layers import parallel

jax, jnp = Later("jax"), Later("jax.numpy")
from_checkpoint = Later("llama.backends.flax", "from_checkpoint")
to_checkpoint = Later("llama.backends.flax", "to_checkpoint")
flax_generation = Later("llama.families.flax_generation")
generate = Later("llama.families.flax_generation", "generate")
weights = Later("llama.families.flax_model", "weights")

VARIANTS = SHAPES | {"positions divided": {"rope_linear_factor": 4.0}}


def twin(args=TINY, seed=0, **options):
    return from_checkpoint(InMemory(args, random_weights(args, seed)), **options)


def passed(model, tokens):
    return model(tokens)


def continued(model, tokens, start_pos, cache):
    return model(tokens, start_pos, cache), cache


@cache
def compiled(function):
    return jax.jit(function)


def forward(model, tokens):
    return compiled(passed)(model, tokens)


def extend(model, tokens, start_pos, cache):
    return compiled(continued)(model, tokens, start_pos, cache)


def gap(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_torch(shape):
    args = replace(TINY, **{"head_dim": TINY.head_dim, **shape})
    tokens = ids(3, 100)
    with torch.no_grad():
        expected = random_model(args)(tokens)
    logits = forward(twin(args), tokens.numpy())
    assert logits.dtype == jnp.float32
    assert gap(logits, expected) <= TOLERANCE


def test_gradients_equal_torch():
    tokens, theirs = ids(2, 24), random_model(TINY)
    torch.nn.functional.cross_entropy(
        theirs(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    tokens = tokens.numpy()

    @jax.jit
    @jax.grad
    def gradients(model):
        scores = jax.nn.log_softmax(model(tokens)[:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()

    ours = weights(gradients(twin()))
    for name, parameter in theirs.named_parameters():
        assert gap(ours.pop(name)[...], parameter.grad) <= TOLERANCE, name
    assert not ours


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_bit_for_bit(dtype, tied, tmp_path):
    args = replace(TINY, tied_embeddings=tied, max_seq_len=2048)
    expected = random_weights(args, dtype=dtype)
    back = to_checkpoint(from_checkpoint(InMemory(args, expected)))
    assert back.args == args and set(back.weights) == set(expected)
    checkpoint.check_shapes(back)
    for name, weight in expected.items():
        assert weight.dtype == back.weights[name].dtype
        assert torch.equal(weight, back.weights[name]), name
    checkpoint.meta.write(back, tmp_path / "meta", 2)
    again = from_checkpoint(tmp_path / "meta")
    for name, param in weights(again).items():
        assert torch.equal(torch.from_dlpack(param[...]), expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_mixed_dtypes_and_fp16(dtype):
    """Norms in fp32 beside narrower matrices, as in GGUF; fp16, which XLA has none of on a CPU."""
    rounded = {name: w.to(dtype) for name, w in random_weights(TINY).items()}
    mixed = {name: w.float() if w.dim() == 1 else w for name, w in rounded.items()}
    wide = from_checkpoint(InMemory(TINY, {name: w.float() for name, w in rounded.items()}))
    expected = generate(wide, [[1, 2, 3], [4]], 8)
    assert generate(from_checkpoint(InMemory(TINY, mixed)), [[1, 2, 3], [4]], 8) == expected
    if dtype == torch.float16:
        narrow = from_checkpoint(InMemory(TINY, rounded))
        assert generate(narrow, [[1, 2, 3], [4]], 8) == expected


def test_a_model_does_not_change_with_its_source():
    source = random_weights(TINY)
    model = from_checkpoint(InMemory(TINY, source))
    for weight in source.values():
        weight.zero_()
    assert all(np.asarray(param[...]).any() for param in weights(model).values())


def test_loading_is_strict_and_takes_dtypes_by_name():
    assert twin(dtype="bf16").output.weight.dtype == jnp.bfloat16
    lacking = random_weights(TINY)
    del lacking["norm.weight"]
    with pytest.raises(ValueError, match=r"lacks norm\.weight"):
        from_checkpoint(InMemory(TINY, lacking))
    with pytest.raises(ValueError, match="choose one of"):
        twin(dtype="int3")


def test_cached_equals_uncached_for_rows_of_different_lengths():
    """Padding on the right and stale entries are never seen."""
    model, lengths = twin(), [5, 1, 23, 12]
    rows = [ids(1, n + 3, seed=n).numpy() for n in lengths]
    padded = np.full((4, 23), 7)
    for row, n in enumerate(lengths):
        padded[row, :n] = rows[row][0, :n]
    first, cache = extend(model, padded, 0, model.new_cache(4, 32))
    parts = []
    for a, b in ((0, 1), (1, 3)):
        new = np.stack([row[0, n + a : n + b] for row, n in zip(rows, lengths, strict=True)])
        part, cache = extend(model, new, np.array(lengths) + a, cache)
        parts.append(part)
    second = jnp.concatenate(parts, 1)
    for row, n in enumerate(lengths):
        alone = forward(model, rows[row])
        assert gap(first[row : row + 1, :n], alone[:, :n]) <= TOLERANCE
        assert gap(second[row : row + 1], alone[:, n:]) <= TOLERANCE


def test_bfloat16_is_close_and_its_two_ways_to_multiply_agree():
    model, tokens = twin(dtype="bf16"), ids(1, 60).numpy()
    exact, whole = np.asarray(forward(twin(), tokens)), np.asarray(forward(model, tokens))
    _, cache = extend(model, tokens[:, :59], 0, model.new_cache(1, 60))
    step = np.asarray(extend(model, tokens[:, 59:], 59, cache)[0])
    assert np.abs(whole - exact).max() < 0.2 > np.abs(step - exact[:, 59:]).max()


def test_greedy_tokens_equal_torch_and_a_row_is_the_same_alone(tiny):
    model = twin()
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 17, 1, 40)]
    expected, _ = tiny.generate(prompts, 20, temperature=0, stop_tokens=set())
    assert generate(model, prompts, 20) == expected
    stops = {expected[0][6], expected[3][2]}
    cut, _ = tiny.generate(prompts, 20, temperature=0, stop_tokens=stops)
    assert generate(model, prompts, 20, stop_tokens=stops) == cut != expected
    drawn = generate(model, prompts, 20, temperature=1.0, seed=3)
    assert generate(model, prompts[1:2], 20, temperature=1.0, seed=3) == drawn[1:2]
    assert drawn != generate(model, prompts, 20, temperature=1.0, seed=4)
    assert generate(model, prompts, 0) == [[]] * 4
    full = generate(model, [[1] * 120, [2, 3]], 100)
    assert [len(row) for row in full] == [TINY.max_seq_len - 120, 100]


def test_temperature_draws_from_the_softmax():
    args = replace(TINY, vocab_size=8)
    model, prompt = twin(args), [1, 2, 3]
    expected = jax.nn.softmax(model(jnp.array([prompt]))[0, -1] / 2)
    drawn = [generate(model, [prompt], 1, temperature=2.0, seed=seed)[0][0] for seed in range(150)]
    shares = np.bincount(drawn, minlength=8) / 150
    assert np.abs(shares - expected).max() < 0.16  # 4 standard deviations


def test_decode_compiles_once():
    model = twin()
    generate(model, [[1, 2, 3]], 4)
    before = flax_generation._decode._cache_size(), flax_generation._prefill._cache_size()
    generate(model, [[5, 6, 7, 8]], 30, temperature=0.5, seed=9)
    assert (flax_generation._decode._cache_size(), flax_generation._prefill._cache_size()) == before


def test_the_real_model_gives_the_same_logits_and_tokens(shallow):
    """Two of its layers, or all in `make soak`: XLA takes half a second to compile each."""
    smollm2 = Llama.build(
        shallow, max_batch_size=16, max_seq_len=64, device="cpu", dtype="fp32", quantize="dense"
    )
    model = from_checkpoint(shallow, dtype="fp32")
    texts = ["The capital of France is", "Once upon a time", "2 + 2 =", "def add(a, b):", "Water",
             "The largest planet of the solar system is called", "Dear Sir or Madam,", "Hello",
             "one two three four one two three", "Translate to French: sea =>"]  # fmt: skip
    prompts = [smollm2.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    expected, _ = smollm2.generate(prompts, 16, temperature=0, stop_tokens=set())
    assert generate(model, prompts, 16) == expected
    whole = torch.tensor([prompts[5] + expected[5]])
    with torch.no_grad():
        theirs = smollm2.model(whole)
    assert gap(forward(model, whole.numpy()), theirs) <= TOLERANCE


ON_DEVICES = """
import json, sys
import jax, numpy as np
sys.path.insert(0, "tests")
from conftest import TINY, random_weights
from llama.checkpoint import InMemory
from llama.families.flax_generation import generate
from llama.backends.flax import from_checkpoint
from llama.families.flax_model import make_mesh, shard, weights

def twin(**options):
    return from_checkpoint(InMemory(TINY, random_weights(TINY)), **options)

tokens = np.random.default_rng(0).integers(512, size=(4, 50))
prompts = [tokens[i, :n].tolist() for i, n in enumerate((3, 17, 9))]
forward = jax.jit(lambda model, tokens: model(tokens))
whole = twin()
expected, found = generate(whole, prompts, 12), {}
for data, model in ((1, 2), (2, 2)):
    mesh = make_mesh(data, model)
    sharded = shard(twin(), mesh) if data == 2 else twin(mesh=mesh)
    cache = sharded.new_cache(4, 64)
    found[f"{data} x {model}"] = {
        "gap": float(np.abs(np.array(forward(sharded, tokens)) - forward(whole, tokens)).max()),
        "same": generate(sharded, prompts, 12) == expected,
        "drawn": generate(sharded, prompts, 9, 1.0) == generate(whole, prompts, 9, 1.0),
        "cache": cache.k[0].addressable_shards[0].data.shape,
        "shards": {
            name: [param[...].addressable_shards[0].data.shape, len(param[...].sharding.device_set)]
            for name, param in weights(sharded).items()
        },
    }
errors = []
for data, model in ((1, 4), (1, 3), (3, 2)):
    try:
        shard(whole, make_mesh(data, model))
    except ValueError as error:
        errors.append(str(error))
print(json.dumps([found, errors]))
"""


@pytest.mark.slow
def test_sharded_equals_whole():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, errors = json.loads(done.stdout.splitlines()[-1])
    for how, one in found.items():
        data, model = map(int, how.split(" x "))
        assert one["gap"] <= TOLERANCE and one["same"] and one["drawn"], how
        assert one["cache"] == [4 // data, 64, TINY.n_kv_heads // model, TINY.head_dim]
        for name, shape in checkpoint.weight_shapes(TINY).items():
            expected, axis = list(shape), parallel.shard_axis(name)
            if axis is not None:
                expected[axis] //= model
            assert one["shards"][name] == [expected, data * model], name
    assert "4 devices" in errors[0] and "can't share n_kv_heads=2 evenly" in errors[0]
    assert "n_heads=8, n_kv_heads=2, vocab_size=512" in errors[1]
    assert "use a divisor of 2" in errors[1]
    assert "JAX sees 4" in errors[2]


def test_errors_name_the_value_and_the_limit():
    model = twin()
    for wrong, message in (
        (dict(prompt_tokens=[]), "no prompts"),
        (dict(prompt_tokens=[[1], []]), "prompt 1 has 0 tokens: this model takes 1 to 128"),
        (dict(prompt_tokens=[[1] * 129]), "has 129 tokens"),
        (dict(prompt_tokens=[[1, 512]]), "token id 512: this model knows 0 to 511"),
        (dict(prompt_tokens=[[-1]]), "token id -1"),
        (dict(prompt_tokens=[[1]], max_gen_len=-1), "max_gen_len=-1"),
        (dict(prompt_tokens=[[1]], temperature=float("nan")), "temperature=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, **{"max_gen_len": 1, **wrong})
    cache = model.new_cache(1, 8)
    with pytest.raises(ValueError, match="start_pos 6 with 3 tokens: positions 0 to 7"):
        model(np.ones((1, 3), int), 6, cache)
    with pytest.raises(ValueError, match="cache"):
        model(np.ones((1, 3), int), 1)
    assert np.isnan(model(np.array([[1, 512]]))[0, 1]).all()


def test_without_flax_it_says_what_to_install():
    code = "import sys; sys.modules['flax'] = None; import llama.families.flax_model"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "pip install 'llama-reference[jax]'" in done.stderr.splitlines()[-1]
