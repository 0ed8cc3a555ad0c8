"""The path on CUDA, checked without CUDA, on a simulated GPU (tests/simulated.py).

No operation mixes devices; the results are those of the CPU; and a pass of greedy decoding waits
for the GPU once, for its tokens. A row that is sampled waits once more, for its token, and once for
top_p.

What `torch.compile` compiles runs uncompiled here, since compiling for a GPU takes one;
test_compiled.py compares compiled layers with plain ones.
"""

from collections import Counter

import pytest
import torch
from simulated import CUDA, SimulatedGPU

from llama import Llama
from llama.backends import compiled
from llama.backends.quantized import ALL, Blocks
from llama.checkpoint import ggml
from llama.engine import passes
from llama.engine.params import SamplingParams
from llama.engine.speculative import DraftLength, Speculators
from llama.layers import parallel

ONE, RAGGED = [[1, 2, 3, 1, 2, 3, 1, 2]], [[1, 2, 3] * 7 + [1, 2], [7, 8], [9] * 30]
END = {"stop_tokens": set()}  # at max_gen_len
GREEDY = dict(END, temperature=0)
SAMPLED = dict(
    END, logprobs=True, top_logprobs=3, seed=5,
    params=SamplingParams(
        temperature=0.8, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.1,
        frequency_penalty=0.2, logit_bias={3: 1.0}, banned_tokens=(4, 5),
    ),
)  # fmt: skip
REGEX = dict(response_format={"type": "regex", "regex": "[a-f]{3}(abc){4}[0-9]{9}"})

KINDS = [  # compile, quantize, kv_cache
    (False, "dense", None), (False, "int4", "int8"), (True, "dense", "int8"), (True, "int4", None),
]  # fmt: skip


class Generator(torch.Generator):
    """A generator on the CPU that says that it is on the device it was made for."""

    device = property(lambda self: self.wanted)

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.wanted = torch.device(device)
        return made


@pytest.fixture
def gpu(monkeypatch):
    parallel.initialize(device="cpu")
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(compiled, "_compiled", lambda: (compiled._before, compiled._after))
    with SimulatedGPU() as simulated:
        yield simulated


@pytest.fixture
def three_drafts(monkeypatch):
    """Three tokens are proposed at each pass, whatever the passes before took."""
    for name in ("choose", "choose_or_probe"):
        monkeypatch.setattr(DraftLength, name, lambda self, proposals: 3)


def build(path, device, *, compile=False, **options) -> Llama:
    """As for a GPU, on any device."""
    found = Llama.build(
        path, device=device, compile=compile and device != "cpu",
        **dict(dtype="bf16", max_seq_len=128, max_batch_size=8) | options,
    )  # fmt: skip
    if compile and device == "cpu":
        compiled.swap(found.model)
    return found


def both(path, **options):
    """The same model on the simulated GPU and on the CPU."""
    found = build(path, "cuda", **options), build(path, "cpu", **options)
    assert [f.model.norm.weight.device for f in found] == [CUDA, torch.device("cpu")]
    return found


def test_the_simulation_notices(gpu):
    """It can fail: mixed devices, and all that waits."""
    there = torch.arange(6, device=CUDA).view(2, 3)
    for mix in (
        lambda: there + torch.zeros(3),
        lambda: torch.cat([there, torch.zeros(2, 3)]),
        lambda: torch.where(there > 2, there, torch.zeros(2, 3)),
        lambda: there.index_fill(0, torch.tensor([0]), 1),
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError), match="cuda"):
            mix()
    assert (there * torch.tensor(2) + 1).tolist() == [[1, 3, 5], [7, 9, 11]]
    gpu.waits.clear()
    for wait in (
        lambda: int((there + 1)[0, 0]),
        lambda: bool((there == 0).any()),
        lambda: (there + 1).tolist(),
        lambda: (there + 1).cpu(),
        lambda: (there + 1).to("cpu", torch.float32),
        lambda: torch.zeros(6).copy_((there + 1).flatten()),
        lambda: [there + 1, torch.tensor([1], device=CUDA)],
        lambda: [there + 1, torch.zeros(1).to(CUDA)],
        lambda: (there + 1)[[0, 1], [1, 1]],
        lambda: there[there > 2],
        lambda: (there > 2).nonzero(),
        lambda: torch.equal(there, there + 1),
    ):
        torch.tensor(0, device=CUDA)  # the GPU has nothing to do
        gpu.waits.clear()
        wait()
        assert len(gpu.waits) == 1
    gpu.waits.clear()
    there[there > 2] = 0
    there[torch.arange(2, device=CUDA), 1:] += 1
    assert gpu.waits == [] and there.tolist() == [[0, 2, 3], [0, 1, 1]]


