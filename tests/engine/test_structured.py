"""Answers of a given form: what is drawn under the masks fits, and whatever fits can be drawn."""

import builtins
import copy
import io
import json
import random
import re
import unicodedata
from dataclasses import replace
from datetime import date

import jsonschema
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import (
    ROOT,
    TINY,
    run_ranks,
    with_user_defined,
    write_byte_tokenizer,
    write_checkpoint,
)

from llama import Llama, SamplingParams
from llama.engine.speculative import DraftLength
from llama.engine.structured import GrammarCompiler
from llama.engine.tool_formats import tool_call_format
from llama.text.llama31 import Llama31Format
from llama.text.tool_stream import parse_tool_calls
from llama.text.tools import split_tools
from llama.tokenizer import Tokenizer


def closed(**properties):
    """The schema of an object with these properties, all required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
# By name: a schema, and values that fit it.
SCHEMAS = {
    "flat": (closed(name=SHORT, age=DIGIT), [{"name": 'Z"ë\\', "age": 3}, {"name": "", "age": 0}]),
    "optional": (
        closed(a={"type": "boolean"}, b={"type": "null"}) | {"required": []},
        [{}, {"a": True}, {"b": None}, {"a": False, "b": None}],
    ),
    "nested": (closed(p=closed(q=closed(y=SHORT))), [{"p": {"q": {"y": "日本\n"}}}]),
    "enum": ({"enum": ["été", 3, None, True, {"a": [1, 2]}]}, ["été", 3, None, {"a": [1, 2]}]),
    "const": (closed(k={"const": 'x "y" \\u0001'}), [{"k": 'x "y" \\u0001'}]),
    "anyOf": ({"anyOf": [SHORT, DIGIT, {"type": "array", "items": DIGIT, "maxItems": 2}]},
              ["abc", 7, [], [1, 2]]),
    "array": ({"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 4}, [[1, 2], [0] * 4]),
    "pattern": ({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, ["AB-123"]),
    "part": ({"type": "string", "pattern": "a+b", "maxLength": 5}, ["ab", "xaaby"]),
    "range": (closed(i={"type": "integer", "minimum": -17, "maximum": 1234}), [{"i": -17}]),
    "share": ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0.001]),
    "steps": ({"type": "integer", "minimum": 0, "maximum": 50, "multipleOf": 5}, [0, 45]),
    "format": ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"]),
    "others": (
        {"type": "object", "properties": {"id": DIGIT}, "required": ["id"],
         "additionalProperties": {"enum": ["yes", 1.5]}, "maxProperties": 3},
        [{"id": 1}, {"id": 1, "x": "yes", "ключ": 1.5}],
    ),
    "names": (closed(**{"名前": SHORT, "é": {"enum": ["😀"]}}), [{"名前": "田中", "é": "😀"}]),
    "refs": (
        {"$defs": {"node": closed(v=DIGIT, next={"anyOf": [{"$ref": "#/$defs/node"},
                                                           {"type": "null"}]})},
         "$ref": "#/$defs/node"},
        [{"v": 1, "next": {"v": 2, "next": None}}],
    ),
    "tuple": ({"type": "array", "prefixItems": [DIGIT, SHORT], "items": False, "minItems": 2},
              [[1, "a"]]),
    "uuid4": ({"type": "string", "format": "uuid4"}, ["9c5b94b1-35ad-49bb-b118-8e8fc24abf80"]),
    "base64": (  # pydantic's Base64Str and Base64UrlStr; as OpenAPI has it
        closed(**{name: {"type": "string", "format": name}
                  for name in ("base64", "base64url", "byte")}),
        [{"base64": "YQ==", "base64url": "_-8=", "byte": ""}],
    ),
    "addresses": (
        closed(**{name: {"type": "string", "format": name} for name in ("ipv4", "ipvanyaddress")}),
        [{"ipv4": "10.0.0.1", "ipvanyaddress": "192.168.1.255"},
         {"ipv4": "1.2.3.4", "ipvanyaddress": "2001:db8::1"}],
    ),
    "not unique": ({"type": "array", "items": DIGIT, "maxItems": 2, "uniqueItems": False},
                   [[1, 1]]),
    "discriminated": (  # by pydantic: a union with Field(discriminator="kind"), Path and SecretStr
        {"$defs": {
            "A": closed(kind={"const": "a"}, path={"type": "string", "format": "path"}),
            "B": closed(kind={"const": "b"}, key={"type": "string", "format": "password"}),
         },
         "discriminator": {"mapping": {"a": "#/$defs/A", "b": "#/$defs/B"}, "propertyName": "kind"},
         "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]},
        [{"kind": "a", "path": "/tmp"}, {"kind": "b", "key": "x"}],
    ),
    "allOf": ({"allOf": [closed(a=DIGIT, b=DIGIT), {"required": ["a"]}]}, [{"a": 1, "b": 2}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory) -> GrammarCompiler:
    """Over the 256 bytes and Llama 3's special tokens; the model has 32 ids more."""
    path = write_byte_tokenizer(tmp_path_factory.mktemp("bytes") / "tokenizer.model")
    tokenizer = Tokenizer(path)
    return GrammarCompiler(tokenizer, tokenizer.n_words + 32)


