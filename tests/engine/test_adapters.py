"""Adapters chosen for each request: each as alone, as merged, and as if no other were there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_model, random_weights, run_ranks, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, SamplingParams, checkpoint
from llama.backends import adapters
from llama.backends import cpu as native
from llama.checkpoint import InMemory
from llama.checkpoint.adapter import Adapter, Merged, Pair, write_adapter
from llama.engine.passes import hidden
from llama.families.llama4 import Llama4Args
from llama.families.variants import VariantArgs
from llama.layers.paged import PAGE, PagedRows
from llama.training import lora

SMALL = replace(TINY, head_dim=32, hidden_dim=320)  # as the kernels take it; wider than a span
VARIANT = VariantArgs(
    **vars(SMALL), attention_bias=True, mlp_bias=True, sliding_window=40, residual_multiplier=0.5
)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95)
KINDS = {  # rank, matrices, whether bf16 holds all values
    "poet": (4, ("wq", "wk", "wv", "wo", "w1", "w2", "w3"), False),
    "clerk": (20, ("wk", "w1", "w2"), False),
    "pirate": (16, ("wq", "wv", "wo"), True),
}
NAMES = [None, *KINDS]


def adapter(name: str, args=SMALL) -> Adapter:
    """One that changes a lot."""
    rank, matrices, narrow = KINDS[name]
    blank = lora.fresh(random_model(args), rank, 2.0 * rank, matrices, seed=rank)
    generator, pairs = torch.Generator().manual_seed(rank), {}
    for weight, (A, B, scale) in blank.pairs.items():
        B = 0.1 * torch.randn(B.shape, generator=generator)
        if narrow:
            A, B = A.bfloat16().float(), B.bfloat16().float()
        pairs[weight] = Pair(A, B, scale)
    return Adapter(pairs)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A model, and its adapters beside it."""
    path = write_checkpoint(tmp_path_factory.mktemp("adapters") / "model", SMALL)
    for name in KINDS:
        write_adapter(adapter(name), path.with_name(name), SMALL)
    return path


BUILDS = {
    "kernels": dict(dtype="fp32"),
    "kernels-bf16-int8": dict(dtype="bf16", kv_cache="int8"),
    "kernels-q8": dict(dtype="fp32", quantize="int8"),
    "plain": dict(dtype="fp32", compile=False),
}


def build(path: Path, kind: str) -> Llama:
    return Llama.build(path, device="cpu", max_batch_size=8, max_seq_len=128, **BUILDS[kind])


@pytest.fixture(scope="module", params=BUILDS)
def pair(request, path):
    """The model, and the same with its adapters."""
    found = build(path, request.param), build(path, request.param)
    for name in KINDS:
        found[1].add_adapter(name, path.with_name(name))
    return found


def answered(engine, requests):
    """Tokens and log-probabilities of each, the next one added after each two steps."""
    added = []
    for prompt, new, options in requests:
        added.append(engine.add(prompt, new, logprobs=True, stop_tokens=set(), **options))
        engine.step(), engine.step()
    while not engine.idle:
        engine.step()
    return [[(event.token, event.logprob) for event in request.events] for request in added]


def same(llama, ours, expected) -> bool:
    """To the bit with the kernels; the plain layers' sums depend on the shape of a pass."""
    if native.__name__ in type(llama.model).__module__:
        return ours == expected
    tokens = [[token for token, _ in one] for one in (ours, expected)]
    logprobs = [torch.tensor([value for _, value in one]) for one in (ours, expected)]
    return tokens[0] == tokens[1] and torch.allclose(*logprobs, rtol=0, atol=1e-4)