@pytest.mark.parametrize("fault", ["tokens", "places"])
def test_a_tensor_on_the_wrong_device_is_noticed(gpu, tiny_dir, monkeypatch, fault):
    llama = build(tiny_dir, "cuda")
    if fault == "tokens":
        monkeypatch.setattr(passes, "padded", lambda rows, device: torch.zeros(3, 1).long())
    else:
        arange = torch.arange
        monkeypatch.setattr(torch, "arange", lambda *a, device=None, **kw: arange(*a, **kw))
    with pytest.raises(RuntimeError, match="mixes devices"):
        llama.generate(RAGGED, 3, **GREEDY)


@pytest.mark.parametrize("compile, quantize, kv_cache", KINDS)
def test_it_generates_what_the_cpu_generates(
    gpu, tiny_dir, three_drafts, compile, quantize, kv_cache
):
    there, here = both(tiny_dir, compile=compile, quantize=quantize, kv_cache=kv_cache)
    for prompts, options in (
        (ONE, GREEDY),
        (ONE, SAMPLED | {"speculate": "lookup"}),
        (ONE, REGEX | {"temperature": 0, "n": 2, "logprobs": True}),
        (RAGGED, GREEDY | {"speculate": "lookup"}),
        (RAGGED, SAMPLED),
        (RAGGED, REGEX | {"speculate": "lookup", "seed": 3}),
    ):
        assert there.generate(prompts, 6, **options) == here.generate(prompts, 6, **options)


def waits_by_pass(llama, gpu, prompts, n=6, **options):
    """Where each pass of the model waits, from its beginning to that of the next. The first are
    those of the prompts."""
    hidden, found = llama.model.hidden, []

    def begin(*args, **kwargs):
        found.append([])
        gpu.waits = found[-1]
        return hidden(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.model, "hidden", begin)
        llama.generate(prompts, n, **options)
    return found


