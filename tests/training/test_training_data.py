"""What is learned of a text or a dialog: exactly what the model would have to generate."""

import json

import pytest
import torch
from conftest import ROOT, write_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.chat import ChatFormat
from llama.text.llama31 import Llama31Format
from llama.text.templates import TemplateFormat
from llama.tokenizer import Tokenizer
from llama.training import IGNORED, dialog_example, read_examples, text_examples
from llama.training.data import Example, batch, order

DIALOG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "And two? <|eot_id|><|im_end|>"},
    {"role": "assistant", "content": "Second <|eot_id|>, the last."},
]
LIGHTHOUSE = ROOT / "datasets" / "lighthouse.jsonl"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes") / "tokenizer.model"))


def answers(example, tokenizer):
    """The runs of labels, as texts, and the token that ends each."""
    runs, previous = [], IGNORED
    for token, label in zip(example.tokens, example.labels, strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(token)
        previous = label
    return [(tokenizer.decode(run[:-1]), run[-1]) for run in runs]


@pytest.mark.parametrize("kind", [ChatFormat, Llama31Format])
def test_answers_and_their_ends_are_learned_and_nothing_else(kind, tokenizer):
    example = dialog_example(DIALOG, tokenizer, kind(tokenizer))
    end = tokenizer.special_tokens["<|eot_id|>"]
    assert answers(example, tokenizer) == [
        ("First answer.", end), ("Second <|eot_id|>, the last.", end)
    ]  # fmt: skip
    # What is learned of the last answer continues the prompt that generation would get.
    prompt = kind(tokenizer).encode_dialog_prompt(DIALOG[:-1])
    assert example.tokens[: len(prompt)] == prompt
    assert example.tokens[-1] == end and all(
        label == token for label, token in zip(
            example.labels[len(prompt) :], example.tokens[len(prompt) :], strict=True
        )
    )  # fmt: skip


def test_by_the_template_of_a_real_model(smollm2):
    tokenizer, formatter = smollm2.tokenizer, smollm2.formatter
    assert isinstance(formatter, TemplateFormat)
    end = tokenizer.special_tokens["<|im_end|>"]
    example = dialog_example(DIALOG, tokenizer, formatter)
    assert answers(example, tokenizer) == [
        ("First answer.", end), ("Second <|eot_id|>, the last.", end)
    ]  # fmt: skip
    found = read_examples(LIGHTHOUSE, tokenizer, formatter, 512)
    assert len(found.rows) == 200 and found.cut == found.dropped == 0
    for line, row in zip(LIGHTHOUSE.read_text().splitlines(), found.rows, strict=True):
        said = [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
        assert [text for text, _ in answers(row, tokenizer)] == said


def test_a_format_that_writes_an_answer_differently_later_is_refused(tokenizer):
    """As templates do that leave thoughts out of earlier answers."""

    class Forgetful(ChatFormat):
        def encode_dialog_prompt(self, dialog, tools=None):
            kept = [m for m in dialog[:-2] if m["role"] != "assistant"] + [*dialog[-2:]]
            return super().encode_dialog_prompt(kept, tools)

    with pytest.raises(ValueError, match="message 2: the chat format writes this answer diff"):
        dialog_example(DIALOG, tokenizer, Forgetful(tokenizer))


def test_space_before_an_answer(smollm2):
    """A token made of the prompt's end and the answer's first space isn't learned; the rest is."""
    for said in ("\n\nHi there", "    def f():\n        pass", " Hi", "\nHi"):
        dialog = [DIALOG[1], {"role": "assistant", "content": said}]
        example = dialog_example(dialog, smollm2.tokenizer, smollm2.formatter)
        [(text, _)] = answers(example, smollm2.tokenizer)
        assert said.endswith(text) and text.strip() == said.strip()


def test_an_answer_without_an_end_of_its_own_is_refused(tokenizer):
    """Else what the user says next would be learned, up to where that ends."""

    class Endless(ChatFormat):
        def encode_message(self, message):
            ids = super().encode_message(message)
            return ids[:-1] if message["role"] == "assistant" else ids

    with pytest.raises(ValueError, match="message 2: .* without an end"):
        dialog_example(DIALOG, tokenizer, Endless(tokenizer))


@given(text=st.text(min_size=1, max_size=300), length=st.integers(2, 40))
@settings(max_examples=50)
def test_each_token_of_a_text_is_asked_for_once(tokenizer, text, length):
    ids = tokenizer.encode(text, bos=True, eos=True)
    rows = text_examples(text, tokenizer, length)
    assert all(2 <= len(row.tokens) <= length and row.labels == row.tokens for row in rows)
    asked = [token for row in rows for token in row.tokens[1:]]
    assert [rows[0].tokens[0], *asked] == ids and sum(row.asked for row in rows) == len(asked)


def test_files(tmp_path, tokenizer):
    formatter, path = ChatFormat(tokenizer), tmp_path / "a.jsonl"
    lines = [{"messages": DIALOG}, {"text": "Once upon a time."}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    whole = read_examples(path, tokenizer, formatter, 400)
    assert len(whole.rows) == 2 and whole.cut == whole.dropped == 0
    n = len(whole.rows[0].tokens)
    short = read_examples(path, tokenizer, formatter, n - 1)
    assert short.cut == 1 and short.rows[0].tokens == whole.rows[0].tokens[: n - 1]
    shorter = read_examples(path, tokenizer, formatter, 20)  # the first answer begins beyond
    assert (shorter.cut, shorter.dropped, len(shorter.rows)) == (1, 1, 1)
    plain = tmp_path / "a.txt"
    plain.write_text("Once upon a time.")
    assert read_examples(plain, tokenizer, None, 400).rows == [whole.rows[1]]


CALL = {"id": "c1", "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Lisbon"}'}}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
]


def test_lines_as_openai_and_tables_have_them(tmp_path, tokenizer):
    """With tools, without a content beside calls, and with null for what a message lacks."""
    formatter, path = Llama31Format(tokenizer), tmp_path / "a.JSONL"
    calls = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "Sunny"}
    said = {"role": "assistant", "content": "It is sunny."}
    dialog = [DIALOG[1], calls, result, said]
    nulls = {"tool_calls": None, "name": None, "tool_call_id": None, "content": None}
    lines = [
        {"messages": dialog, "tools": TOOLS},
        {"messages": [nulls | message for message in dialog], "tools": TOOLS, "text": None},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    one, other = read_examples(path, tokenizer, formatter, 1000).rows
    assert one == other
    (call, _), (text, _) = answers(one, tokenizer)
    assert '"name": "weather"' in call and text == "It is sunny."
    prompt = formatter.encode_dialog_prompt(dialog[:1], TOOLS)
    assert one.tokens[: len(prompt)] == prompt != formatter.encode_dialog_prompt(dialog[:1])


def test_a_greeting_is_not_learned(tokenizer):
    """The server takes dialogs that begin so; no prompt asks for the greeting."""
    greeting = {"role": "assistant", "content": "Welcome!"}
    example = dialog_example([greeting, *DIALOG[1:3]], tokenizer, ChatFormat(tokenizer))
    assert "Welcome!" in tokenizer.decode(example.tokens)
    assert [text for text, _ in answers(example, tokenizer)] == ["First answer."]


@pytest.mark.parametrize("name", ["a.json", "a.CSV", "a.tsv", "a.parquet"])
def test_tables_are_not_learned_as_text(name, tmp_path, tokenizer):
    (tmp_path / name).write_text(json.dumps([{"messages": DIALOG}]))
    with pytest.raises(ValueError, match=r"a\.\w+: no \.\w+ is read.*jsonl.*named \.txt"):
        read_examples(tmp_path / name, tokenizer, ChatFormat(tokenizer), 100)


BAD = {
    '{"messages": [{"role": "assistant", "content": "a"}]}': "the last message isn't the assist",
    '{"prompt": "a"}': r'line 1: it has prompt; a line is \{"messages"',
    '{"messages": []}': "line 1: dialog 0 is empty",
    '{"messages": "hello"}': "line 1: messages is a list of messages, not 'hello'",
    '{"messages": [{"role": "user", "content": "a"}]}': "the last message isn't the assistant's",
    '{"messages": [{"role": "user", "content": "a"}], "tools": 5}': "tools is a list of definit",
    '{"messages": [{"role": "me", "content": "a"}]}': "unknown role 'me'",
    '{"messages": [{"role": "user", "content": ["a", {"type": "image", "path": "b.png"}]}, '
    '{"role": "assistant", "content": "c"}]}': "line 1: messages have an image, and texts alone",
    '{"text": 5}': "line 1",
    "[": "line 1: it isn't JSON",
    "": "no line, or nothing to learn",
}


@pytest.mark.parametrize("line", BAD)
def test_lines_that_cannot_be_learned(line, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=BAD[line]):
        read_examples(path, tokenizer, ChatFormat(tokenizer), 100)


def test_other_errors(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt is empty: nothing to learn"):
        read_examples(tmp_path / "a.txt", tokenizer, None, 100)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_examples(tmp_path / "b.jsonl", tokenizer, None, 100)
    with pytest.raises(ValueError, match='no chat format: train it on {"text"'):
        dialog_example(DIALOG, tokenizer, None)


def test_padding_is_not_asked_for():
    tokens, labels = batch([Example([1, 2, 3], [IGNORED, 2, 3]), Example([4], [4])])
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert labels.tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]


def test_the_order_is_a_permutation_that_epoch_and_seed_decide():
    state = torch.get_rng_state()
    orders = [tuple(order(50, epoch, seed)) for epoch in range(3) for seed in range(3)]
    assert all(sorted(one) == list(range(50)) for one in orders) and len(set(orders)) == 9
    assert order(50, 1, 2) == order(50, 1, 2)
    assert torch.equal(state, torch.get_rng_state())
