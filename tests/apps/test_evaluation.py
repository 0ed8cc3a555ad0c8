"""lm-evaluation-harness on a Llama: what direct computation and the harness's own model give."""

import json
import os
import sys
from functools import partial

# The harness must find all that it needs on this disk.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaForCausalLM

from llama import Llama
from llama.apps import cli
from llama.apps.evaluation import HarnessModel
from llama.checkpoint.convert import convert
from llama.engine.scoring import Span, score_spans

DOCS = [
    {"question": "The capital of France is", "choices": [" Paris", " Berlin"], "answer": 0},
    {"question": "Two and two make", "choices": [" four", " a boat", " seven"], "answer": 0},
    {"question": "The sky is", "choices": [" loud", " blue"], "answer": 1},
]
MULTIPLE_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: byte_perplexity}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory with the three kinds of tasks over one local file."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "docs.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    data = {"data_files": {"test": str(path / "docs.jsonl")}, "cache_dir": str(path / "cache")}
    for name, text in (("choice", MULTIPLE_CHOICE), ("rolling", ROLLING), ("until", GENERATE)):
        (path / f"local_{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {json.dumps(data)}\n{text}"
        )
    return path


@pytest.fixture
def own_tasks_only(monkeypatch):
    """Without the harness's own tasks: reading its thousands of files takes seconds."""
    monkeypatch.setattr(
        "llama.apps.evaluation.TaskManager", partial(TaskManager, include_defaults=False)
    )


def evaluate(ckpt, tasks, *more, **options):
    given = [f"--{name}={value}" for name, value in options.items()]
    cli.parse(["eval", str(ckpt), "--tasks", tasks, *more, *given])()


def total(llama, ids, start):
    ((logprobs, _),) = score_spans(llama.engine(), [Span(ids, start)])
    return sum(logprobs)


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_tasks_get_what_direct_computation_gives(tiny, tasks):
    names = ["local_choice", "local_rolling", "local_until"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        HarnessModel(tiny), tasks=names, task_manager=manager, bootstrap_iters=0
    )

    def responses(name):
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        return [[answer for (answer,) in sample["resps"]] for sample in samples]

    def encode(text):
        return tiny.tokenizer.encode(text, bos=True, eos=False)

    correct = 0
    for doc, answers in zip(DOCS, responses("local_choice"), strict=True):
        context = encode(doc["question"])
        expected = [total(tiny, encode(doc["question"] + c), len(context)) for c in doc["choices"]]
        assert [float(logprob) for logprob, _ in answers] == pytest.approx(expected, abs=1e-3)
        correct += max(range(len(expected)), key=expected.__getitem__) == doc["answer"]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(correct / len(DOCS))

    for doc, (logprob,) in zip(DOCS, responses("local_rolling"), strict=True):
        expected = total(tiny, encode(doc["question"] + doc["choices"][0]), 1)
        assert float(logprob) == pytest.approx(expected, abs=1e-3)

    for doc, (text,) in zip(DOCS, responses("local_until"), strict=True):
        (whole,) = tiny.text_completion([doc["question"]], temperature=0, max_gen_len=12)
        assert text == whole["generation"].split("e")[0].split(".")[0]


def test_a_long_text_is_scored_in_windows_each_token_once(tiny):
    text = "All happy families are alike. " * 11  # 330 tokens, and 128 fit
    (found,) = HarnessModel(tiny).loglikelihood_rolling(instances("rolling", (text,)), True)
    ids = tiny.tokenizer.encode(text, bos=True, eos=False)
    expected = total(tiny, ids[:129], 1) + total(tiny, ids[128:257], 1)
    last = ids[-129:]
    assert found == pytest.approx(expected + total(tiny, last, 129 - (331 - 257)), abs=1e-2)


def test_what_is_too_long_loses_its_beginning(tiny):
    model, context = HarnessModel(tiny), "abcdefgh " * 40
    ids = tiny.tokenizer.encode(context + "xyz", bos=True, eos=False)
    ((found, _),) = model.loglikelihood(instances("loglikelihood", (context, "xyz")), True)
    # A space at the end of the context goes to the continuation, as in the harness.
    assert found == pytest.approx(total(tiny, ids[-129:], 129 - 4), abs=1e-3)
    (text,) = model.generate_until(instances("until", (context, {"max_gen_toks": 8})), True)
    (expected,) = tiny.generate([ids[:1] + ids[-3 - 119 : -3]], 8, temperature=0)[0]
    assert text == tiny.tokenizer.decode(expected)
    with pytest.raises(ValueError, match="a continuation has 200 tokens, and max_seq_len is 128"):
        model.loglikelihood(instances("loglikelihood", ("a", "b" * 200)), True)
    with pytest.raises(ValueError, match="asks for 127 new tokens, and max_seq_len is 128"):
        model.generate_until(instances("until", ("a", {"max_gen_toks": 127})), True)


