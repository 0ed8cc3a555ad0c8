"""Answers of a given form: which tokens may come next, so that the text fits a schema or grammar.

A response format is a dict, of one of these types:

    {"type": "json_object"}                              any JSON object
    {"type": "json_schema", "json_schema": {"schema": {...}}}   OpenAI's spelling; what else is
        in the inner dict ("name", "strict", "description") changes nothing
    {"type": "json_schema", "schema": {...}}             the same
    {"type": "regex", "regex": "..."}                    a text that all of the expression matches
    {"type": "choice", "choice": ["yes", "no"]}          one of these texts
    {"type": "grammar", "grammar": "start: ..."}         a grammar as Lark writes it

JSON is written as json.dumps does, ensure_ascii=False: ", " and ": ", no other white space, the
properties in the schema's order. llguidance does the parsing; what it can't do is an error.
"""

import json
import re
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Sequence, Set

import numpy as np
import torch

from llama.text.tools import Tool, plain_json, split_tools
from llama.tokenizer import Tokenizer

ResponseFormat = Mapping[str, Any]

_KEYS = {"json_object": "", "json_schema": "schema", "regex": "regex", "choice": "choice",
         "grammar": "grammar"}  # fmt: skip
_JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # Without u: with it, a name could be spelled so that it passes for another one.
    "json_allowed_escapes": '"\\bfnrt',
}
_CACHED = 64  # compiled formats

# Keywords by what they hold. llguidance knows more, passes over those it doesn't know, and takes
# options from "x-guidance"; so all others are refused here.
_ONE = {"additionalProperties", "items"}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}
_VALUES = {
    "$ref", "type", "enum", "const", "required", "minProperties", "maxProperties", "minItems",
    "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$schema", "$id", "$comment", "title",
    "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly",
}  # fmt: skip


