"""Structured outputs: constrains sampling so that a text follows a schema or grammar.

A response format is a dict, of one of these types:

    {"type": "json_object"}                              any JSON object
    {"type": "json_schema", "json_schema": {"schema": {...}}}   OpenAI's spelling. With "strict":
        true, objects have no other properties than those named, unless their schema says so; other
        keys of the inner dict ("name", "description") are ignored
    {"type": "json_schema", "schema": {...}}             the same
    {"type": "regex", "regex": "..."}                    a text that matches it as a whole
    {"type": "choice", "choice": ["yes", "no"]}          one of these texts
    {"type": "grammar", "grammar": "start: ..."}         a grammar in Lark's syntax

JSON is written as by json.dumps with ensure_ascii=False: ", " and ": ", no other white space, the
properties in the schema's order. llguidance parses the grammars and computes the masks; what it
doesn't support raises ValueError, as does what costs too much: see `grammar_limits`.
"""

import json
import re
from functools import partial
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Sequence, Set

import numpy as np
import torch

from llama.engine.grammar_limits import check_cost, check_size
from llama.engine.json_schema import closed_schema, plain_schema
from llama.text.tools import plain_json
from llama.tokenizer import Tokenizer

ResponseFormat = Mapping[str, Any]

_KEYS = {"json_object": "", "json_schema": "schema", "regex": "regex", "choice": "choice",
         "grammar": "grammar"}  # fmt: skip
JSON_STYLE = {  # llguidance's options
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # No \u escapes: a property's name could be spelled in other ways, and so occur twice.
    "json_allowed_escapes": '"\\bfnrt',
}
_CACHED = 64  # compiled formats