@pytest.fixture(scope="module")
def smollm(smollm2_path) -> GrammarCompiler:
    tokenizer = Tokenizer(smollm2_path)
    return GrammarCompiler(tokenizer, tokenizer.n_words)


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> GrammarCompiler:
    """As Llama 2's: pieces begin with a space, bytes for what has no piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "README.md").read_text().splitlines()), model_writer=model,
        vocab_size=800, model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    tokenizer = Tokenizer(path)
    return GrammarCompiler(tokenizer, tokenizer.n_words + 5)


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_path) -> GrammarCompiler:
    tokenizer = Tokenizer(llama3_tokenizer_path)
    return GrammarCompiler(tokenizer, tokenizer.n_words)


ALL = ["bytewise", "smollm", "spm", "llama3"]


@pytest.fixture(params=ALL)
def any_kind(request) -> GrammarCompiler:
    return request.getfixturevalue(request.param)


def make(structures, format_):
    return structures.constraint(format_, structures.tokenizer.stop_tokens)


def schema_format(schema, strict=None):
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": strict, "schema": schema}}


def allowed(structures, constraint):
    mask = constraint.mask(torch.zeros(structures.vocab_size))
    return set(mask.isfinite().nonzero().flatten().tolist())


def walk(structures, format_, seed, most=300):
    """The text that random logits give under the masks; None if it doesn't come to an end."""
    tokenizer, rng = structures.tokenizer, torch.Generator().manual_seed(seed)
    constraint, drawn = make(structures, format_), []
    stops, special = tokenizer.stop_tokens, set(tokenizer.special_tokens.values())
    for step in range(most):
        logits = torch.randn(structures.vocab_size, generator=rng)
        logits[list(stops)] += 3
        logits[ending(structures)] += step / 20  # what closes strings and brackets
        kept = logits.clone()
        masked = constraint.mask(logits)
        open_ = masked.isfinite()
        assert torch.equal(logits, kept) and torch.equal(masked[open_], logits[open_])
        ids = set(open_.nonzero().flatten().tolist())
        assert ids and max(ids) < tokenizer.n_words and not (ids - stops) & special
        assert constraint.finished == (ids <= stops) and (not ids & stops or stops <= ids)
        forced = constraint.forced()
        assert constraint.valid(forced) == len(forced)
        if forced:
            ahead = tokenizer.decode_bytes(drawn + forced)
        token = int(masked.argmax())
        constraint.accept(token)
        if token in stops:
            assert constraint.finished and constraint.forced() == []
            return tokenizer.decode(drawn)
        drawn.append(token)
        said = tokenizer.decode_bytes(drawn)
        if forced:  # what was forced is what comes, however it is spelled
            said, ahead = said.removeprefix(b" "), ahead.removeprefix(b" ")
            assert said.startswith(ahead) or ahead.startswith(said)
    return None


def ending(structures):
    if not hasattr(structures, "ending"):
        table = structures.tokenizer._codec.token_bytes
        structures.ending = [i for i, b in enumerate(table) if b in (b'"', b"}", b"]", b'"}')]
    return structures.ending


