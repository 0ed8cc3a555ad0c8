"""The loop and Meta's API: batch equals single, generated equals re-scored, errors that help."""

import inspect
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest
import torch
from conftest import TINY, random_weights, write_checkpoint

from llama import Dialog, Llama, SamplingParams
from llama.engine.passes import similar

PROMPTS = [[1, 2, 3], [250] * 40, [9], [17, 3, 99, 4, 200, 6, 7, 8], [0, 0]]


@pytest.fixture(params=["smollm2", "smollm2_plain"])
def either(request):
    """The real model with the CPU kernels, and with the plain layers."""
    return request.getfixturevalue(request.param)


def test_the_reference_prompt_logprobs_logits_and_continuations(either, parity):
    smollm2 = either
    prompts = [case["ids"] for case in parity["completions"]]
    tokens, _ = smollm2.generate(prompts, 48, temperature=0, stop_tokens=set())
    assert tokens == [case["greedy"] for case in parity["completions"]]
    for case in parity["completions"]:
        ids = case["ids"]
        with torch.inference_mode():
            logits = smollm2.model(torch.tensor([ids]))[0, -1]
        top = logits.topk(10)
        assert top.indices.tolist() == case["last_top_ids"]
        assert (top.values - torch.tensor(case["last_top_logits"])).abs().max() <= 1e-3
        _, scores = smollm2.generate([ids], 0, logprobs=True, echo=True)
        assert scores[0][0] == 0.0 and len(scores[0]) == len(ids)
        gaps = [abs(a - b) for a, b in zip(scores[0][1:], case["prompt_logprobs"], strict=True)]
        assert max(gaps) <= 1e-3


def test_the_reference_chats(either, parity):
    smollm2 = either
    dialogs = [case["dialog"] for case in parity["chats"]]
    answers = smollm2.chat_completion(dialogs, temperature=0, max_gen_len=48)
    for case, answer in zip(parity["chats"], answers, strict=True):
        assert answer["generation"] == {"role": "assistant", "content": case["text"]}
        stopped = case["greedy"][-1] == 2
        assert answer["finish_reason"] == ("stop" if stopped else "length")


def test_a_ragged_batch_equals_singles_token_for_token(tiny):
    together, logprobs = tiny.generate(PROMPTS, 24, temperature=0, logprobs=True)
    for row, prompt in enumerate(PROMPTS):
        alone, scores = tiny.generate([prompt], 24, temperature=0, logprobs=True)
        assert together[row] == alone[0]
        assert max(abs(a - b) for a, b in zip(logprobs[row], scores[0], strict=True)) <= 1e-4


def test_a_ragged_batch_of_the_real_model_equals_singles(smollm2, parity):
    prompts = [case["ids"] for case in parity["completions"]]
    prompts += [prompt + prompt for prompt in prompts] + [case["ids"] for case in parity["chats"]]
    together, _ = smollm2.generate(prompts, 10, temperature=0)
    assert together == [smollm2.generate([p], 10, temperature=0)[0][0] for p in prompts]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generated_then_rescored_gives_equal_logprobs(tiny, temperature):
    """Log-probabilities that are off by one position pass every other test (llama issue 583)."""
    tokens, logprobs = tiny.generate(
        PROMPTS, 24, temperature=temperature, logprobs=True, stop_tokens=set()
    )
    whole = [prompt + new for prompt, new in zip(PROMPTS, tokens, strict=True)]
    _, again = tiny.generate(whole, 0, logprobs=True, echo=True)
    for prompt, first, second in zip(PROMPTS, logprobs, again, strict=True):
        assert len(first) == 24
        gaps = [abs(a - b) for a, b in zip(first, second[len(prompt) :], strict=True)]
        assert max(gaps) <= 1e-4