class GrammarCompiler:
    """Compiles response formats for a tokenizer. Make one per model: it indexes the vocabulary.

    Args:
        vocab_size: length of the model's logits. Ids that the tokenizer lacks are never allowed.

    Raises:
        ValueError: llguidance isn't installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        try:
            import llguidance
        except ImportError:
            raise ValueError("response_format needs llguidance: pip install llguidance") from None
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.library: Any = llguidance.LLMatcher
        known = min(tokenizer.n_words, vocab_size)
        in_text = tokenizer.vocabulary.user_defined
        control = {i for name, i in tokenizer.special_tokens.items() if name not in in_text}
        texts = [b"" if i in control else tokenizer.decode_bytes([i]) for i in range(known)]
        texts += [b""] * (vocab_size - known)  # a token without bytes is never allowed
        self.ordinary = np.array([len(text) > 0 for text in texts], dtype=bool)
        # At the beginning of a text, SentencePiece drops the space that a token begins with. Extra
        # ids, beyond the model's, stand for such tokens without it.
        starts = tokenizer._codec.word_starts
        self.starts = np.array(sorted(i for i in starts if i < known), dtype=np.int64)
        self.at_start = {int(i): vocab_size + n for n, i in enumerate(self.starts)}
        self.blank = np.array([i for i in self.starts if len(texts[i]) == 1], dtype=np.int64)
        texts += [texts[i][1:] for i in self.starts]
        # An extra id for the end of the text, since stop tokens differ between rows.
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(self, [*texts, b"<end>"]))
        self.trie: Any = llguidance.LLTokenizer(wrapped)
        self._compiled: Dict[str, Any] = {}

    def constraint(self, response_format: ResponseFormat, stop_tokens: Set[int]) -> "Constraint":
        """A constraint for a new row: a text of this format, then one of the stop tokens.

        Raises:
            ValueError: not a response format, or not a supported one, with the reason.
        """
        if not stop_tokens:
            raise ValueError("response_format needs stop_tokens, one at least: they end the text")
        format_ = plain_json(dict(response_format), "response_format")
        key = json.dumps(format_)
        if key not in self._compiled:
            kind = str(format_.get("type"))
            check_size(key, partial(_refuse, kind))
            check_format(format_)
            grammar = _grammar(self.library, format_)
            check_cost(key, grammar, partial(_refuse, kind))
            matcher = self.library(self.trie, grammar, log_level=0)
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
    """One row's state in its grammar. Made by `GrammarCompiler.constraint`."""

    def __init__(self, compiler: GrammarCompiler, matcher: Any, stop_tokens: Set[int]):
        self._of, self._matcher = compiler, matcher
        self._stops = frozenset(i for i in stop_tokens if 0 <= i < compiler.vocab_size)
        self._stop_ids = np.array(sorted(self._stops), dtype=np.int64)
        self._words = np.empty((compiler.trie.vocab_size + 31) // 32, dtype=np.int32)
        self._found: Optional[np.ndarray] = None
        self._begun = self._ended = False

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (vocab_size,), with -inf for tokens that aren't allowed next. Stop tokens are
        allowed where the text may end.

        Raises:
            ValueError: the grammar exceeds llguidance's limits, or allows no token.
        """
        allowed = self._allowed().copy()
        ends = self._matcher.is_accepting() or self._ended
        if self._matcher.is_error() or not (ends or allowed.any()):
            why = _reason(self._matcher.get_error()) or "no token can follow here"
            raise ValueError(f"response_format: {why}; simplify it")
        allowed[self._stop_ids] = ends
        banned = torch.from_numpy(~allowed).to(logits.device)
        return logits.masked_fill(banned, -torch.inf)

    def allows(self, token: int) -> bool:
        """Whether a token may come next: as `mask` has it, without computing the mask."""
        if self._ended:
            return False
        if token in self._stops:
            return self._matcher.is_accepting()
        if self._found is not None or (self._of.at_start and not self._begun):
            return 0 <= token < self._of.vocab_size and bool(self._allowed()[token])
        return self._follows(self._matcher, token, self._begun)

    def accept(self, token: int) -> None:
        """Advance by a sampled token; a stop token ends the text."""
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
        # llguidance sometimes notices only when it computes the mask.
        return self._ended or (self._matcher.is_accepting() and not self._allowed().any())

    def forced(self) -> List[int]:
        """The next tokens where only one text can follow; often none."""
        ids = [] if self._ended else self._spelled(self._matcher, self._begun)
        return ids[: self.valid(ids)]

    def valid(self, tokens: Sequence[int]) -> int:
        """Length of the longest prefix of these tokens that is allowed."""
        if not len(tokens) or not self.allows(tokens[0]):
            return 0
        if len(tokens) == 1 or tokens[0] in self._stops:
            return 1
        ahead = self._matcher.deep_copy()
        ahead.consume_tokens(self._ids(tokens[0], self._begun))
        for count, token in enumerate(tokens[1:], 1):
            if token in self._stops:
                return count + int(ahead.is_accepting())
            if not self._follows(ahead, token, begun=True):
                return count
            ahead.consume_tokens([token])
        return len(tokens)

    def _follows(self, matcher: Any, token: int, begun: bool) -> bool:
        """Whether a token other than a stop token is allowed; where text is forced, in one
        tokenization only."""
        if not 0 <= token < self._of.vocab_size or not self._of.ordinary[token]:
            return False
        forced = self._spelled(matcher, begun)
        return (not forced or forced[0] == token) and matcher.validate_tokens([token]) == 1

    def _spelled(self, matcher: Any, begun: bool) -> List[int]:
        """The forced text's tokens, as the tokenizer encodes it: masks allow no other."""
        ids: List[int] = matcher.compute_ff_tokens()
        if not ids or begun or not self._of.at_start:
            return ids
        tokenizer = self._of.tokenizer
        own = tokenizer.encode(tokenizer.decode(ids), bos=False, eos=False)
        texts = [tokenizer.decode_bytes(spelling) for spelling in (own, ids)]
        return own if own and texts[0].removeprefix(b" ") == texts[1] else ids

    def _ids(self, token: int, begun: bool) -> List[int]:
        """llguidance's ids for a token: none for a lone space at the beginning."""
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
            # Lark's syntax can name ids; control tokens are ruled out all the same.
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
    """A vocabulary in llguidance's interface."""

    bos_token_id = None

    def __init__(self, compiler: GrammarCompiler, tokens: List[bytes]):
        self.tokens, self.eos_token_id = tokens, len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]
        self._tokenizer, self._prefixed = compiler.tokenizer, bool(compiler.at_start)

    def __call__(self, text: str | bytes) -> List[int]:
        """The tokenizer's ids of text that continues other text."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        if not self._prefixed:
            return self._tokenizer.encode(text, bos=False, eos=False)
        ids = self._tokenizer.encode("\n" + text, bos=False, eos=False)
        before = next(n for n in range(1, len(ids) + 1) if self._tokenizer.decode(ids[:n]))
        return ids[before:]


def check_format(format_: Dict[str, Any]) -> None:
    """Check a response format, except its schema or grammar; OpenAI's spelling becomes ours, in
    place."""
    kind = format_.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"response_format has the type {kind!r}: it is one of {', '.join(_KEYS)}")
    if kind == "json_schema" and isinstance(format_.get("json_schema"), dict):
        if "schema" in format_:
            _refuse(kind, "it has both 'schema' and 'json_schema': leave one out")
        inner = format_.pop("json_schema")
        format_["schema"] = inner.get("schema")
        if inner.get("strict") not in (None, False, True):
            _refuse(kind, f"its 'strict' is true or false, not {inner['strict']!r}")
        if inner.get("strict") and isinstance(format_["schema"], dict):
            format_["schema"] = closed_schema(format_["schema"])
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
        _refuse(kind, f"its {key!r} must be {said}, not {value!r}")


def _grammar(library: Any, format_: Dict[str, Any]) -> str:
    """llguidance's grammar of a response format that was checked."""
    kind = format_["type"]
    if kind == "regex":
        return library.grammar_from_regex(format_["regex"])
    if kind == "grammar":
        return library.grammar_from_lark(format_["grammar"])
    if kind == "choice":
        # A single terminal, so that one choice may be a prefix of another.
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in format_["choice"])
        # Lark's syntax has no escapes for these.
        if "\\u" in texts.replace("\\\\", "") or "\x7f" in texts:
            _refuse(kind, "a text has a control character: take it out")
        return library.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    schema = plain_schema(format_.get("schema", {"type": "object"}), f"response_format {kind}")
    return library.grammar_from_json_schema(json.dumps(schema), overrides=JSON_STYLE)


def _reason(error: str) -> str:
    """The part of llguidance's error message that says what is wrong; the rest shows where."""
    inner = re.search(r"^error: (.*)$", error, re.MULTILINE)
    return inner[1] if inner else error.split("\n")[0]


def _refuse(kind: str, reason: str) -> NoReturn:
    raise ValueError(f"response_format {kind}: {reason}")
