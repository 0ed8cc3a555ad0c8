"""Beam search and guidance, against transformers on the demo model."""

import pytest
import torch
from conftest import THOROUGH

from llama import Llama, SamplingParams
from llama.engine.beam import beam_search

TEXTS = [
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "def add(a, b):",
    "Dear Sir or Madam,",
]


@pytest.fixture
def peer(smollm2_transformers):
    return smollm2_transformers


@pytest.fixture(scope="module")
def prompts(smollm2):
    return [smollm2.tokenizer.encode(text, bos=False, eos=False) for text in TEXTS]


def theirs(peer, prompt, stop_tokens, **options):
    """Their generated ids, without stop tokens and padding, and their scores."""
    found = peer.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        eos_token_id=sorted(stop_tokens) or None, pad_token_id=0, do_sample=False,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    rows = []
    for row in found.sequences[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in stop_tokens), len(row))
        rows.append(row[:end])
    return rows, found


SETTINGS = [
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_beams_are_transformers(smollm2, peer, prompts, options):
    """All of them, in their order, with their scores; a full stop ends an answer here."""
    n = options["num_beams"]
    ends = {*smollm2.tokenizer.stop_tokens, *smollm2.tokenizer.encode(".", bos=False, eos=False)}
    for prompt in prompts[: len(prompts) if THOROUGH else 2]:
        expected, found = theirs(
            peer, prompt, ends, max_new_tokens=10, num_return_sequences=n, **options
        )
        beams = beam_search(smollm2._calls.plain, prompt, 10, stop_tokens=ends, **options)
        assert [beam.tokens for beam in beams] == expected
        scores = torch.tensor([beam.score for beam in beams])
        assert torch.allclose(scores, found.sequences_scores, rtol=1e-5, atol=1e-5)


def test_one_beam_is_greedy(tiny):
    for prompt in ([1, 2, 3], [9]):
        [beam] = beam_search(tiny._calls.plain, prompt, 12, 1, stop_tokens=set())
        assert [beam.tokens] == tiny.generate([prompt], 12, 0, stop_tokens=set())[0]


def test_more_beams_find_more_probable_answers(tiny):
    scores = [
        beam_search(tiny._calls.plain, [5, 6], 8, n, stop_tokens=set(), length_penalty=0)[0].score
        for n in (1, 4, 16)
    ]
    assert scores == sorted(scores) and scores[0] < scores[-1]


def test_beam_search_of_texts(tiny):
    [beams] = tiny.beam_search(["ab"], num_beams=3, max_gen_len=6)
    assert len(beams) == 3 and set(beams[0]) == {"generation", "finish_reason", "score"}
    assert beams[0]["score"] > beams[1]["score"] > beams[2]["score"]
    for options, message in (
        ({"num_beams": 0, "max_gen_len": 3}, "num_beams=0"),
        ({"num_beams": 2, "max_gen_len": 0}, "max_gen_len=0"),
        ({"num_beams": 2, "max_gen_len": 3, "early_stopping": "soon"}, "early_stopping='soon'"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.beam_search(["ab"], **options)
    start = len(tiny.tokenizer.encode("", bos=tiny.tokenizer.add_bos, eos=False))
    with pytest.raises(ValueError, match="prompt 1 fills the context, 128 tokens"):
        tiny.beam_search(["a", "x" * (128 - start)], 2, 5)


def test_prompts_are_searched_together_and_streamed(tiny):
    """Each as alone; texts come before the search is over, and add up to the best answers."""
    prompts, steps = ["ab", "c", "Hello"], [0]
    engine, step = tiny._calls.plain, tiny._calls.plain.step

    def counted():
        steps[0] += 1
        return step()

    for early_stopping in (False, True, "never"):
        how = {"num_beams": 3, "max_gen_len": 12, "early_stopping": early_stopping}
        alone = [tiny.beam_search([prompt], **how)[0] for prompt in prompts]
        for found, expected in zip(tiny.beam_search(prompts, **how), alone, strict=True):
            scores = [beam.pop("score") for beam in found]
            assert scores == pytest.approx([beam["score"] for beam in expected], abs=1e-6)
            assert found == [
                {name: beam[name] for name in ("generation", "finish_reason")} for beam in expected
            ]
        streamed = [*tiny.stream_beams(prompts, **how)]
        for index, beams in enumerate(alone):
            *some, last = [event for event in streamed if event.index == index]
            assert [beam["generation"] for beam in last.beams] == [b["generation"] for b in beams]
            assert all(event.text and event.beams is None for event in some)
            assert "".join(event.text for event in (*some, last)) == beams[0]["generation"]
    engine.step = counted
    try:
        stream = tiny.stream_beams(prompts, 2, 12)
        next(stream)
        taken = steps[0]
        stream.close()
        assert engine.idle and steps[0] == taken
        tiny.beam_search(prompts[:1], 2, 12)
        one, steps[0] = steps[0] - taken, 0
        tiny.beam_search(prompts, 2, 12)
        assert steps[0] <= one + 12  # not three times as many
    finally:
        del engine.step


def test_a_beam_that_cannot_go_on_ends_the_others(tiny):
    search = tiny.stream_beams(["ab", "c"], 3, 20)
    next(search)
    engine, step = tiny._calls.plain, tiny._calls.plain.step

    def failing():
        step()
        raise ValueError("no more")

    engine.step = failing
    try:
        with pytest.raises(ValueError, match="no more"):
            next(search)
    finally:
        del engine.step
    assert engine.idle


def test_text_comes_as_soon_as_beams_agree(smollm2):
    events = [*smollm2.stream_beams([TEXTS[0]], 3, 12)]
    assert events[0].text.startswith(" Paris") and events[0].beams is None and events[-1].beams


@pytest.mark.parametrize("negative, count", [(None, 4 if THOROUGH else 2), ("A boring text:", 2)])
def test_guidance_is_transformers(smollm2, peer, prompts, negative, count):
    prompts = prompts[:count]
    ids = negative and smollm2.tokenizer.encode(negative, bos=False, eos=False)
    params = SamplingParams(temperature=0, guidance_scale=1.8, negative_prompt=ids)
    found, _ = smollm2.generate(prompts, 12, params=params, stop_tokens=set())
    plain, _ = smollm2.generate(prompts, 12, 0, stop_tokens=set())
    assert sum(a != b for a, b in zip(found, plain, strict=True)) >= count / 2
    for prompt, row in zip(prompts, found, strict=True):
        theirs_ids = None if ids is None else torch.tensor([ids])
        [expected], _ = theirs(
            peer, prompt, set(), max_new_tokens=12, guidance_scale=1.8,
            negative_prompt_ids=theirs_ids,
        )  # fmt: skip
        assert row == expected


def test_guided_rows_leave_with_the_others(tiny):
    """A batch in which rows end at different times equals the rows alone."""
    prompts = [[1, 2, 3], [250] * 40, [9], [17, 3, 99, 4]]
    params = SamplingParams(temperature=0, guidance_scale=2.5, negative_prompt=[7, 8])
    free, _ = tiny.generate(prompts, 16, params=params, stop_tokens=set())
    stops = {free[0][3], free[2][6]}
    together, _ = tiny.generate(prompts, 16, params=params, stop_tokens=stops)
    alone = [tiny.generate([p], 16, params=params, stop_tokens=stops)[0][0] for p in prompts]
    assert together == alone and len({len(row) for row in together}) > 1
    with pytest.raises(ValueError, match="negative_prompt is empty"):
        SamplingParams(negative_prompt=[])


def test_guided_rows_may_fill_the_context(make_model, tiny):
    """Each with a negative prompt as long, in a call of as many rows as there may be."""
    llama = Llama(make_model(max_batch_size=2), tiny.tokenizer)
    params = SamplingParams(temperature=0, guidance_scale=1.5, negative_prompt=[4] * 128)
    options = dict(params=params, stop_tokens=set())
    found, _ = llama.generate([[1, 2, 3], [5] * 9], 128, **options)
    assert [len(row) for row in found] == [125, 119]
    assert llama.generate([[5] * 9], 119, **options)[0] == found[1:]