def test_scores_are_those_of_a_plain_forward(tiny):
    tokens, scores = tiny.generate(PROMPTS, 0, logprobs=True, echo=True)
    assert tokens == PROMPTS
    for prompt, row in zip(PROMPTS, scores, strict=True):
        ids = torch.tensor(prompt)
        with torch.no_grad():
            logprobs = tiny.model(ids[None]).log_softmax(-1)[0]
        expected = [0.0] + [logprobs[i, t].item() for i, t in enumerate(prompt[1:])]
        assert max(abs(a - b) for a, b in zip(row, expected, strict=True)) <= 1e-4


def test_prompts_longer_than_a_block_of_projections_are_scored_alike(tiny):
    prompt = [(i * 37) % 500 for i in range(128)]
    _, scores = tiny.generate([prompt], 0, logprobs=True, echo=True)
    with torch.no_grad():
        logprobs = tiny.model(torch.tensor([prompt])).log_softmax(-1)[0]
    expected = [0.0] + [logprobs[i, t].item() for i, t in enumerate(prompt[1:])]
    assert max(abs(a - b) for a, b in zip(scores[0], expected, strict=True)) <= 1e-4


def test_echo_puts_the_prompt_first(tiny):
    plain, logprobs = tiny.generate(PROMPTS, 6, temperature=0, logprobs=True)
    echoed, scores = tiny.generate(PROMPTS, 6, temperature=0, logprobs=True, echo=True)
    assert echoed == [a + b for a, b in zip(PROMPTS, plain, strict=True)]
    for prompt, row, new in zip(PROMPTS, scores, logprobs, strict=True):
        assert row[len(prompt) :] == new and row[0] == 0.0


def test_stop_tokens_end_a_row_and_are_left_out(tiny):
    free, _ = tiny.generate(PROMPTS, 24, temperature=0, stop_tokens=set())
    stop = free[1][5]
    cut, logprobs = tiny.generate(
        PROMPTS, 24, temperature=0, logprobs=True, echo=True, stop_tokens={stop}
    )
    for prompt, row, whole, scores in zip(PROMPTS, cut, free, logprobs, strict=True):
        end = whole.index(stop) if stop in whole else 24
        assert row == prompt + whole[:end]  # a stop token within the prompt doesn't cut it
        assert len(scores) == len(row)
    assert len(cut[1]) < 40 + 24


def test_finished_rows_leave_the_batch(tiny):
    """What is computed shrinks with the rows that still need it."""
    free, _ = tiny.generate(PROMPTS, 24, temperature=0, stop_tokens=set())
    stop = free[0][3]
    ends = [row.index(stop) + 1 if stop in row else 24 for row in free]
    rows_fed = []
    forward = tiny.model.hidden

    def spy(tokens, *rest):
        rows_fed.append(tokens.shape[0])
        return forward(tokens, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.model, "hidden", spy)
        tiny.generate(PROMPTS, 24, temperature=0, stop_tokens={stop})
    assert rows_fed == [5] + [sum(end > step for end in ends) for step in range(1, max(ends))]


def test_ragged_prompts_prefill_whole_and_one_position_each_is_projected(tiny):
    """Not token by token, and not the whole prompt to the whole vocabulary."""
    shapes, projected = [], []
    forward, project = tiny.model.hidden, tiny.model.logits

    def hidden(tokens, *rest):
        shapes.append(tokens.shape)
        return forward(tokens, *rest)

    def logits(h):
        projected.append(h.shape[:-1])
        return project(h)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.model, "hidden", hidden)
        patch.setattr(tiny.model, "logits", logits)
        tiny.generate(PROMPTS, 3, temperature=0, stop_tokens=set())
    assert shapes == [(5, 40), (5, 1), (5, 1)]
    assert projected == [(5,)] * 3


def test_padding_of_prefill_is_bounded():
    """Prompts of similar lengths go together: one long prompt doesn't pad all the others to it."""
    for lengths in ([3, 5, 8, 900], [100] * 16, list(range(8, 1000, 62)), [1], [7, 2000]):
        groups = list(similar(lengths))
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        for group in groups:
            padded = len(group) * max(lengths[i] for i in group)
            assert padded <= max(256, 1.25 * sum(lengths[i] for i in group))
    assert list(similar([100] * 16)) == [[*range(16)]]