requests = st.lists(
    st.tuples(st.integers(0, 70), st.integers(1, 100), st.integers(1, 6), st.sampled_from(NAMES)),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize("pair", [kind for kind in BUILDS if kind != "plain"], indirect=True)
@settings(max_examples=12)
@given(requests, st.sampled_from([16, 512]))
def test_answers_depend_on_the_requests_own_adapter(pair, drawn, budget):
    """Alone or together, in whatever chunks, and without one as if there were none: to the bit."""
    plain, llama = pair
    together = [
        (
            [(7 * shared + i) % 500 for i in range(length)], new,
            dict(adapter=name, seed=i, params=SAMPLED),
        )
        for i, (shared, length, new, name) in enumerate(drawn)
    ]  # fmt: skip
    found = answered(llama.engine(budget, cache_tokens=1024), together)
    for ours, (prompt, new, options) in zip(found, together, strict=True):
        alone = llama if options["adapter"] else plain
        options = options if options["adapter"] else {**options, "adapter": None}
        [expected] = answered(alone.engine(cache_tokens=1024), [(prompt, new, options)])
        assert ours == expected


@torch.inference_mode()
def states(model, counts, chosen) -> torch.Tensor:
    """Hidden states of rows of so many tokens, in one pass."""
    pool = model.new_cache(1 + 2 * len(counts), PAGE)
    tables = [[1 + 2 * row, 2 + 2 * row] for row in range(len(counts))]
    new = [[(31 * row + 7 * i) % 500 for i in range(n)] for row, n in enumerate(counts)]
    return hidden(model, new, PagedRows(pool, tables, [0] * len(counts), chosen))


@pytest.mark.parametrize("swap", [native.swap, lambda model: model], ids=["kernels", "plain"])
@pytest.mark.parametrize("args", [SMALL, VARIANT], ids=["llama", "variant"])
def test_as_merged_into_the_weights(swap, args):
    """In a pass of prompts and single tokens, each row's adapter."""
    model, counts = swap(random_model(args)), [1, 90, 1, 3, 20, 1, 1, 9, 1, 1, 1, 2]
    for name in KINDS:
        adapters.add(model, name, adapter(name, args))
    chosen = [row % 4 for row in range(len(counts))]
    found = states(model, counts, chosen).split(counts)
    base = states(model, counts, [0] * len(counts)).split(counts)
    for number, name in enumerate(NAMES):
        source = InMemory(args, random_weights(args))
        whole = source if name is None else Merged(source, adapter(name, args))
        merged = swap(checkpoint.load(whole, random_model(args)))
        expected = states(merged, counts, []).split(counts)
        for row in range(number, len(counts), 4):
            assert (found[row] - expected[row]).abs().max() < 3e-5 * expected[row].abs().max()
            assert torch.equal(found[row], base[row]) == (name is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_as_alone_on_any_number_of_threads(dtype):
    model, counts = native.swap(random_model(SMALL).to(dtype)), [1, 90, 1, 3, 20, 1, 1, 9, 1]
    for name in KINDS:
        adapters.add(model, name, adapter(name))
    chosen, before = [row % 4 for row in range(len(counts))], torch.get_num_threads()
    found = states(model, counts, chosen)
    try:
        torch.set_num_threads(3)
        assert torch.equal(states(model, counts, chosen), found)
        alike = [1] * len(counts)
        ours, expected = states(model, counts, alike).split(counts), found.split(counts)
        for row, number in enumerate(chosen):
            assert torch.equal(ours[row], expected[row]) == (number == 1)
    finally:
        torch.set_num_threads(before)


def test_known_blocks_are_those_of_the_adapter(pair):
    """A prompt again, by the same adapter: found. By another: computed."""
    _, llama = pair
    prompt, engine = list(range(100)), llama.engine(cache_tokens=2048)
    first = {}
    for name in NAMES:
        [first[name]] = answered(engine, [(prompt, 4, dict(adapter=name, temperature=0))])
    assert engine.stats.cached_tokens == 0
    assert len({str(found) for found in first.values()}) == len(NAMES)
    for times, name in enumerate(NAMES, 1):
        [again] = answered(engine, [(prompt, 4, dict(adapter=name, temperature=0))])
        assert same(llama, again, first[name])
        assert engine.stats.cached_tokens == times * (len(prompt) - 1)


def test_calls_and_guidance(pair):
    """One adapter for all prompts of a call, or one each, as a request alone; a negative prompt has
    that of its prompt."""
    _, llama = pair
    prompts, alike = [[1, 2, 3], [4], [5, 6], [7]], dict(temperature=0, stop_tokens=set())
    mixed, _ = llama.generate(prompts, 6, adapter=NAMES, **alike)
    for name, prompt, found in zip(NAMES, prompts, mixed, strict=True):
        [alone], _ = llama.generate([prompt], 6, adapter=name, **alike)
        assert found == alone
    alone, _ = llama.generate(prompts[:1], 6, adapter="poet", **alike)
    assert llama.generate(prompts[:1] * 2, 6, adapter="poet", **alike)[0] == alone * 2
    params = SamplingParams(temperature=0, guidance_scale=2, negative_prompt=prompts[0])
    [same], _ = llama.generate(prompts[:1], 6, adapter="poet", params=params, stop_tokens=set())
    [plain], _ = llama.generate(prompts[:1], 6, adapter="poet", **alike)
    assert same == plain  # log p + 2 (log p - log p)


def test_mistakes(path, tmp_path):
    llama = build(path, "kernels")
    engine = llama.engine(cache_tokens=256)
    with pytest.raises(ValueError, match="no adapter 'poet': there is none"):
        engine.add([1], 4, adapter="poet")
    llama.add_adapter("poet", path.with_name("poet"))
    llama.add_adapter("clerk", str(path.with_name("clerk")))
    assert llama.adapters == ["poet", "clerk"]
    with pytest.raises(ValueError, match="no adapter 'baker': there is poet, clerk"):
        engine.add([1], 4, adapter="baker")
    with pytest.raises(ValueError, match="2 adapters for 1 prompts"):
        engine.add([1], 4, adapter=["poet", None])
    for name in ("poet", ""):
        with pytest.raises(ValueError, match="give it a name that none of the others has"):
            llama.add_adapter(name, path.with_name("pirate"))
    other = write_adapter(adapter("poet", TINY), tmp_path / "other", TINY)
    with pytest.raises(ValueError, match="an adapter of another model"):
        llama.add_adapter("other", other)
    large = lora.fresh(random_model(SMALL), 513, 1, ["wq"])
    with pytest.raises(ValueError, match="rank 513, and the CPU kernels take at most 512"):
        adapters.add(llama.model, "large", large)
    with pytest.raises(ValueError, match="takes no"):
        adapters.add(llama.model, "other", adapter("poet", TINY))
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        llama.add_adapter("nothing", tmp_path)
    assert llama.adapters == ["poet", "clerk"]
    trained = random_model(SMALL)
    lora.attach(trained, adapter("poet"))
    with pytest.raises(ValueError, match="has an adapter of llama.training.lora"):
        adapters.add(trained, "clerk", adapter("clerk"))
    offloaded = random_model(SMALL)
    offloaded.layers[1].__class__ = type("StreamedBlock", (type(offloaded.layers[1]),), {})
    with pytest.raises(ValueError, match="or offloaded take no adapters"):
        adapters.add(offloaded, "poet", adapter("poet"))
    llama4 = Llama4Args(**vars(SMALL))
    with pytest.raises(ValueError, match="plain layers of Llama 4"):
        adapters.add(random_model(llama4), "poet", adapter("poet", llama4))


@pytest.mark.parametrize("kind", ["kernels", "plain"])
def test_on_several_ranks(path, tmp_path, kind):
    prompts, new = [[5, 6, 7], list(range(40)), [9], [1, 2]], 5
    report = run_ranks(
        2, "with_adapters", tmp_path / "out", ckpt=str(path), prompts=prompts, new=new,
        names=NAMES, build=BUILDS[kind],
    )  # fmt: skip
    llama = build(path, kind)
    for name in KINDS:
        llama.add_adapter(name, path.with_name(name))
    requests = [
        (prompt, new, dict(adapter=name, temperature=0))
        for prompt, name in zip(prompts, NAMES, strict=True)
    ]
    for ours, expected in zip(
        report["found"], answered(llama.engine(cache_tokens=1024), requests), strict=True
    ):
        assert [token for token, _ in ours] == [token for token, _ in expected]
        for (_, one), (_, other) in zip(ours, expected, strict=True):
            assert abs(one - other) < 1e-4