def test_what_generation_cannot_do_is_refused(tiny):
    request = instances("until", ("a", {"until": "x", "num_beams": 4, "max_gen_toks": 2}))
    with pytest.raises(ValueError, match=r"\{'num_beams': 4\}.*isn't supported"):
        HarnessModel(tiny).generate_until(request, True)


def test_sampling_is_passed_on(tiny, monkeypatch):
    given = {}
    monkeypatch.setattr(
        tiny, "generate", lambda prompts, **o: given.update(o) or ([[*b"!\n?"]], None)
    )
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.5, "until": "\n", "num_beams": 1}
    assert HarnessModel(tiny).generate_until(
        instances("until", ("a", {**options, "max_new_tokens": 5})), True
    ) == ["!"]
    assert given == {"stop": ["\n"], "max_gen_len": 5, "temperature": 0.7, "top_p": 0.5}


def test_the_harness_own_model_gives_the_same(shallow, tmp_path):
    """Ours from GGUF, transformers through HFLM from the same weights; two layers, fp32."""
    hf = convert(shallow, tmp_path / "hf", "hf", quiet=True)
    theirs = HFLM(
        pretrained=LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(hf), max_length=48, batch_size=2,
    )  # fmt: skip
    llama = Llama.build(
        shallow, max_seq_len=48, max_batch_size=2, device="cpu", dtype="fp32", quantize="dense"
    )
    ours = HarnessModel(llama)
    assert (ours.prefix_token_id, ours.eot_token_id) == (
        theirs.prefix_token_id,
        theirs.eot_token_id,
    )
    text = "<|im_start|>user\nIs <|im_end|> a token, or <|endoftext|>?<|im_end|>\n"
    special = HarnessModel(llama, parse_special=True)
    assert special.tok_encode(text) == theirs.tok_encode(text) != ours.tok_encode(text)
    assert ours.tok_encode("plain text") == special.tok_encode("plain text")
    requests = instances("loglikelihood", (text, "Yes"))
    [(found, _)], [(expected, _)] = (one.loglikelihood(requests, True) for one in (special, theirs))
    assert found == pytest.approx(expected, abs=1e-3)
    options = {"until": ["<|im_end|>"], "max_gen_toks": 8, "do_sample": False}
    requests = instances("until", (text, options))
    assert special.generate_until(requests, True) == theirs.generate_until(requests, True)
    pairs = [(doc["question"], choice) for doc in DOCS for choice in doc["choices"]]
    pairs += [("", "Hello there"), ("Ends in spaces  ", "here"), ("word " * 60, "again")]
    requests = instances("loglikelihood", *pairs)
    for (a, greedy), (b, their_greedy) in zip(
        ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-3) and greedy == their_greedy
    requests = instances("rolling", ("A short text.",), ("The bird flew over the hill. " * 20,))
    assert ours.loglikelihood_rolling(requests, True) == pytest.approx(
        theirs.loglikelihood_rolling(requests, True), abs=1e-2
    )
    options = {"until": ["\n", "."], "max_gen_toks": 16, "do_sample": False}
    requests = instances("until", *((doc["question"], options) for doc in DOCS))
    assert ours.generate_until(requests, True) == theirs.generate_until(requests, True)


def test_the_command_prints_a_table_or_json(tiny_dir, tasks, capsys, own_tasks_only):
    options = {"include_path": str(tasks), "max_seq_len": 64, "device": "cpu", "dtype": "fp32"}
    evaluate(tiny_dir, "local_choice", limit=2, **options)
    printed = capsys.readouterr().out
    assert "local_choice" in printed and "|acc " in printed
    evaluate(tiny_dir, "local_choice", "--json", limit=2, num_fewshot=0, **options)
    found = json.loads(capsys.readouterr().out)
    assert found["n-samples"]["local_choice"] == {"original": 3, "effective": 2}
    assert 0 <= found["results"]["local_choice"]["acc,none"] <= 1


@pytest.mark.parametrize("names", ["no_such_task", "arc_easy,", " , "])
def test_unknown_tasks_are_named_before_weights_are_read(names, own_tasks_only):
    named = names.strip(",") if names.strip(" ,") else "' , '"
    with pytest.raises(ValueError, match=f"unknown tasks: {named}; `lm-eval ls tasks`"):
        evaluate("nowhere", names)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"limit": 0}, "--limit=0 must be at least 1"),
        ({"limit": -1}, "--limit=-1 must be at least 1"),
        ({"num_fewshot": -1}, "--num-fewshot=-1 must be at least 0"),
    ],
)
def test_options_out_of_range_are_named_before_weights_are_read(options, says):
    with pytest.raises(ValueError, match=says):
        evaluate("nowhere", "arc_easy", **options)


def test_without_the_harness_the_way_out_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "llama.apps.evaluation")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'llama-reference\[eval\]'"):
        import llama.apps.evaluation  # noqa: F401