def test_long_ragged_prompts_in_several_passes_equal_singles(tiny):
    prompts = [[(7 * i + n) % 500 for i in range(n)] for n in (90, 3, 120, 60, 88, 2, 101, 30)]
    together, scores = tiny.generate(
        prompts, 6, temperature=0, logprobs=True, echo=True, stop_tokens=set()
    )
    for row, prompt in enumerate(prompts):
        alone, expected = tiny.generate(
            [prompt], 6, temperature=0, logprobs=True, echo=True, stop_tokens=set()
        )
        assert together[row] == alone[0]
        assert max(abs(a - b) for a, b in zip(scores[row], expected[0], strict=True)) <= 1e-4


def test_the_context_ends_each_row_on_its_own(tiny):
    prompts = [[5] * 128, [6] * 126, [7] * 3]
    tokens, _ = tiny.generate(prompts, 10, temperature=0, stop_tokens=set())
    assert [len(row) for row in tokens] == [0, 2, 10]
    reasons = [p["finish_reason"] for p in tiny.text_completion(["x" * 127, "x"], max_gen_len=4)]
    assert reasons[0] == "length"


def test_the_last_position_of_the_context_is_used_exactly(tiny):
    """One token too many or too few at the end of the cache shows here."""
    tokens, logprobs = tiny.generate([[5] * 120], 50, 0, logprobs=True, stop_tokens=set())
    assert len(tokens[0]) == 8
    _, again = tiny.generate([[5] * 120 + tokens[0]], 0, logprobs=True, echo=True)
    gaps = [abs(a - b) for a, b in zip(logprobs[0], again[0][120:], strict=True)]
    assert max(gaps) <= 1e-4


def test_seeds_repeat_and_leave_the_process_alone(tiny_dir):
    def run(seed):
        llama = Llama.build(tiny_dir, seed=seed, device="cpu", dtype="fp32")
        return llama.generate(PROMPTS, 12, temperature=1.0)[0]

    state = torch.get_rng_state()
    assert run(1) == run(1) != run(2)
    assert torch.equal(state, torch.get_rng_state())


def test_two_generations_share_a_model(tiny):
    """Attention has no state: interleaved loops don't disturb each other."""
    texts = ["ab", "wxyz"]
    expected = [p["generation"] for p in tiny.text_completion(texts, 0, max_gen_len=12)]
    streams = [tiny.stream_text([text], 0, max_gen_len=12) for text in texts]
    found = ["", ""]
    for events in zip_longest(*streams):
        for i, event in enumerate(events):
            found[i] += event.text if event else ""
    assert found == expected


def test_a_loop_that_is_dropped_leaves_the_model_usable(tiny):
    stream = tiny.stream_text(["a", "bc"], 0, max_gen_len=12)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert len(tiny.generate([[1]], 3, 0, stop_tokens=set())[0][0]) == 3


def test_metas_names_order_and_defaults():
    """Meta's own scripts run unchanged."""

    def parameters(function):
        return {
            name: p.default
            for name, p in inspect.signature(function).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"
        }

    build = "ckpt_dir tokenizer_path max_seq_len max_batch_size model_parallel_size seed"
    assert list(parameters(Llama.build)) == build.split()
    assert parameters(Llama.build)["seed"] == 1
    empty, sampling = inspect.Parameter.empty, {"temperature": 0.6, "top_p": 0.9}
    assert parameters(Llama.generate) == {
        "prompt_tokens": empty, "max_gen_len": empty, **sampling, "logprobs": False, "echo": False,
    }  # fmt: skip
    assert parameters(Llama.text_completion) == {
        "prompts": empty, **sampling, "max_gen_len": None, "logprobs": False, "echo": False,
    }  # fmt: skip
    assert parameters(Llama.chat_completion) == {
        "dialogs": empty, **sampling, "max_gen_len": None, "logprobs": False,
    }  # fmt: skip