def takes(structures, format_, text):
    """Whether a text, as the tokenizer spells it, fits; token by token, and all at once."""
    ids = structures.tokenizer.encode(text, bos=False, eos=False)
    stop = min(structures.tokenizer.stop_tokens)
    constraint = make(structures, format_)
    count = constraint.valid([*ids, stop, stop])
    for i, token in enumerate(ids):
        fits = token in allowed(structures, constraint)
        assert fits == (i < count) == (constraint.valid([token]) == 1)
        if not fits:
            return False
        constraint.accept(token)
    ends = stop in allowed(structures, constraint)
    assert count == len(ids) + ends and constraint.valid([stop]) == ends
    return ends


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("kind", ["bytewise", "smollm", "spm"])
def test_what_is_drawn_fits_the_schema_and_what_fits_can_be_drawn(request, kind, name):
    structures, (schema, values) = request.getfixturevalue(kind), SCHEMAS[name]
    before = copy.deepcopy(schema)
    texts = [walk(structures, schema_format(schema), seed) for seed in range(6)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 5
    for text in ended:
        value = json.loads(text)
        jsonschema.validate(value, schema)
        if name not in ("range", "steps", "others"):  # -0 and 1.50 are written so
            assert json.dumps(value, ensure_ascii=False) == text
    for value in values:
        jsonschema.validate(value, schema)
        assert takes(structures, schema_format(schema), json.dumps(value, ensure_ascii=False))
    assert schema == before


def random_schema(rng, depth=0):
    leaf = rng.choice([
        {"type": "string", "maxLength": rng.randint(0, 5)}, {"type": "boolean"}, {"type": "null"},
        {"type": "integer", "minimum": rng.randint(-99, 0), "maximum": rng.randint(0, 500)},
        {"enum": rng.sample(["a", "ab", 'q"', "é", 1, 2.5, None, [1], {"k": "v"}], 3)},
    ])  # fmt: skip
    kind = rng.randint(0, 5) if depth < 3 else 0
    if kind <= 1:
        return leaf
    if kind == 2:
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == 3:
        low = rng.randint(0, 2)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    names = rng.sample(["a", "ab", "ключ", "x y", '"', "\\", "\n", ""], rng.randint(0, 4))
    schema = closed(**{name: random_schema(rng, depth + 1) for name in names})
    return {**schema, "required": [name for name in names if rng.random() < 0.6]}


def random_value(rng, schema):
    """A value that fits one of `random_schema`."""
    if "anyOf" in schema or "enum" in schema:
        one = rng.choice(schema.get("anyOf") or schema["enum"])
        return random_value(rng, one) if "anyOf" in schema else one
    if schema["type"] == "array":
        count = rng.randint(schema["minItems"], schema["maxItems"])
        return [random_value(rng, schema["items"]) for _ in range(count)]
    if schema["type"] == "object":
        return {
            name: random_value(rng, one)
            for name, one in schema["properties"].items()
            if name in schema["required"] or rng.random() < 0.5
        }
    if schema["type"] == "string":
        return "".join(rng.choices('a "\\/\n\té日😀', k=rng.randint(0, schema["maxLength"])))
    if schema["type"] == "integer":
        return rng.randint(schema["minimum"], schema["maximum"])
    return rng.choice([True, False]) if schema["type"] == "boolean" else None


def test_random_schemas(bytewise, smollm):
    rng, ended = random.Random(0), 0
    for seed in range(60):
        schema = random_schema(rng)
        structures = [bytewise, smollm][seed % 2]
        text = walk(structures, schema_format(schema), seed)
        if text is not None:
            jsonschema.validate(json.loads(text), schema)
            ended += 1
        fitting = json.dumps(random_value(rng, schema), ensure_ascii=False)
        assert takes(structures, schema_format(schema), fitting), (schema, fitting)
    assert ended > 45


def test_any_object(any_kind):
    texts = [walk(any_kind, {"type": "json_object"}, seed) for seed in range(8)]
    ended = [json.loads(text) for text in texts if text is not None]
    assert len(ended) >= 4 and all(isinstance(value, dict) for value in ended)
    assert takes(any_kind, {"type": "json_object"}, '{"a": [1, {"b": null}], "c": -1.5e3}')
    for text in ("[]", '{"a":1}', '{"a": 1,"b": 2}', '{ "a": 1}', "{}\n", " {}", '{"a": 01}'):
        assert not takes(any_kind, {"type": "json_object"}, text), text


def test_what_does_not_fit_cannot_be_drawn(smollm):
    def refused(schema, text):
        return not takes(smollm, schema_format(schema), text)

    person = SCHEMAS["flat"][0]
    assert refused(person, '{"name": "x"}') and refused(person, '{"name": "x", "age": 10}')
    assert refused(person, '{"age": 1, "name": "x"}')  # another order than the schema's
    assert refused(person, '{"name": "sevenor", "age": 1}')
    # Under another spelling a name would pass for one that the schema doesn't have.
    named = {"type": "object", "properties": {"k": DIGIT}}
    assert refused(named, '{"\\u006b": "s"}') and refused(named, '{"k": "s"}')
    assert not refused(named, '{"j": "s"}')


def test_drawn_dates_exist(bytewise):
    for seed in range(20):
        date.fromisoformat(json.loads(walk(bytewise, schema_format(SCHEMAS["format"][0]), seed)))


def test_spellings_of_a_schema_and_null(bytewise):
    schema = {"type": "string", "enum": ["a"], "nullable": True}
    for format_ in (schema_format(schema), {"type": "json_schema", "schema": schema}):
        assert takes(bytewise, format_, "null") and takes(bytewise, format_, '"a"')
        assert not takes(bytewise, format_, '"b"')
    named = closed(nullable={"type": "boolean"})  # a property of that name
    assert takes(bytewise, schema_format(named), '{"nullable": true}')


# --- other forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regex",
    ["[a-z]{3,5}", "a|ab|abc", "(a|b)*", "a/b\\.\\d", "(?i)yes", "^x$", "é+😀", "", " +a", '"\n"'],
)
def test_a_regex_matches_all_of_the_text(any_kind, regex):
    format_ = {"type": "regex", "regex": regex}
    for seed in range(3):
        text = walk(any_kind, format_, seed, most=60)
        # llguidance knows digits of a later Unicode than this Python may.
        known = text and "".join("0" if unicodedata.category(c) == "Cn" else c for c in text)
        assert text is None or re.fullmatch(regex, known), text
    for text in ("", "a", "ab", "abc", "abab", "yEs", "x", "éé😀", "a/b.1", "  a", " a", '"\n"'):
        assert takes(any_kind, format_, text) == bool(re.fullmatch(regex, text)), text


def test_a_choice_is_one_of_the_texts(any_kind):
    choices = ["yes", "yes please", "no", 'q"\\\n', " spaced", "日本", "<|im_end|>", ""]
    format_ = {"type": "choice", "choice": choices}
    assert all(takes(any_kind, format_, text) for text in choices)
    others = ["y", "yes ", "spaced", "maybe", "  spaced", "nono"]
    assert not any(takes(any_kind, format_, text) for text in others)
    drawn = {walk(any_kind, format_, seed) for seed in range(12)}
    assert drawn <= set(choices)


def test_a_grammar(any_kind):
    sums = 'start: term ("+" term)*\nterm: /[0-9]{1,2}/ | "(" start ")"'
    format_ = {"type": "grammar", "grammar": sums}
    assert takes(any_kind, format_, "(1+22)+3") and not takes(any_kind, format_, "(1+22+3")
    for seed in range(3):
        text = walk(any_kind, format_, seed, most=80)
        if text is not None:
            assert eval(re.sub(r"\b0+(?=\d)", "", text)) >= 0