class Structures:
    """What it takes to constrain a tokenizer's ids. Made once: it sorts the whole vocabulary.

    Args:
        vocab_size: length of the model's logits. Ids that the tokenizer doesn't have never come.

    Raises:
        ValueError: llguidance isn't installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        try:
            import llguidance
        except ImportError:
            raise ValueError(
                "response_format needs llguidance: pip install -e '.[structured]'"
            ) from None
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.library: Any = llguidance.LLMatcher
        known = min(tokenizer.n_words, vocab_size)
        special = set(tokenizer.special_tokens.values())
        texts = [b"" if i in special else tokenizer.decode_bytes([i]) for i in range(known)]
        texts += [b""] * (vocab_size - known)  # a token without bytes is never allowed
        self.ordinary = np.array([len(text) > 0 for text in texts], dtype=bool)
        # At the beginning of a text SentencePiece's tokens say nothing of their first space. There,
        # further ids, beyond the model's, stand for what they say then.
        starts = tokenizer._codec.word_starts
        self.starts = np.array(sorted(i for i in starts if i < known), dtype=np.int64)
        self.at_start = {int(i): vocab_size + n for n, i in enumerate(self.starts)}
        self.blank = np.array([i for i in self.starts if len(texts[i]) == 1], dtype=np.int64)
        texts += [texts[i][1:] for i in self.starts]
        # The end has an id of its own, since a row's stop tokens are its own.
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(self, [*texts, b"<end>"]))
        self.trie: Any = llguidance.LLTokenizer(wrapped)
        self._compiled: Dict[str, Any] = {}

    def constraint(self, response_format: ResponseFormat, stop_tokens: Set[int]) -> "Constraint":
        """Where a row stands that is to have this form and may end with these ids.

        Raises:
            ValueError: not a response format, or one that can't be kept; says which and why.
        """
        if not stop_tokens:
            raise ValueError("response_format needs stop_tokens, one at least: they end the text")
        format_ = plain_json(dict(response_format), "response_format")
        key = json.dumps(format_)
        if key not in self._compiled:
            kind = _check(format_)
            matcher = self.library(self.trie, _grammar(self.library, format_), log_level=0)
            first = Constraint(self, matcher, stop_tokens)
            if not (matcher.is_error() or first._allowed().any() or matcher.is_accepting()):
                _refuse(kind, "no text fits it")
            if matcher.is_error():
                _refuse(kind, _reason(matcher.get_error()))
            if len(self._compiled) >= _CACHED:
                del self._compiled[next(iter(self._compiled))]  # the oldest
            self._compiled[key] = matcher
        return Constraint(self, self._compiled[key].deep_copy(), stop_tokens)


class Constraint:
    """Where one row stands in its grammar. Made by `Structures.constraint`."""

    def __init__(self, structures: Structures, matcher: Any, stop_tokens: Set[int]):
        self._of, self._matcher = structures, matcher
        self._stops = frozenset(i for i in stop_tokens if 0 <= i < structures.vocab_size)
        self._stop_ids = np.array(sorted(self._stops), dtype=np.int64)
        self._words = np.empty((structures.trie.vocab_size + 31) // 32, dtype=np.int32)
        self._found: Optional[np.ndarray] = None
        self._begun = self._ended = False

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (vocab_size,), with -inf for what isn't allowed, stop tokens but at an end too.

        Raises:
            ValueError: the grammar takes too much to follow, or no token can go on.
        """
        allowed = self._allowed().copy()
        ends = self._matcher.is_accepting() or self._ended
        if self._matcher.is_error() or not (ends or allowed.any()):
            why = _reason(self._matcher.get_error()) or "no token can go on from here"
            raise ValueError(f"response_format: {why}; simplify it")
        allowed[self._stop_ids] = ends
        banned = torch.from_numpy(~allowed).to(logits.device)
        return logits.masked_fill(banned, -torch.inf)

    def allows(self, token: int) -> bool:
        """Whether a token may come next: what `mask` says of it, without the mask."""
        if self._ended:
            return False
        if token in self._stops:
            return self._matcher.is_accepting()
        if not 0 <= token < self._of.vocab_size or not self._of.ordinary[token]:
            return False
        if self._found is not None or (self._of.at_start and not self._begun):
            return bool(self._allowed()[token])
        forced = self._spelled(self._matcher, self._begun)
        return self._follows(self._matcher, forced, token)

    def accept(self, token: int) -> None:
        """Go on by a token that was drawn; a stop token ends the text."""
        assert self.allows(token), f"token {token} isn't allowed here"
        if token in self._stops:
            self._ended = True
        else:
            self._matcher.consume_tokens(self._ids(token, self._begun))
            self._begun = True
        self._found = None

    @property
    def finished(self) -> bool:
        """Whether the text is complete: nothing but a stop token can follow."""
        # The library itself sometimes notices only as it looks for the tokens that can follow.
        return self._ended or (self._matcher.is_accepting() and not self._allowed().any())

    def forced(self) -> List[int]:
        """Tokens that spell what must follow; often none."""
        ids = [] if self._ended else self._spelled(self._matcher, self._begun)
        return ids[: self.valid(ids)]

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, could follow one after another."""
        if self._ended or not len(tokens):
            return 0
        ahead, begun = self._matcher, self._begun
        for count, token in enumerate(tokens):
            if count == 0:
                if not self.allows(token):
                    return 0
                if len(tokens) == 1 or token in self._stops:
                    return 1
                ahead = ahead.deep_copy()
            elif token in self._stops:
                return count + int(ahead.is_accepting())
            elif not 0 <= token < self._of.vocab_size or not self._of.ordinary[token]:
                return count
            else:
                if not self._follows(ahead, self._spelled(ahead, begun), token):
                    return count
            ahead.consume_tokens(self._ids(token, begun))
            begun = True
        return len(tokens)

    @staticmethod
    def _follows(matcher: Any, forced: List[int], token: int) -> bool:
        """What the matcher's mask says of an ordinary token: of forced text, one spelling only."""
        return (not forced or forced[0] == token) and matcher.validate_tokens([token]) == 1

    def _spelled(self, matcher: Any, begun: bool) -> List[int]:
        """What must follow in the tokenizer's own spelling, the only one that a mask allows."""
        ids: List[int] = matcher.compute_ff_tokens()
        if not ids or begun or not self._of.at_start:
            return ids
        tokenizer = self._of.tokenizer
        own = tokenizer.encode(tokenizer.decode(ids), bos=False, eos=False)
        texts = [tokenizer.decode_bytes(spelling) for spelling in (own, ids)]
        return own if own and texts[0].removeprefix(b" ") == texts[1] else ids

    def _ids(self, token: int, begun: bool) -> List[int]:
        """The library's ids for a token: none for one that says nothing at the beginning."""
        if begun:
            return [token]
        return [] if token in self._of.blank else [self._of.at_start.get(token, token)]

    def _allowed(self) -> np.ndarray:
        """Whether each token can follow (vocab_size,), stop tokens aside."""
        size = self._of.vocab_size
        if self._ended:
            return np.zeros(size, dtype=bool)
        if self._found is None:
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            bits = np.unpackbits(self._words.view(np.uint8), bitorder="little").view(bool)
            # Lark can name ids: no control token even so.
            self._found = bits[:size] & self._of.ordinary
            if self._of.at_start and not self._begun:
                forced = self._spelled(self._matcher, False)
                self._found[self._of.starts] = bits[size : size + len(self._of.starts)]
                self._found[self._of.blank] = self._found.any()
                if forced:
                    self._found[:] = False
                    self._found[forced[0]] = True
            self._found[self._stop_ids] = False
        return self._found