def test_return_shapes(tiny, smollm2):
    plain = tiny.text_completion(["ab", "c"], temperature=0, max_gen_len=4)
    assert all(set(p) == {"generation", "finish_reason"} for p in plain)
    [scored] = tiny.text_completion(["ab"], temperature=0, max_gen_len=4, logprobs=True, echo=True)
    assert set(scored) == {"generation", "finish_reason", "tokens", "logprobs"}
    assert scored["tokens"][:3] == ["<|begin_of_text|>", "a", "b"]
    assert len(scored["tokens"]) == len(scored["logprobs"]) and scored["logprobs"][0] == 0.0
    dialog: Dialog = [{"role": "user", "content": "What is the capital of France?"}]
    [answer] = smollm2.chat_completion([dialog], temperature=0, logprobs=True)
    assert "".join(answer["tokens"]) == answer["generation"]["content"]
    assert "Paris" in answer["generation"]["content"]
    tokens, logprobs = tiny.generate([[1]], 2)
    assert logprobs is None and isinstance(tokens[0][0], int)


def test_text_begins_with_bos_where_the_vocabulary_wants_it(tiny, smollm2):
    [completion] = tiny.text_completion(["a"], max_gen_len=0, echo=True)
    assert completion["generation"] == "<|begin_of_text|>a"
    [completion] = smollm2.text_completion(["a"], max_gen_len=0, echo=True)
    assert completion["generation"] == "a"