def test_stop_tokens_are_the_rows_own_and_come_at_ends_only(bytewise):
    digits = {"type": "regex", "regex": "[0-9]{1,2}"}
    constraint = bytewise.constraint(digits, {ord("7"), 300, 10**6})
    numbers = {ord(c) for c in "012345689"}
    assert allowed(bytewise, constraint) == numbers  # 7 ends a text, so it can't begin one
    constraint.accept(ord("1"))
    assert allowed(bytewise, constraint) == numbers | {ord("7"), 300}
    assert constraint.valid([ord("7"), ord("1")]) == 1 and not constraint.finished
    constraint.accept(ord("2"))
    assert constraint.finished and allowed(bytewise, constraint) == {ord("7"), 300}
    assert constraint.valid([ord("3")]) == 0
    constraint.accept(300)
    assert constraint.finished and constraint.valid([300]) == 0 and constraint.forced() == []


def test_control_tokens_cannot_be_named_by_a_grammar(bytewise):
    names = bytewise.tokenizer.special_tokens
    control = names["<|start_header_id|>"]
    constraint = make(bytewise, {"type": "grammar", "grammar": f'start: "a" | <[{control}]>'})
    assert allowed(bytewise, constraint) == {ord("a")} and constraint.valid([control]) == 0
    text = "<|eot_id|>"  # as text, by its characters
    assert takes(bytewise, {"type": "choice", "choice": [text]}, text)
    with pytest.raises(AssertionError, match=f"token {control} isn't allowed"):
        constraint.accept(control)


@pytest.mark.parametrize(
    "format_, text",
    [
        ({"type": "choice", "choice": ["<think>"]}, "<think>"),
        ({"type": "choice", "choice": ["no", "<think>"]}, "<think>"),
        ({"type": "regex", "regex": "<think>[a-z]+</think> yes"}, "<think>ab</think> yes"),
        ({"type": "grammar", "grammar": 'start: "<think>" /[^<]+/ "</think>"'}, "<think>a</think>"),
        (schema_format({"const": "a <think> b"}), '"a <think> b"'),
        (schema_format({"type": "string"}), '"a <think> b"'),
    ],
)
def test_added_tokens_that_text_may_contain_are_allowed(smollm, format_, text):
    tokenizer = with_user_defined(smollm.tokenizer, "<think>", "</think>")
    assert tokenizer.special_tokens["<think>"] in tokenizer.encode(text, bos=False, eos=False)
    assert takes(GrammarCompiler(tokenizer, tokenizer.n_words), format_, text)


@pytest.mark.parametrize("name", ["nested", "anyOf", "names", "others", "pattern"])
def test_allows_says_what_the_mask_says(any_kind, name):
    """Of every token, along a drawn text."""
    structures, vocab = any_kind, any_kind.vocab_size
    draw = random.Random(name)
    format_ = {"type": "json_schema", "schema": SCHEMAS[name][0]}
    row = structures.constraint(format_, {structures.tokenizer.eos_id})
    for _ in range(25):
        allowed = torch.isfinite(row.mask(torch.zeros(vocab))).nonzero()[:, 0].tolist()
        some = {*draw.choices(range(vocab), k=300), *allowed[:300], structures.tokenizer.eos_id}
        fresh = copy.copy(row)
        fresh._found = None  # what the mask left behind
        assert {i for i in some if fresh.allows(i)} == some & {*allowed}
        if row.finished:
            break
        row.accept(draw.choice(allowed))
        if row._ended:
            break


def test_accept_refuses_what_the_mask_does(bytewise):
    format_ = {"type": "choice", "choice": ["yes"]}
    for wrong in (ord("n"), min(bytewise.tokenizer.stop_tokens), bytewise.vocab_size, -1):
        constraint = make(bytewise, format_)
        assert constraint.valid([wrong]) == 0
        with pytest.raises(AssertionError, match=f"token {wrong} "):
            constraint.accept(wrong)


def test_rows_of_one_format_go_on_by_themselves(bytewise):
    a, b = (make(bytewise, {"type": "choice", "choice": ["ab", "cd"]}) for _ in range(2))
    a.accept(ord("a"))
    assert allowed(bytewise, a) == {ord("b")} and allowed(bytewise, b) == {ord("a"), ord("c")}
    for i in range(200):  # more than are kept
        assert takes(bytewise, {"type": "choice", "choice": [str(i)]}, str(i))
    assert len(bytewise._compiled) <= 64


def test_forced_tokens_are_as_the_tokenizer_writes_them(any_kind):
    constraint = make(any_kind, schema_format(closed(name={"enum": ["getter", "x"]})))
    text = '{"name": "'
    whole = any_kind.tokenizer.encode(text + "x", bos=False, eos=False)
    forced = constraint.forced()
    assert forced and forced == whole[: len(forced)]
    assert text.startswith(any_kind.tokenizer.decode(forced))
    for token in forced:
        constraint.accept(token)


def test_proposals_are_valid_as_far_as_masks_allow_them(smollm, spm):
    """In any spelling: byte by byte, as the tokenizer has it, with a wrong token somewhere."""
    rng = random.Random(0)
    for name, (schema, values) in SCHEMAS.items():
        for structures in (smollm, spm):
            tokenizer = structures.tokenizer
            table = {b: i for i, b in reversed([*enumerate(tokenizer._codec.token_bytes)])}
            text = json.dumps(rng.choice(values), ensure_ascii=False)
            bytewise = [table.get(bytes([b]), 0) for b in text.encode()]
            spelled = tokenizer.encode(text, bos=False, eos=False)
            for ids in (bytewise, spelled, spelled[:2] + bytewise, [*spelled[:-1], 300, 5]):
                constraint, count = make(structures, schema_format(schema)), 0
                said = constraint.valid(ids)
                while count < len(ids) and ids[count] in allowed(structures, constraint):
                    constraint.accept(ids[count])
                    count += 1
                assert said == count, name