class _Vocabulary:
    """A vocabulary as llguidance takes it."""

    bos_token_id = None

    def __init__(self, structures: Structures, tokens: List[bytes]):
        self.tokens, self.eos_token_id = tokens, len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]
        self._tokenizer, self._prefixed = structures.tokenizer, bool(structures.at_start)

    def __call__(self, text: str | bytes) -> List[int]:
        """The tokenizer's ids of text that goes on from other text."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        if not self._prefixed:
            return self._tokenizer.encode(text, bos=False, eos=False)
        ids = self._tokenizer.encode("\n" + text, bos=False, eos=False)
        before = next(n for n in range(1, len(ids) + 1) if self._tokenizer.decode(ids[:n]))
        return ids[before:]


def call_format(
    tools: Optional[Sequence[Tool]], tool_choice: str, options: Mapping[str, Any]
) -> Any:
    """The format of a call of any of the tools ("required"), or of the one of that name; for "auto"
    what the options say, which may be one for each prompt or none.

    Raises:
        ValueError: no such tool, or one without a schema; another format among the options.
    """
    given = options.get("response_format")
    if tool_choice == "auto":
        return given
    if given is not None:
        raise ValueError(f"tool_choice={tool_choice!r} and response_format: choose one")
    schemas, _ = split_tools(tools or [])
    names = [schema["function"]["name"] for schema in schemas]
    if tool_choice != "required":
        schemas = [schema for schema in schemas if schema["function"]["name"] == tool_choice]
    if not schemas:
        known = ", ".join(names) or "none"
        raise ValueError(
            f"tool_choice={tool_choice!r}: 'auto', 'required' or one of the tools ({known}); "
            "built-in ones have no schema"
        )
    return tool_call_format(schemas)


def tool_call_format(schemas: Sequence[Dict[str, Any]]) -> ResponseFormat:
    """The format of one call of one of these tools: {"name": ..., "parameters": {...}}.

    A tool whose schema doesn't say otherwise takes the parameters it names and no others.

    Args:
        schemas: as `llama.text.tools.split_tools` returns them.
    """
    if not schemas:
        raise ValueError("tool_call_format takes at least one tool")
    calls = []
    for i, schema in enumerate(schemas):
        tool = schema["function"]
        taken = {"type": "object", **plain_json(tool.get("parameters") or {}, tool["name"])}
        if not taken.keys() & (_LISTS | {"$ref", "patternProperties"}):
            taken.setdefault("additionalProperties", False)
        taken = _plain_schema(taken, tool["name"], f"#/anyOf/{i}/properties/parameters")
        call = {"name": {"const": tool["name"]}, "parameters": taken}
        calls.append({"type": "object", "properties": call, "required": [*call],
                      "additionalProperties": False})  # fmt: skip
    return {"type": "json_schema", "schema": {"anyOf": calls}}


def _check(format_: Dict[str, Any]) -> str:
    """The type of a response format that is well formed but for its schema or grammar."""
    kind = format_.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"response_format has the type {kind!r}: it is one of {', '.join(_KEYS)}")
    if kind == "json_schema" and isinstance(format_.get("json_schema"), dict):
        if "schema" in format_:
            _refuse(kind, "it has both 'schema' and 'json_schema': leave one out")
        format_["schema"] = format_.pop("json_schema").get("schema")
    if re.search("[\ud800-\udfff]", json.dumps(format_, ensure_ascii=False)):
        _refuse(kind, "it has half of a surrogate pair")
    key = _KEYS[kind]
    extra = format_.keys() - {"type", key}
    if extra:
        _refuse(kind, f"it has no {min(extra)!r}: take that out")
    value = format_.get(key)
    types = {"schema": (dict, "a JSON schema {...}"), "choice": (list, "a list of texts")}
    type_, said = types.get(key, (str, "a text"))
    wrong = bool(key) and not isinstance(value, type_)
    if key == "choice":
        wrong = wrong or not value or not all(isinstance(one, str) for one in value)
    if wrong:
        _refuse(kind, f"its {key!r} is to be {said}, not {value!r}")
    return kind


def _grammar(library: Any, format_: Dict[str, Any]) -> str:
    """The library's grammar of a response format that was checked."""
    kind = format_["type"]
    if kind == "regex":
        return library.grammar_from_regex(format_["regex"])
    if kind == "grammar":
        return library.grammar_from_lark(format_["grammar"])
    if kind == "choice":
        # A single terminal, so that one choice may begin with another.
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in format_["choice"])
        return library.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    schema = _plain_schema(format_.get("schema", {"type": "object"}), f"response_format {kind}")
    return library.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)