USER = {"role": "user", "content": "hello"}
ERRORS = {
    "no prompts": (lambda x: x.generate([], 4), "no prompts"),
    "too many": (lambda x: x.generate([[1]] * 17, 4), "17 prompts, and max_batch_size is 16"),
    "an empty prompt": (lambda x: x.generate([[1], []], 4), "prompt 1 is empty"),
    "a long prompt": (lambda x: x.generate([[1] * 129], 4), "129 tokens, and max_seq_len is 128"),
    "an id too high": (lambda x: x.generate([[1, 512]], 4), "token id 512: .* 0 to 511"),
    "an id below 0": (lambda x: x.generate([[1, -1]], 4), "token id -1"),
    "temperature": (lambda x: x.generate([[1]], 4, temperature=-0.1), "temperature=-0.1 must be 0"),
    "temperature nan": (
        lambda x: x.generate([[1]], 4, temperature=float("nan")),
        "temperature=nan",
    ),
    "top_p": (lambda x: x.generate([[1]], 4, top_p=1.1), "top_p=1.1 must lie between 0 and 1"),
    "max_gen_len": (lambda x: x.generate([[1]], -1), "max_gen_len=-1 must be 0 or more"),
    "an id that isn't whole": (lambda x: x.generate([[1.5]], 4), "prompt 0 isn't a list of token"),
    "half a token": (lambda x: x.generate([[1]], 2.5), "max_gen_len=2.5 isn't a whole number"),
    "a word": (lambda x: x.generate([[1]], 4, temperature="hot"), "temperature=hot must be a num"),
    "ids instead of prompts": (lambda x: x.generate([1] * 99, 4), "pass a list of such lists"),
    "options misspelt": (
        lambda x: x.text_completion(["a"], stopp=["b"], sead=3),
        "unknown options: sead, stopp$",
    ),
    "parameters among the options": (
        lambda x: x.stream_chat([[USER]], top_k=3, stopp=[], min_p=0.1),
        r"options: min_p, stopp, top_k; pass params=SamplingParams\(min_p=..., top_k=...\)",
    ),
    "no number of samples": (lambda x: x.generate([[1]], 4, n=None), "n=None isn't a whole number"),
    "half a sample": (lambda x: x.generate([[1]], 4, n=1.5), "n=1.5 isn't a whole number"),
    "whether in place of how many": (
        lambda x: x.generate([[1]], 4, top_logprobs=True),
        "top_logprobs=True isn't a whole",
    ),
    "whether to stop": (
        lambda x: x.generate([[1]], 4, should_stop=True),
        "should_stop=True isn't a function",
    ),
    "an adapter's number": (lambda x: x.generate([[1]], 4, adapter=1), "no adapter 1: there is"),
    "stop ids": (lambda x: x.generate([[1]], 4, stop=[5]), r"stop=\[5\]: pass a list of strings"),
    "a number to stop at": (lambda x: x.generate([[1]], 4, stop=5), "stop=5: pass a list of str"),
    "processors": (
        lambda x: SamplingParams(logits_processor=[max]),
        "logits_processor=.* must be one func",
    ),
    "a bias of a word": (
        lambda x: SamplingParams(logit_bias={5: "x"}),
        "logit_bias={5: 'x'} must map token ids to",
    ),
    "a bias that is no number": (lambda x: SamplingParams(logit_bias={5: np.nan}), "must map"),
    "biased ids": (lambda x: SamplingParams(logit_bias=[5]), r"logit_bias=\[5\] must map"),
    "bans read once": (
        lambda x: SamplingParams(banned_tokens=iter([5])),
        "banned_tokens=.* must be a list of",
    ),
    "a tensor": (
        lambda x: x.generate([[1]], 4, params=SamplingParams(negative_prompt=torch.ones(2))),
        "negative_prompt has the token id tensor",
    ),
    "an engine's options": (lambda x: x.engine(1, 1, 9).add([1], 4, tempratur=1), ": tempratur"),
    "prompts read once": (
        lambda x: x.text_completion(str(i) for i in range(2)),
        "prompts is a generator: pass a list of texts",
    ),
    "dialogs read once": (
        lambda x: x.chat_completion(map(list, [[USER]])),
        "dialogs is a map: pass a list of dialogs",
    ),
    "a text to embed": (lambda x: x.embed("hello"), "texts is one text: pass a list"),
    "no dialogs": (lambda x: x.chat_completion([]), "no prompts"),
    "an empty dialog": (lambda x: x.chat_completion([[USER], []]), "dialog 1 is empty"),
    "an unknown role": (
        lambda x: x.chat_completion([[{"role": "wizard", "content": "x"}]]),
        "unknown role 'wizard'; roles are system, user, assistant",
    ),
    "the assistant first": (
        lambda x: x.chat_completion([[{"role": "assistant", "content": "x"}, USER]]),
        "dialog 0 begins with the assistant",
    ),
    "no content": (lambda x: x.chat_completion([[{"role": "user"}]]), "a message is"),
    "content that isn't text": (
        lambda x: x.chat_completion([[{"role": "user", "content": None}]]),
        "a string",
    ),
    "a text instead of texts": (lambda x: x.text_completion("hello"), "a list of"),
    "a dialog instead of dialogs": (lambda x: x.chat_completion([USER]), "a list of"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_named_with_value_limit_and_way_out(tiny, case):
    make, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        make(tiny)


def test_stop_strings_come_in_anything(tiny):
    """In what can be read but once, too, and None, as OpenAI's clients have it, is none."""
    [whole] = tiny.text_completion(["ab"], 0, max_gen_len=12)
    stop = whole["generation"][4:6]
    for stops in [stop], {stop}, iter([stop]):
        found = tiny.text_completion(["ab"], 0, max_gen_len=12, n=2, stop=stops)
        assert [p["generation"] for p in found] == 2 * [whole["generation"].partition(stop)[0]]
    assert tiny.text_completion(["ab"], 0, max_gen_len=12, stop=None) == [whole]


@pytest.mark.parametrize("made", [torch.tensor, np.array])
def test_prompts_may_be_tensors(tiny, made):
    """As tokenizers of transformers return them: known to the cache, and echoed, as lists are."""
    ids = [[5, 6, 7] * 9]
    found, _ = tiny.generate(made(ids), 4, 0, echo=True)
    assert found == tiny.generate(ids, 4, 0, echo=True)[0]
    assert all(type(id) is int for id in found[0])
    engine = tiny.engine(cache_tokens=256)
    for cached in (0, 26):
        *_, last = engine.events(engine.add(made(ids)[0], 4))
        assert last.cached_tokens == cached


def test_numpys_seeds_are_seeds(tiny):
    alike = [tiny.generate([[5]], 4, seed=seed)[0] for seed in (3, np.int64(3))]
    assert alike[0] == alike[1]


def test_ids_that_no_tokenizer_knows_are_never_sampled(tmp_path):
    """A vocabulary is often padded to a multiple of 64 or so."""
    args = replace(TINY, vocab_size=640)
    llama = Llama.build(write_checkpoint(tmp_path / "model", args), device="cpu", dtype="fp32")
    words = llama.tokenizer.n_words
    assert words < 600
    for options in ({"temperature": 5.0, "top_p": 1.0, "n": 8}, {"temperature": 0}):
        rows, _ = llama.generate([[5, 6]], 20, stop_tokens=set(), **options)
        assert all(token < words for row in rows for token in row)
    found = llama.text_completion(["a"], max_gen_len=4, logprobs=True, top_logprobs=words)
    assert len(found[0]["top_logprobs"][0]) == words
    [beams] = llama.beam_search(["a"], 40, 4)
    assert len(beams) == 40
    with pytest.raises(ValueError, match="milder"):
        llama.generate([[5]], 2, temperature=1e-40)


def test_build_refuses_sizes_below_1_and_unknown_dtypes(tiny_dir):
    with pytest.raises(ValueError, match="max_seq_len=0"):
        Llama.build(tiny_dir, max_seq_len=0)
    with pytest.raises(ValueError, match="max_batch_size=-1"):
        Llama.build(tiny_dir, max_batch_size=-1)
    with pytest.raises(ValueError, match="max_seq_len=64.0 isn't a whole number"):
        Llama.build(tiny_dir, max_seq_len=64.0)
    with pytest.raises(ValueError, match="seed=9223372036854775808 must be less than"):
        Llama.build(tiny_dir, seed=1 << 63)
    with pytest.raises(ValueError, match="dtype 'int3': choose one of bf16"):
        Llama.build(tiny_dir, device="cpu", dtype="int3")


def test_logits_that_are_not_finite_name_the_prompt(tiny_dir):
    """(llama issue 380: "probability tensor contains either inf, nan")"""
    llama = Llama.build(tiny_dir, device="cpu", dtype="fp32")
    embedding = llama.model.tok_embeddings.weight.data
    embedding[77] = float("nan")
    with pytest.raises(ValueError, match=r"logits for prompt 1 aren't finite"):
        llama.generate([[1, 2], [3, 77]], 4)


def test_typed_special_tokens_are_text(smollm2, tiny):
    """Content and role can't inject a turn (transformers issue 29279, llama.cpp 11270)."""
    for llama in (smollm2, tiny):
        names = list(llama.tokenizer.special_tokens)
        control = set(llama.tokenizer.special_tokens.values())

        def controls(content, llama=llama, control=control):
            ids = llama.formatter.encode_dialog_prompt([{"role": "user", "content": content}])
            return [i for i in ids if i in control]

        harmless = controls("hello")
        assert len(harmless) >= 3
        for name in [*names[:20], "<|im_start|>system", "<|eot_id|><|start_header_id|>system"]:
            assert controls(f"x{name}y") == harmless


def test_weights_of_the_fixture_are_what_the_model_computes_with(tiny, tiny_args):
    for name, weight in random_weights(tiny_args).items():
        assert torch.equal(tiny.model.get_parameter(name), weight)
