"""Scores and perplexity: those of a plain forward, of transformers, and of llama.cpp."""

import http.client
import json
import math
from urllib.parse import urlparse

import pytest
import torch
import xllamacpp
from conftest import ROOT, THOROUGH, TINY, random_weights
from test_model import to_hugging_face

from llama import Llama
from llama.apps import cli
from llama.checkpoint.convert import convert
from llama.engine import projection, scoring
from llama.engine.scoring import (
    Span,
    halved_chunks,
    perplexity,
    score,
    score_continuations,
    score_spans,
)


def score_command(*arguments, **options):
    given = [f"--{name}={value}" for name, value in options.items()]
    cli.parse(["score", *arguments, *given])()


TEXTS = ["A tale of two cities.", "", "b", "It was the best of times, " * 4, "zzz", "naïve ⚽"]


@pytest.fixture
def hugging_face(smollm2_transformers):
    return smollm2_transformers


def their_logprobs(model, ids):
    """transformers' logits of one window: the log-probability of each token but the first."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].double()


def their_perplexity(model, ids, context, stride):
    """The loop of transformers' "Perplexity of fixed-length models", each token counted once."""
    nll, tokens, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        scored = their_logprobs(model, ids[begin:end])[-(end - previous) :]
        nll, tokens, previous = nll - scored.sum().item(), tokens + len(scored), end
        if end == len(ids):
            break
    return math.exp(nll / tokens), tokens


def long_text(tokenizer, tokens):
    """So many tokens of the licence and of this repository's sources."""
    files = [
        ROOT / "LICENSE",
        ROOT / "llama" / "model.py",
        ROOT / "llama" / "engine" / "scoring.py",
    ]
    text = "".join(file.read_text() for file in files)
    return tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)[:tokens])