def _plain_schema(schema: Any, where: str, base: str = "#") -> Any:
    """A copy that says in llguidance's keywords what this one does, as it stands at a pointer."""
    if not isinstance(schema, dict):
        return schema
    unknown = schema.keys() - _ONE - _LISTS - _NAMED - _VALUES - {"nullable"}
    if unknown:
        raise ValueError(f"{where}: the keyword {min(unknown)!r} isn't supported: take it out")
    required, least = schema.get("required", []), schema.get("minProperties", 0)
    if isinstance(required, list) and isinstance(least, int) and least > len(required):
        # A name may come twice among those that aren't listed.
        raise ValueError(f"{where}: minProperties isn't supported beyond the required ones")
    names = [schema.get("enum"), schema.get("const"), [*schema.get("properties", ())]]
    texts = json.dumps(names, ensure_ascii=False).replace("\\\\", "")
    if "\\u" in texts or "\x7f" in texts:  # llguidance would leave them out
        raise ValueError(f"{where}: a name, const or enum has a control character: take it out")

    def plain(value: Any) -> Any:
        return _plain_schema(value, where, base)

    copy = dict(schema)
    for key, value in schema.items():
        if key in _ONE:
            if isinstance(value, list):
                raise ValueError(f"{where}: {key!r} is a list: write 'prefixItems' instead")
            copy[key] = plain(value)
        elif key in _LISTS and isinstance(value, list):
            copy[key] = [plain(one) for one in value]
        elif key in _NAMED and isinstance(value, dict):
            copy[key] = {name: plain(one) for name, one in value.items()}
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            copy[key] = base + value[1:]
    if copy.pop("nullable", False) is True:  # of OpenAPI, and of llama.tools
        outer = {key: copy.pop(key) for key in ("$defs", "definitions") if key in copy}
        copy = {**outer, "anyOf": [copy, {"type": "null"}]}
    return copy


def _reason(error: str) -> str:
    """What of a message of llguidance says what is wrong; the rest shows where."""
    inner = re.search(r"^error: (.*)$", error, re.MULTILINE)
    return inner[1] if inner else error.split("\n")[0]


def _refuse(kind: str, reason: str) -> NoReturn:
    raise ValueError(f"response_format {kind}: {reason}")
