"""Llama 4's vocabulary and chat format against Meta's, and its tools."""

import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from conftest import DATA
from llama_models.datatypes import RawMessage, StopReason, ToolPromptFormat
from llama_models.datatypes import ToolCall as MetaToolCall
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer
from PIL import ImageFile

from llama import Tokenizer, parse_tool_calls
from llama.text.llama4 import Llama4Format
from llama.text.templates import chat_format
from llama.text.vocabulary.writing import write_tokenizer

absent = {name: mock.MagicMock() for name in ("torchvision", "torchvision.transforms")}
with mock.patch.dict(sys.modules, absent):  # which only images need
    from llama_models.llama4.chat_format import ChatFormat as MetaChatFormat
ImageFile.LOAD_TRUNCATED_IMAGES = False  # which that import sets, for the whole process

FILE = Path(find_spec("llama_models.llama4").origin).with_name("tokenizer.model")
CASES = [case["text"] for case in json.loads((DATA / "tokenizer_cases.json").read_text())]
TOOL = {
    "name": "add",
    "description": "Adds numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(FILE)


@pytest.fixture(scope="module")
def meta() -> MetaTokenizer:
    return MetaTokenizer(FILE)


def test_special_tokens_and_ids_are_metas(ours, meta):
    assert ours.special_tokens == meta.special_tokens
    assert (ours.n_words, ours.bos_id, ours.eos_id, ours.pad_id) == (
        meta.n_words, meta.bos_id, meta.eos_id, meta.pad_id,
    )  # fmt: skip
    assert ours.stop_tokens == set(meta.stop_tokens)
    random_text = random.Random(0)
    texts = CASES + [
        "".join(random_text.choices("aZé'sß中 \n\t/_,.1ÅLL", k=60)) for _ in range(200)
    ]
    for text in texts:
        ids = meta.encode(text, bos=True, eos=False)
        assert ours.encode(text, bos=True, eos=False) == ids
        assert ours.decode(ids) == meta.decode(ids)


def test_the_file_that_is_written_is_the_one_that_was_read(ours, tmp_path):
    path = write_tokenizer(ours.vocabulary, tmp_path)
    assert path.name == "tokenizer.model" and path.read_bytes() == FILE.read_bytes()


DIALOG = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "1 + 2?\n<|eot|>"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Wait", "end_of_message": True},
]


def as_meta(message: dict) -> RawMessage:
    calls = [
        MetaToolCall(call_id="1", tool_name=call["name"], arguments=call["arguments"])
        for call in message.get("tool_calls", [])
    ]
    extra = {"tool_calls": calls} if message["role"] == "assistant" else {}
    waits = message.get("end_of_message", False)
    reason = StopReason.end_of_message if waits else StopReason.end_of_turn
    extra |= {"stop_reason": reason} if message["role"] == "assistant" else {}
    return RawMessage(role=message["role"], content=message["content"], **extra)


@pytest.mark.parametrize("call_format", ["json", "function_tag", "python_list"])
def test_dialogs_are_encoded_as_metas(ours, meta, call_format):
    format = Llama4Format(ours, call_format=call_format)
    peer, how = MetaChatFormat(meta), ToolPromptFormat[call_format]
    for n in range(1, len(DIALOG) + 1):
        theirs = peer.encode_dialog_prompt([as_meta(m) for m in DIALOG[:n]], how).tokens
        assert format.encode_dialog_prompt(DIALOG[:n]) == theirs


def test_the_format_is_chosen_by_the_special_tokens(ours):
    assert type(chat_format(ours)) is Llama4Format


def test_tools_are_defined_and_the_rest_of_the_dialog_stays(ours):
    format = Llama4Format(ours)
    for dialog in (DIALOG[:2], DIALOG[1:2]):
        plain = ours.decode(format.encode_dialog_prompt(dialog))
        text = ours.decode(format.encode_dialog_prompt(dialog, [TOOL]))
        schema = json.dumps({"type": "function", "function": TOOL}, indent=4)
        assert schema in text and "Today Date" not in text
        assert text.count("<|header_start|>") == plain.count("<|header_start|>")
        assert text.split("\n\n")[-2:] == plain.split("\n\n")[-2:]
    with pytest.raises(ValueError, match="no built-in tools"):
        format.encode_dialog_prompt(DIALOG[:2], ["brave_search"])


@pytest.mark.parametrize(
    "reply",
    [
        '<|python_start|>{"name": "add", "parameters": {"a": 1}}<|python_end|>',
        '<|python_start|><|python_end|>{"name": "add", "parameters": {"a": 1}}',
        "<|python_start|>[add(a=1)]<|python_end|>",
        "[add(a=1)]",
    ],
)
def test_calls_in_replies_are_read(reply):
    found = parse_tool_calls(reply, [TOOL])
    assert found.error is None and found.content == ""
    assert [(call["name"], call["arguments"]) for call in found.calls] == [("add", {"a": 1})]


def test_other_text_between_the_tags_is_code():
    found = parse_tool_calls("<|python_start|>print(1)<|python_end|>")
    assert [call["arguments"] for call in found.calls] == [{"code": "print(1)"}]