# --- tools ---------------------------------------------------------------------------------------


def shout(text: str, times: int | None = None) -> str:
    """Shout.

    Args:
        text: what.
        times: how often.
    """


TREE = {
    "name": "tree",
    "description": "Plant.",
    "parameters": {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "$defs": {"node": closed(v=DIGIT, next={"anyOf": [{"$ref": "#/$defs/node"}, DIGIT]})},
    },
}


def test_a_tool_call(smollm):
    schemas, _ = split_tools([shout, TREE, {"name": "now", "description": "The time."}])
    before = copy.deepcopy(schemas)
    format_ = tool_call_format(schemas)
    for text in (
        '{"name": "shout", "parameters": {"text": "hi"}}',
        '{"name": "shout", "parameters": {"text": "hi", "times": 3}}',
        '{"name": "shout", "parameters": {"text": "hi", "times": null}}',
        '{"name": "tree", "parameters": {"root": {"v": 1, "next": {"v": 2, "next": 3}}}}',
        '{"name": "now", "parameters": {}}',
    ):
        assert takes(smollm, format_, text), text
        assert parse_tool_calls(text, [shout, TREE, schemas[2]]).calls
    for text in (
        '{"name": "shout", "parameters": {}}',
        '{"name": "shout", "parameters": {"text": "hi", "loud": 1}}',
        '{"name": "now", "parameters": {"text": "hi"}}',
        '{"name": "tree", "parameters": {"root": 1}}',
        '{"name": "other", "parameters": {}}',
        '{"name": "now"}',
        "hello",
    ):
        assert not takes(smollm, format_, text), text
    ended = [text for seed in range(12) if (text := walk(smollm, format_, seed))]
    assert len(ended) > 5
    for text in ended:
        assert len(parse_tool_calls(text, [shout, TREE, schemas[2]]).calls) == 1, text
    assert schemas == before
    with pytest.raises(ValueError, match="at least one tool"):
        tool_call_format([])


# --- what is refused -----------------------------------------------------------------------------

NODE: dict = {}
NODE["self"] = NODE


@pytest.mark.parametrize(
    "format_, named",
    [
        ({}, "the type None.*json_schema"),
        ({"type": "json"}, "'json'.*one of json_object"),
        ({"type": ["regex"]}, "type"),
        ({"type": "regex"}, "regex.*must be a text, not None"),
        ({"type": "regex", "regex": 5}, "must be a text, not 5"),
        ({"type": "regex", "regex": "(a"}, "regex: unclosed group"),
        ({"type": "regex", "regex": "a(?=b)"}, "regex: look-around"),
        ({"type": "regex", "regex": "\\bfoo"}, "regex: .*lookarounds"),
        ({"type": "regex", "regex": "(a)\\1"}, "regex: backreferences"),
        ({"type": "regex", "regex": "a", "flags": "i"}, "no 'flags': take that out"),
        ({"type": "regex", "regex": "\ud800"}, "surrogate"),
        ({"type": "choice", "choice": []}, "a list of texts"),
        ({"type": "choice", "choice": "yes"}, "a list of texts"),
        ({"type": "choice", "choice": ["a", 1]}, "a list of texts"),
        ({"type": "choice", "choice": ["a\x01b"]}, "control character"),
        ({"type": "choice", "choice": ["\x7f"]}, "control character"),
        ({"type": "grammar", "grammar": "nonsense"}, "grammar: .*Expected"),
        ({"type": "grammar", "grammar": 'start: "a" b'}, "unknown name"),
        ({"type": "grammar", "grammar": "start: <|eot_id|>"}, "unknown special token"),
        ({"type": "json_object", "schema": {}}, "no 'schema'"),
        ({"type": "json_schema"}, "'schema' must be a JSON schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "a JSON schema {...}, not None"),
        ({"type": "json_schema", "json_schema": {"schema": {}}, "schema": {}}, "leave one out"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1.5}}, "true or false"),
        ({"type": "json_schema", "schema": NODE}, "can't be written as JSON"),
        ({"type": "json_schema", "schema": {"enum": [float("nan")]}}, "can't be written as JSON"),
        ({"type": "json_schema", "schema": {"type": "text"}}, "Invalid type: text"),
        ({"type": "json_schema", "schema": {"$ref": "#/no"}}, "'/no' does not exist"),
        ({"type": "json_schema", "schema": {"enum": []}}, "Unsatisfiable"),
        ({"type": "json_schema", "schema": {"enum": ["a\x01"]}}, "control character"),
        ({"type": "json_schema", "schema": {"properties": {"\x7f": {}}}}, "control character"),
        ({"type": "json_schema", "schema": {"enum": ["\ud800"]}}, "json_schema: "),
        ({"type": "json_schema", "schema": {"type": "object", "minProperties": 1}}, "minProp"),
        ({"type": "json_schema", "schema": {"format": "nonsense", "type": "string"}}, "nonsense"),
        *(({"type": "json_schema", "schema": {"format": form, "type": "string"}}, form)
          for form in ("ipv4network", "ipv6interface", "multi-host-uri", "json-string")),
        ({"type": "json_schema", "schema": {"pattern": "(", "type": "string"}}, "unclosed"),
        ({"type": "json_schema", "schema": {"minimum": 3, "maximum": 1, "type": "integer"}},
         "minimum .3. is greater"),
        ({"type": "json_schema", "schema": {"minimum": -1e20, "type": ["integer", "null"]}},
         "the bound -1e\\+20 of integers must lie within 2.63"),
        *(({"type": "json_schema", "schema": {"type": "number", **bounds}}, f"without {n} itself")
          for n, bounds in ((0, {"exclusiveMinimum": 0, "maximum": 0.5}),
                            (1, {"exclusiveMinimum": 1, "exclusiveMaximum": 1.25}),
                            (-1, {"minimum": -1.5, "exclusiveMaximum": -1}),
                            (0, {"minimum": -0.5, "exclusiveMaximum": 0}))),
        ({"type": "json_schema", "schema": {"items": [{}], "type": "array"}}, "prefixItems"),
        ({"type": "json_schema", "schema": {"properties": 0.5}}, "'properties' must be an object"),
        ({"type": "json_schema", "schema": {"required": 5}}, "json_schema"),
        ({"type": "json_schema", "schema": {"required": ["a"], "additionalProperties": False,
                                            "type": "object"}}, "'a' is unsatisfiable"),
    ],
    ids=lambda value: json.dumps(value, default=repr)[:60] if value.__class__ is dict and
    value.get("schema") is not NODE else "",
)  # fmt: skip
def test_bad_formats_are_named(bytewise, format_, named):
    with pytest.raises(ValueError, match=named) as caught:
        make(bytewise, format_)
    assert "\n" not in str(caught.value) and "response_format" in str(caught.value)