# --- scores --------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_forward_in_the_order_of_the_texts(tiny):
    for text, found in zip(TEXTS, score(tiny.engine(), TEXTS, 4), strict=True):
        ids = tiny.tokenizer.encode(text, bos=True, eos=False)
        with torch.no_grad():
            logprobs = tiny.model(torch.tensor([ids]))[0].log_softmax(-1)
        expected = [0.0] + [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
        assert found.tokens == ids and found.logprobs == pytest.approx(expected, abs=1e-4)
        assert found.total == pytest.approx(sum(expected), abs=1e-3)


def test_a_batch_equals_singles(tiny):
    together = score(tiny.engine(), TEXTS, batch_size=len(TEXTS))
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = score(tiny.engine(), [text])
        assert found.tokens == alone.tokens
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_what_generation_says_of_its_tokens_is_what_scoring_says(tiny):
    prompt = tiny.tokenizer.encode("Once", bos=True, eos=False)
    (new,), (logprobs,) = tiny.generate([prompt], 20, 0, logprobs=True, stop_tokens=set())
    ((found, greedy),) = score_spans(tiny.engine(), [Span([*prompt, *new], len(prompt))])
    assert found == pytest.approx(logprobs, abs=1e-4) and all(greedy)


def test_continuations_and_whether_greedy_decoding_gives_them(tiny):
    contexts = [[1, 2, 3], [250] * 30, [9]]
    pairs = []
    for context in contexts:
        (best,), _ = tiny.generate([context], 6, temperature=0, stop_tokens=set())
        pairs += [(context, best), (context, [*best[:5], (best[5] + 1) % 512]), (context, [])]
    found = score_continuations(tiny.engine(), pairs, batch_size=2)
    assert [one.greedy for one in found] == [True, False, True] * 3
    for (context, continuation), one in zip(pairs, found, strict=True):
        ((logprobs, _),) = score_spans(
            tiny.engine(), [Span([*context, *continuation], len(context))]
        )
        assert one.total == pytest.approx(sum(logprobs), abs=1e-4)
        assert len(logprobs) == len(continuation)


def test_a_context_that_continuations_share_is_computed_once(tiny):
    context, endings = list(range(3, 103)), [[9, 8], [7], [9, 9, 9], [6, 5, 4, 3]]
    engine = tiny.engine()
    together = score_continuations(engine, [(context, ending) for ending in endings])
    fed = len(context) + sum(len(ending) - 1 for ending in endings)  # the last ones aren't
    again = len(endings) - 1  # the position that predicts the first token of an ending
    assert engine.stats.computed_tokens == fed + again
    for ending, found in zip(endings, together, strict=True):
        [alone] = score_continuations(tiny.engine(), [(context, ending)])
        assert found.greedy == alone.greedy and found.total == pytest.approx(alone.total, abs=1e-4)


def test_scores_do_not_depend_on_what_runs_beside_them(tiny):
    engine = tiny.engine(max_tokens_per_step=16, cache_tokens=256)  # chunks, and preemptions
    spans = [Span([*range(3, 60 + i)], 20) for i in range(0, 12, 3)]
    alone = [score_spans(tiny.engine(), [span])[0] for span in spans]
    other = engine.add([5, 6, 7], 40, temperature=0, stop_tokens=set())
    for found, expected in zip(score_spans(engine, spans), alone, strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-4) and found[1] == expected[1]
    assert len(list(engine.events(other))) == 40


def test_few_positions_are_projected_at_a_time_and_only_those_scored(tiny, monkeypatch):
    projected, logits = [], tiny.model.logits
    monkeypatch.setattr(tiny.model, "logits", lambda h: projected.append(len(h)) or logits(h))
    score_spans(tiny.engine(), [Span([7] * 100, 40), Span([8] * 129, 1), Span([9], 1)])
    assert sum(projected) == 60 + 128 and max(projected) <= projection.PROJECTED


def test_mistakes_are_named(tiny):
    engine = tiny.engine()
    for call, message in [
        (lambda: score(engine, "text"), "pass a list"),
        (lambda: score(engine, ["a", "b" * 128]), "text 1 has 129 tokens.* perplexity"),
        (lambda: score(engine, ["a"], batch_size=0), "batch_size=0"),
        (lambda: score_continuations(engine, [([1], [2]), ([], [2])]), "context 1 is empty"),
        (lambda: score_continuations(engine, [([1], [2] * 129)]), "has 130 tokens, and 129 can"),
        (lambda: score_continuations(engine, [([1], [512])]), "token id 512.*0 to 511"),
        (lambda: score_spans(engine, [Span([1, -2], 1)]), "token id -2"),
        (lambda: score_spans(engine, [Span([1, 2], 0)]), "start=0"),
        (lambda: perplexity(engine, ["a"]), "pass one str"),
        (lambda: perplexity(engine, ""), "no token"),
        (lambda: perplexity(engine, "abc", convention="llama.cpp"), "fill a window"),
        (lambda: perplexity(engine, "abc", convention="gpt"), "convention='gpt'"),
        (lambda: perplexity(engine, "abc", context=129), "context=129.*max_seq_len"),
        (lambda: perplexity(engine, "abc", context=1), "context=1 must"),
        (lambda: perplexity(engine, "abc", stride=0), "stride=0 must"),
        (lambda: perplexity(engine, "abc", stride=9, context=8), "stride=9 must"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_logits_that_are_not_finite_are_named(make_model, tiny):
    model = make_model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="text 1 aren't finite.*float32"):
        score_spans(Llama(model, tiny.tokenizer).engine(), [Span([], 1), Span([1, 2], 1)])


def test_scores_of_the_demo_model_equal_transformers(smollm2, hugging_face, parity):
    texts = [smollm2.tokenizer.decode(case["ids"]) for case in parity["completions"]]
    texts += [
        "Olá, mundo! ⚽ 数学",
        "def f(x):\n    return x + 1\n",
        "  two  spaces",
        "3.14159 = π",
        "a " * 40,
        "The cat sat on the mat, and then it sat on the other mat.",
    ]
    found = score(smollm2.engine(), texts)
    assert len(found) == 10
    for one in found:
        expected = [0.0, *their_logprobs(hugging_face, one.tokens).tolist()]
        assert max(abs(a - b) for a, b in zip(one.logprobs, expected, strict=True)) <= 1e-4


# --- perplexity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("context, stride", [(8, 4), (8, 8), (8, 1), (128, 64), (16, 5), (2, 1)])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 63, 200])
def test_strided_windows_score_each_token_once_as_transformers_does(tiny, context, stride, length):
    theirs = to_hugging_face(TINY, random_weights(TINY))
    text = ("The quick brown fox jumps over the lazy dog. " * 5)[:length]
    ids = tiny.tokenizer.encode(text, bos=True, eos=False)
    found = perplexity(tiny.engine(), text, stride, context)
    expected, tokens = their_perplexity(theirs, ids, context, stride)
    assert found.tokens == tokens and found.perplexity == pytest.approx(expected, rel=1e-4)
    assert stride == context or found.tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(found.nll / found.tokens))


def test_a_text_within_the_context_is_one_window(tiny):
    found = perplexity(tiny.engine(), TEXTS[0])
    (whole,) = score(tiny.engine(), TEXTS[:1])
    assert found.nll == pytest.approx(-whole.total, abs=1e-4)
    assert found.tokens == len(whole.tokens) - 1


def test_the_chunks_are_those_of_llama_cpp():
    ids = list(range(100, 120))
    assert list(halved_chunks(ids, 8, 1)) == [
        ([1, 101, 102, 103, 104, 105, 106, 107], 5),
        ([1, 109, 110, 111, 112, 113, 114, 115], 5),
    ]
    assert list(halved_chunks(ids, 8, None))[1] == ([*range(108, 116)], 5)
    assert list(halved_chunks(ids, 21, 1)) == []


def test_texts_together_have_the_perplexity_of_each_alone(tiny):
    texts = [TEXTS[0] * 9, "", TEXTS[3] * 3]
    together = scoring.perplexities(tiny.engine(), texts, 16, 32)
    assert together[1].tokens == 0 and math.isnan(together[1].perplexity)
    for text, found in zip(texts[::2], together[::2], strict=True):
        alone = perplexity(tiny.engine(), text, 16, 32, batch_size=1)
        assert found == pytest.approx(alone, rel=1e-5)


def test_perplexity_of_a_long_text_equals_transformers(smollm2, hugging_face):
    """Windows that overlap by half, of which the last one isn't full."""
    context = 512 if THOROUGH else 192
    text = long_text(smollm2.tokenizer, context * 3 // 2 + 32)
    ids = smollm2.tokenizer.encode(text, bos=False, eos=False)
    found = perplexity(smollm2.engine(), text, context=context)
    expected, tokens = their_perplexity(hugging_face, ids, context, context // 2)
    assert found.tokens == tokens == len(ids) - 1 >= context * 3 // 2
    assert found.perplexity == pytest.approx(expected, rel=1e-4)


def llama_cpp_logprobs(path, ids, start):
    """llama.cpp's log-probabilities of ids[start:], from its server in this process, one thread.

    It gives none of a prompt's. So each token is asked for after those before it, with a bias that
    leaves no choice; what is returned is the model's own probability, from before the bias.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.kv_unified = len(ids) + 64, 1, False
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    connection = http.client.HTTPConnection(urlparse(server.listening_address).netloc)
    logprobs = []
    for end in range(start, len(ids)):
        body = {"prompt": ids[:end], "temperature": 0, "n_predict": 1, "n_probs": 1,
                "logit_bias": [[ids[end], 1000.0]], "cache_prompt": True}  # fmt: skip
        connection.request("POST", "/completion", json.dumps(body))
        (drawn,) = json.loads(connection.getresponse().read())["completion_probabilities"]
        assert drawn["id"] == ids[end]
        logprobs.append(drawn["logprob"])
    return logprobs


@pytest.mark.parametrize(
    "weights, context, bound", [("F32", 128, 2e-3), ("Q4_1", 512 if THOROUGH else 128, 1e-2)]
)
def test_perplexity_is_llama_cpps(smollm2, smollm2_path, tmp_path, parity, weights, context, bound):
    """With its convention, on the same file. On quantized weights it rounds activations, too."""
    path = smollm2_path
    if weights == "F32":
        path = convert(path, tmp_path / "f32.gguf", "gguf", quiet=True)
    tokenizer = smollm2.tokenizer
    text = (ROOT / "LICENSE").read_text()  # texts that don't change, for a bound that is tight
    text += "".join(tokenizer.decode(c["ids"] + c["greedy"]) + "\n" for c in parity["completions"])
    (chunk, *_) = halved_chunks(tokenizer.encode(text, bos=False, eos=False), context, None)
    found = perplexity(
        smollm2.engine(), tokenizer.decode(chunk.ids), context=context, convention="llama.cpp"
    )
    theirs = llama_cpp_logprobs(path, chunk.ids, chunk.start)
    assert found.tokens == len(theirs) == context // 2 - 1
    assert found.perplexity == pytest.approx(math.exp(-sum(theirs) / len(theirs)), rel=bound)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_scores_files_and_lines(tiny_dir, tiny, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXTS[0] * 20)
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one\u2028line", "", TEXTS[3])]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    options = {"max_seq_len": 64, "stride": 16, "device": "cpu", "dtype": "fp32"}
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    score_command(str(tiny_dir), files[0], jsonl=files[1], **options)
    printed = capsys.readouterr().out.splitlines()
    score_command(str(tiny_dir), files[0], jsonl=files[1], **options, json=True)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [files[0], f"{files[1]}:1", f"{files[1]}:3", f"{files[1]}:5"]
    assert [record["name"] for record in records] == names
    for text, record in zip([TEXTS[0] * 20, "one\u2028line", "", TEXTS[3]], records, strict=True):
        (found,) = scoring.perplexities(tiny.engine(), [text], 16, 64)
        assert record["tokens"] == found.tokens
        assert record["logprob"] == pytest.approx(-found.nll, abs=1e-3)
        assert record["perplexity"] == (
            pytest.approx(found.perplexity, rel=1e-4) if found.tokens else None
        )
    assert printed[0].startswith(f"{names[0]}: 420 tokens, log-probability -")
    assert f"perplexity {records[3]['perplexity']:.4f}" in printed[3] and len(printed) == 4


@pytest.mark.parametrize("line", ["{}", '"text"', "{", '{"text": 1}', "[1]"])
def test_a_broken_line_is_named_before_weights_are_read(tmp_path, line):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r'texts.jsonl:2: not a JSON object with a string "text"'):
        score_command("nowhere", jsonl=str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="texts.jsonl has no lines"):
        score_command("nowhere", jsonl=str(path))


def test_files_that_cannot_be_scored(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"latin.txt isn't UTF-8"):
        score_command("nowhere", str(tmp_path / "latin.txt"))
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        score_command("nowhere", str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="no files"):
        score_command("nowhere")


def test_scoring_needs_no_bos(smollm2):
    assert not smollm2.tokenizer.add_bos
    empty, one = score(smollm2.engine(), ["", "a"])
    assert empty == ([], [], 0.0) and one.logprobs == [0.0] and one.total == 0.0


def test_llama_scores(tiny):
    [found] = tiny.score(["hello"])
    _, logprobs = tiny.generate([found.tokens], 0, logprobs=True, echo=True)
    assert found.logprobs == pytest.approx(logprobs[0], abs=1e-5)
    long = tiny.perplexity("hello " * 100, stride=40)
    assert long.tokens == 600 and long.perplexity == pytest.approx(math.exp(long.nll / 600))
