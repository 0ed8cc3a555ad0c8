"""Requests with images: in batches, in chunks, after others; prefixes are of the same images."""

from dataclasses import replace

import pytest
from conftest import write_checkpoint
from vision import IMAGE, ROWS, TINY_VISION, check, greedy, tiled

from llama import Llama, SamplingParams
from llama.engine.events import collect, prediction

OPTIONS = dict(temperature=0, logprobs=True, stop_tokens=set())


@pytest.fixture(scope="module", params=[None, False])
def llama(request, tmp_path_factory) -> Llama:
    """With the CPU kernels, and without."""
    args = replace(TINY_VISION, head_dim=32)
    path = write_checkpoint(tmp_path_factory.mktemp("seeing") / "model", args)
    how = dict(device="cpu", dtype="fp32", compile=request.param)
    return Llama.build(path, max_batch_size=8, max_seq_len=128, **how)


def test_rows_with_no_one_and_several_images_in_a_batch(llama):
    images = tiled(ROWS)
    tokens, logprobs = llama.generate(ROWS, 12, images=images, **OPTIONS)
    for i, row in enumerate(ROWS):
        check((tokens[i], logprobs[i]), greedy(llama, row, images[i], 12))


@pytest.mark.parametrize("chunk", [1, 3, 200])
def test_in_chunks_beside_others(llama, chunk):
    engine = llama.engine(max_tokens_per_step=chunk, max_rows=3)
    images = tiled(ROWS, 3)
    requests = [
        engine.add(row, 8, images=[of_row], **OPTIONS)
        for row, of_row in zip(ROWS, images, strict=True)
    ]
    for request, row, of_row in zip(requests, ROWS, images, strict=True):
        events = list(engine.events(request))
        found = [e.token for e in events], [e.logprob for e in events]
        check(found, greedy(llama, row, of_row, 8))
        assert all(one.views is None for one in request.rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_answers_to_images_are_the_same_to_the_bit(tmp_path, dtype):
    """With the kernels, in whatever passes, with more tokens before them than share an image."""
    args = replace(TINY_VISION, dim=128, n_heads=4, head_dim=32)
    path = write_checkpoint(tmp_path / "model", args)
    llama = Llama.build(path, device="cpu", dtype=dtype, max_batch_size=8, max_seq_len=256)
    rows = [[*row, *range(20, 170)] for row in ROWS]
    images = tiled(rows, 3)

    def answers(step, together):
        engine = llama.engine(max_tokens_per_step=step)
        found, options = [], dict(OPTIONS, temperature=0.9)
        for i, (row, of_row) in enumerate(zip(rows, images, strict=True)):
            found.append(engine.add(row, 12, images=[of_row], seed=i, **options))
            while not together and not engine.idle:
                engine.step()
        while not engine.idle:
            engine.step()
        return [[(e.token, e.logprob) for e in request.events] for request in found]

    expected = answers(512, together=False)
    for step in (1, 7, 33, 512):
        assert answers(step, together=True) == expected


def test_prefixes_are_of_the_same_images(llama):
    engine = llama.engine(cache_tokens=1024)
    text = [7, IMAGE, *range(20, 90)]
    [[one]], [[other]] = tiled([text], 0), tiled([text], 8)  # of the same grid

    def ask(*images):
        [*_, last] = events = list(engine.events(engine.add(text, 4, images=[images], **OPTIONS)))
        check(([e.token for e in events], [e.logprob for e in events]),
              greedy(llama, text, images, 4))  # fmt: skip
        return last.cached_tokens

    assert one.pixels.shape == other.pixels.shape
    assert [ask(one), ask(other), ask(one), ask(other)] == [0, 1, 71, 71]


def test_samples_of_a_prompt_share_its_images(llama):
    [images] = tiled([ROWS[1]])
    calls, encode = [], llama.model.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.model, "encode", lambda *a: calls.append(a) or encode(*a))
        engine = llama.engine()
        params = SamplingParams(temperature=1.0)
        request = engine.add(ROWS[1], 8, images=[images], n=3, params=params, seed=1)
        list(engine.events(request))
    assert len(calls) == 3


def test_recent_images_are_kept_and_old_ones_leave(llama):
    images, most = llama.engine().images, llama.model.params.max_batch_size
    big = [tiled([[IMAGE]], 3 + 8 * i)[0][0] for i in range(most + 2)]  # of 4 tiles each
    for one in big:
        images._encoded(one)
    assert list(images._kept) == [one.digest for one in big[2:]]
    images.clear()
    assert not images._kept


def test_echo_and_scores_leave_images_out(llama):
    [images] = tiled([ROWS[0]])
    engine = llama.engine()
    options = {**OPTIONS, "echo": True}
    events = list(engine.events(engine.add(ROWS[0], 2, images=[images], **options)))
    assert [e.token for e in events[:3]] == ROWS[0][:3] and events[1].text == ""
    assert events[1].logprob is None and events[2].logprob < 0
    request = engine.make_all([ROWS[0]], 2, images=[images], **options)
    [found] = collect(engine.run(request), request)
    assert prediction(found, llama.tokenizer, request)["tokens"][:3] == ["\x03", "", "\x05"]


@pytest.mark.parametrize("kind", [dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=1)])
def test_penalties_know_that_an_image_is_no_token(llama, kind):
    [images] = tiled([ROWS[1]])
    params = SamplingParams(temperature=0, **kind)
    [tokens], _ = llama.generate([ROWS[1]], 8, images=[images], params=params)
    assert all(token < IMAGE for token in tokens)


def test_images_that_do_not_fit_are_refused(llama):
    [[one]] = tiled([[IMAGE]])
    with pytest.raises(ValueError, match="prompt 0 has 0 images, and 1 tokens for them"):
        llama.generate([ROWS[0]], 1)
    with pytest.raises(ValueError, match="prompt 1 has 1 images, and 0 tokens for them"):
        llama.generate([[1], [2]], 1, images=[[], [one]])
    with pytest.raises(ValueError, match="images for 1 of 2 prompts"):
        llama.generate([[1], [2]], 1, images=[[]])
    with pytest.raises(ValueError, match="1 tiles of 28 pixels.*up to 4 of 56"):
        small = one._replace(pixels=one.pixels[..., :28, :28])
        llama.generate([[IMAGE]], 1, images=[[small]])
    with pytest.raises(ValueError, match="token id 513"):
        llama.generate([[IMAGE + 1]], 1)


def test_a_model_without_an_encoder_says_so(tmp_path):
    from conftest import TINY

    path = write_checkpoint(tmp_path / "model", TINY)
    llama = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=64)
    with pytest.raises(ValueError, match="this model sees no images"):
        llama.generate([[1]], 1, images=[tiled([[IMAGE]])[0]])