@pytest.mark.parametrize(
    "keyword",
    ["uniqueItems", "not", "contains", "if", "propertyNames", "x-guidance", "maxLen"],
)
def test_keywords_that_would_not_be_kept_are_refused(bytewise, keyword):
    inner = {"type": "array", keyword: {}}
    for schema in (inner, closed(a=inner), {"anyOf": [inner]}, {"$defs": {"d": inner}}):
        with pytest.raises(ValueError, match=f"{keyword}"):
            make(bytewise, schema_format(schema))


def test_references_in_a_tools_schema_with_an_id_are_its_own(bytewise):
    schema = closed(p={"$ref": "#/$defs/P"}) | {"$id": "https://x.org/s", "$defs": {"P": DIGIT}}
    format_ = tool_call_format(split_tools([{"name": "f", "parameters": schema}])[0])
    assert takes(bytewise, format_, '{"name": "f", "parameters": {"p": 1}}')


def test_strict_schemas_have_no_other_properties(bytewise):
    opened = {"type": "object", "properties": {"k": DIGIT}}
    noted = {**opened, "additionalProperties": DIGIT}
    parts = {"allOf": [opened, {"type": "object", "properties": {"j": DIGIT}}]}
    for schema in (opened, {"type": "array", "items": opened}, {"anyOf": [SHORT, opened]},
                   closed(a=opened), {"$defs": {"o": opened}, "$ref": "#/$defs/o"}):  # fmt: skip
        outer = {"type": "array"}.items() <= schema.items(), "a" in schema.get("properties", {})
        for key, fits_strictly in (("k", True), ("j", False)):
            text = f'{{"{key}": 1}}'
            text = f"[{text}]" if outer[0] else f'{{"a": {text}}}' if outer[1] else text
            assert spells(bytewise, schema_format(schema), text)
            assert spells(bytewise, schema_format(schema, True), text) == fits_strictly
    assert spells(bytewise, schema_format(noted, True), '{"k": 1, "x": 2}')
    assert spells(bytewise, schema_format(parts, True), '{"k": 1, "j": 2}')


def test_strict_schemas_leave_parts_that_belong_together_open(bytewise):
    base = {"type": "object", "properties": {"k": DIGIT}, "required": ["k"]}
    more = {"type": "object", "properties": {"j": DIGIT}, "required": ["j"]}
    ref, defs = {"$ref": "#/$defs/b"}, {"$defs": {"b": base, "m": more}}
    for schema in (
        {"allOf": [ref, more], **defs}, {**base, "anyOf": [{"$ref": "#/$defs/m"}], **defs},
        {**base, "anyOf": [more, {"properties": {"i": DIGIT}, "required": ["i"]}]},
    ):  # fmt: skip
        assert takes(bytewise, schema_format(schema, True), '{"k": 1, "j": 2}')
    for schema in ({"allOf": [ref], **defs}, {"anyOf": [ref, more], **defs}):
        assert takes(bytewise, schema_format(schema, True), '{"k": 1}')
        assert not takes(bytewise, schema_format(schema, True), '{"k": 1, "x": 2}')


def spells(structures, format_, text):
    constraint = make(structures, format_)
    ids = list(text.encode())
    return constraint.valid(ids) == len(ids)


COSTLY = {
    "a large multiple": schema_format({"type": "integer", "multipleOf": 100_000_007}),
    "intersections": {
        "type": "grammar",
        "grammar": "start: T\nT: " + " & ".join(f"/([ab]{{{n}}})*/" for n in (101, 103, 107, 109)),
    },
}