@pytest.mark.parametrize("prompts", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("compile, quantize, kv_cache", KINDS)
def test_a_pass_waits_for_its_tokens_alone(
    gpu, tiny_dir, three_drafts, compile, quantize, kv_cache, prompts
):
    """Greedy, proposed tokens included: once."""
    llama = build(tiny_dir, "cuda", compile=compile, quantize=quantize, kv_cache=kv_cache)
    for options in (GREEDY, GREEDY | {"speculate": "lookup"}):
        _, *passes = waits_by_pass(llama, gpu, prompts, **options)
        assert len(passes) > 1 and all(waits == ["tokens.draw"] for waits in passes)


EACH = Counter(["sampling.sample_from"])  # of a row that samples


@pytest.mark.parametrize("prompts", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize(
    "options, of_pass, of_row",
    [
        (dict(END, temperature=0.6, top_p=1.0), [], EACH),
        (dict(END, temperature=0.6, top_p=0.9), [], EACH),
        (dict(END, logprobs=True, top_logprobs=3), ["events.details_of"], EACH),
        (dict(END, params=SamplingParams(typical_p=0.5)), [], EACH),
        (dict(END, params=SamplingParams(top_k=9, min_p=0.1)), [], EACH),
        # The indices of each penalty but the first are copied while the one before is computed.
        (SAMPLED, ["events.details_of"],
         [*EACH, "sampling.penalize_repetition", "sampling._added", "sampling.constrained"]),
        (REGEX, [], EACH),
    ],
)  # fmt: skip
def test_a_sampled_row_waits_for_its_token(gpu, tiny_dir, options, of_pass, of_row, prompts):
    llama = build(tiny_dir, "cuda")
    _, *passes = waits_by_pass(llama, gpu, prompts, **options)
    expected = Counter(["tokens.draw", *of_pass, *list(of_row) * len(prompts)])
    for waits in passes:
        assert Counter(waits) == expected


def test_a_constrained_row_waits_at_most_once_more(gpu, tiny_dir):
    """Greedy: where the most probable token isn't allowed."""
    llama = build(tiny_dir, "cuda")
    _, *passes = waits_by_pass(llama, gpu, RAGGED, **REGEX | {"temperature": 0})
    for waits in passes:
        assert Counter(waits).keys() <= {"tokens.draw", "sampling.sample_token"}
        assert len(waits) <= 1 + len(RAGGED)


def test_a_part_of_a_prompt_waits_for_the_one_before_alone(gpu, tiny_dir):
    """Its tokens are copied once that one is computed; layers wait for nothing."""
    llama = build(tiny_dir, "cuda")
    llama._calls.plain.scheduler.max_tokens = 32
    llama.generate(ONE, 1, **GREEDY)  # RoPE's frequencies are on the GPU from now on
    parts = waits_by_pass(llama, gpu, [[*range(1, 100)], [*range(1, 97)]], **GREEDY)
    assert len(parts) > 6 and all(len(waits) == 1 for waits in parts)


def test_guidance_waits_no_more_and_a_draft_model_for_its_tokens(gpu, tiny_dir, three_drafts):
    llama = build(tiny_dir, "cuda")
    guided = SamplingParams(temperature=0, guidance_scale=1.5)
    last = waits_by_pass(llama, gpu, ONE, params=guided, **END)[-1]
    assert last == ["tokens.draw"]  # both rows of a token are one wait
    llama._calls.plain.speculators = Speculators(build(tiny_dir, "cuda", quantize="int4").model, 64)
    passes = waits_by_pass(llama, gpu, ONE, 24, **GREEDY)
    assert len(passes) > 3
    for waits in passes[1:-2]:  # the last token needs no draft
        assert Counter(waits) == {"tokens.draw": 1, "speculative.DraftModel._sample": 3}


def test_all_else_that_computes(gpu, tiny_dir, three_drafts):
    """It gives what it gives on the CPU."""
    there, here = both(tiny_dir, prefix_cache_mb=1)
    for device, llama in (("cuda", there), ("cpu", here)):
        draft = build(tiny_dir, device, quantize="int4").model
        llama._calls.plain.speculators = Speculators(draft, 64)
    guided = SamplingParams(temperature=0, guidance_scale=1.5, negative_prompt=[5, 6])
    shared = [[*range(1, 50), last] for last in (7, 8)]
    for run in (
        lambda llama: llama.generate(RAGGED, 6, speculate="draft", seed=1, stop_tokens=set()),
        lambda llama: llama.generate(RAGGED, 6, params=guided, stop_tokens=set()),
        lambda llama: llama.generate(shared, 6, **GREEDY),
        lambda llama: llama.generate(shared, 6, logprobs=True, echo=True, **GREEDY),
        lambda llama: llama.beam_search(["abc", "x"], 3, 5),
        lambda llama: llama.score(["abc abc", "x"]),
        lambda llama: llama.perplexity("abc" * 99, 20),
        lambda llama: llama.embed(["abc", "xy"], "last").tolist(),
        lambda llama: llama.embed(["abc", "xy"], "mean").tolist(),
        lambda llama: llama.model(torch.tensor(ONE, device=llama.device)).tolist(),
    ):
        assert run(there) == run(here)


def test_attention_with_a_mask_has_no_groups(gpu, tiny_dir, monkeypatch):
    """CUDA's fused kernels take one or the other: with both, all scores would be written out."""
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q, k, v, attn_mask=None, enable_gqa=False, **kwargs):
        seen.append((q.shape[2] > 1 and attn_mask is not None, enable_gqa))
        return attend(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr("llama.model.F.scaled_dot_product_attention", spy)
    build(tiny_dir, "cuda").generate(RAGGED, 4, **GREEDY)
    assert (True, False) in seen and (True, True) not in seen


def test_guidance_takes_no_second_cache(gpu, tiny_dir):
    llama = build(tiny_dir, "cuda", max_batch_size=2)
    guided = SamplingParams(temperature=0, guidance_scale=1.5)
    rows = llama.generate([[1, 2], [3]], 8, params=guided, stop_tokens=set())[0]
    assert llama._calls.guided is llama._calls.plain and [*map(len, rows)] == [8, 8]
    assert (
        rows
        == build(tiny_dir, "cpu", max_batch_size=2).generate(
            [[1, 2], [3]], 8, params=guided, stop_tokens=set()
        )[0]
    )


@pytest.mark.parametrize("kind", ALL)
def test_all_blocks_are_dequantized_there(gpu, kind):
    """On whatever device they are, also those that the gguf package dequantizes."""
    _, size = ggml.block(kind)
    raw = (torch.arange(4 * size) % 37).to(torch.uint8).view(2, -1)
    found = Blocks(raw.to(CUDA), kind).dense(torch.bfloat16)
    assert found.device == CUDA
    assert torch.equal(found.cpu(), Blocks(raw, kind).dense(torch.bfloat16))