@pytest.mark.parametrize("name", COSTLY)
def test_formats_that_take_too_long_to_compile_are_refused(bytewise, name):
    """Each would take at least minutes; the limit is on CPU time, so that load doesn't matter."""
    with pytest.raises(ValueError, match="compiling it takes more than 2 s or 2048 MB: simplify"):
        make(bytewise, COSTLY[name])


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "format_, message",
    [
        (schema_format(nested(200)), "json_schema: it is nested more than 100 levels deep"),
        ({"type": "regex", "regex": "a" * 300_000}, "it has 300,0.. characters, and the limit is"),
        ({"type": "grammar", "grammar": "#" * 300_000}, "grammar: it has 300,0.. characters"),
        ({"type": "choice", "choice": ["x" * 9] * 30_000}, "choice: it has 3.0,0.. characters"),
        (schema_format({"const": "x" * 300_000}), "json_schema: it has 300,... characters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats_that_are_too_large_are_refused(bytewise, format_, message):
    with pytest.raises(ValueError, match=message):
        make(bytewise, format_)


def test_brackets_in_texts_are_not_levels(bytewise):
    assert make(bytewise, {"type": "choice", "choice": ['["' * 200, "[\\" * 200]})
    assert make(bytewise, schema_format(nested(90)))


def test_a_grammar_without_an_end_says_so(bytewise):
    """However a grammar goes wrong on the way, it isn't by a mask that allows nothing."""
    constraint = make(bytewise, {"type": "grammar", "grammar": 'start: x\nx: "a" x'})
    with pytest.raises(ValueError, match="response_format: .*Too many items.*simplify"):
        for _ in range(9):
            allowed(bytewise, constraint)
            constraint.accept(ord("a"))


def test_without_the_package(bytewise, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match="needs llguidance: pip install llguidance"):
        GrammarCompiler(bytewise.tokenizer, 512)


def test_logits_may_be_of_any_dtype(bytewise):
    constraint = make(bytewise, {"type": "choice", "choice": ["a"]})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        masked = constraint.mask(torch.ones(bytewise.vocab_size, dtype=dtype))
        assert masked.dtype == dtype and masked.isfinite().nonzero().tolist() == [[ord("a")]]


# --- generation ----------------------------------------------------------------------------------

FORMATS = [
    {"type": "json_schema", "schema": closed(id=DIGIT, name=SHORT)},
    None,
    {"type": "choice", "choice": ["yes", "no", "yes and no"]},
    {"type": "regex", "regex": "[a-c]{2,6}(x|y)"},
]
WILD = SamplingParams(temperature=1.5, top_p=1.0)


def fits(text: str, format_) -> bool:
    if format_ is None:
        return True
    if format_["type"] == "choice":
        return text in format_["choice"]
    if format_["type"] == "regex":
        return re.fullmatch(format_["regex"], text) is not None
    jsonschema.validate(json.loads(text), format_["schema"])
    return True


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("speculate", ["off", "lookup", "draft"])
def test_rows_with_formats_of_their_own(tiny, speculate, temperature):
    """A random model, whose own text would never fit: batched, streamed, guessed, alone."""
    llama = Llama(tiny.model, tiny.tokenizer, draft=tiny.model)
    prompts = ["a", "bcd", "yes and yes and", "acacac"]
    options = dict(params=replace(WILD, temperature=temperature), max_gen_len=100)
    found = llama.text_completion(
        prompts, **options, n=3, seed=7, response_format=FORMATS, speculate="off"
    )
    texts = [prediction["generation"] for prediction in found]
    for i, prediction in enumerate(found):
        if FORMATS[i // 3]:
            assert prediction["finish_reason"] == "stop" and fits(texts[i], FORMATS[i // 3])
    options |= {"speculate": speculate}
    streamed = [""] * 12
    for event in llama.stream_text(prompts, **options, n=3, seed=7, response_format=FORMATS):
        streamed[3 * event.row + event.sample] += event.text
    assert streamed == texts
    for i, (prompt, format_) in enumerate(zip(prompts, FORMATS, strict=True)):
        alone = llama.text_completion([prompt], **options, n=3, seed=7, response_format=format_)
        assert [one["generation"] for one in alone] == texts[3 * i : 3 * i + 3]
    free = llama.text_completion(["bcd"], **options, seed=7)[0]
    assert free["generation"] == texts[3]  # its neighbours' formats don't touch a row


def test_what_is_cut_off_is_the_beginning_of_a_text_that_fits(tiny):
    format_ = {"type": "json_schema", "schema": {"type": "array", "items": {"const": "abc"},
                                                 "minItems": 4, "maxItems": 4}}  # fmt: skip
    whole = json.dumps(["abc"] * 4)
    for n in range(len(whole) + 2):
        [found] = tiny.text_completion(["x"], 0, max_gen_len=n, response_format=format_)
        assert found["generation"] == whole[:n]
        assert found["finish_reason"] == ("stop" if n >= len(whole) else "length")


def test_logprobs_are_the_models_own(tiny):
    format_ = {"type": "choice", "choice": ["abcabc"]}
    for speculate in ("off", "lookup"):
        [found] = tiny.text_completion(
            ["abcabcab"], 0, max_gen_len=20, response_format=format_, logprobs=True,
            top_logprobs=2, speculate=speculate,
        )  # fmt: skip
        scored = tiny.text_completion(
            ["abcabcababcabc"], 0, max_gen_len=0, echo=True, logprobs=True
        )[0]
        assert found["tokens"] == [*"abcabc"] and len(found["top_logprobs"]) == 6
        assert np.allclose(found["logprobs"], scored["logprobs"][-6:], atol=1e-4)


def test_forced_tokens_take_few_passes(tiny, monkeypatch):
    """Where a format leaves no choice, guesses are right."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, proposals: 8)  # whatever it costs
    format_ = {"type": "regex", "regex": "(one|two) of them and all that belongs to it, no more"}
    [found] = tiny.text_completion(
        ["x"], 0, max_gen_len=100, response_format=format_, speculate="lookup"
    )
    counts = found["speculation"]
    assert counts["accepted"] == counts["proposed"] > 20
    assert counts["passes"] < len(found["generation"]) - 20


def test_bans_give_way_to_the_format(tiny):
    """What the parameters rule out comes where nothing else would fit."""
    params = SamplingParams(temperature=0, banned_tokens=[ord("a")])
    for choice, expected in ((["ab", "cd"], "cd"), (["ab"], "ab")):
        format_ = {"type": "choice", "choice": choice}
        [found] = tiny.text_completion(["x"], params=params, max_gen_len=9, response_format=format_)
        assert found["generation"] == expected


def test_two_ranks_and_errors_on_all_of_them(tmp_path):
    """The rank that draws follows the format; what goes wrong there ends all ranks."""
    path = write_checkpoint(tmp_path / "tiny", TINY)
    report = run_ranks(2, "structured", tmp_path / "out.json", ckpt=str(path), formats=FORMATS)
    for text, format_ in zip(report["texts"], FORMATS, strict=True):
        assert fits(text, format_)
    assert report["all_ranks"][0] == report["all_ranks"][1] == report["texts"]
    assert report["errors"][0] == "no" and "rank 0" in report["errors"][1]


def test_a_call_can_be_required(tiny, tiny_dir):
    """Of a random model too: the answer is a call, parsed, whose arguments fit."""
    roomy = Llama.build(tiny_dir, max_seq_len=4096, device="cpu", dtype="fp32")
    llama = Llama(roomy.model, tiny.tokenizer, Llama31Format(tiny.tokenizer))

    def weather(city: str, days: int) -> str:
        """The weather.

        Args:
            city: where.
            days: how many.
        """
        raise AssertionError("never run")

    clock = {"name": "clock", "parameters": closed(zone={"enum": ["utc", "cet"]})}
    dialog = [{"role": "user", "content": "?"}]
    options = dict(tools=[weather, clock], max_gen_len=100, params=WILD)
    seen = set()
    for seed in range(6):
        for choice in ("required", "clock"):
            [found] = llama.chat_completion([dialog], **options, seed=seed, tool_choice=choice)
            if found["finish_reason"] == "length":  # weather's city may be of any length
                assert choice == "required"
                continue
            [call] = found["generation"]["tool_calls"]
            seen.add((choice, call["name"]))
            if call["name"] == "clock":
                assert call["arguments"]["zone"] in ("utc", "cet")
    assert {("clock", "clock"), ("required", "clock")} <= seen
    text = "".join(
        event.text for event in llama.stream_chat([dialog], **options, seed=0, tool_choice="clock")
    )
    assert json.loads(text)["name"] == "clock"


def test_several_calls_where_they_are_allowed(bytewise):
    tools = [{"name": "f", "parameters": closed(a=DIGIT)}, {"name": "g"}]
    one = '{"name": "f", "parameters": {"a": 1}}'
    schemas, _ = split_tools(tools)
    for text, parallel in ((one, None), (f"[{one}, {one}]", True), (f"[{one}]", False)):
        for allowed_ in (True, False):
            format_ = tool_call_format(schemas, allowed_)
            expected = parallel is None or (parallel and allowed_)
            assert spells(bytewise, format_, text) == expected
    assert [call["name"] for call in parse_tool_calls(f"[{one}, {one}]", tools).calls] == ["f"] * 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"response_format": "json"}, "a dict, like"),
        ({"response_format": ["json_object"]}, "a dict, like"),
        ({"response_format": SamplingParams}, "a dict, like"),
        ({"response_format": [None, None]}, "2 response formats for 1 prompts"),
        ({"response_format": {"type": "xml"}}, "has the type 'xml'"),
        ({"response_format": {"type": "json_object"}, "stop_tokens": set()}, "needs stop_tokens"),
    ],
)
def test_mistakes_of_a_call_are_named(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.text_completion(["a"], **options)


@pytest.mark.parametrize("choice", ["none", "brave_search"])
def test_tool_choices_that_cannot_be(tiny, choice):
    clock = {"name": "clock", "description": "Tells.", "parameters": closed()}
    dialog, format_ = [{"role": "user", "content": "?"}], {"type": "json_object"}
    tiny = Llama(tiny.model, tiny.tokenizer, Llama31Format(tiny.tokenizer))
    with pytest.raises(ValueError, match="'required' or one of the tools .clock."):
        tiny.chat_completion([dialog], tools=["brave_search", clock], tool_choice=choice)
    with pytest.raises(ValueError, match="choose one"):
        tiny.chat_completion(
            [dialog], tools=[clock], tool_choice="required", response_format=format_
        )
