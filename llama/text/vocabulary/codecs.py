"""Encodes with tiktoken, sentencepiece or tokenizers, behind one interface."""

import json
import os
import re
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from typing import Any, Collection, Dict, FrozenSet, Iterator, List, Literal, Pattern, Protocol

import sentencepiece
import tiktoken
import tokenizers

from llama.text.vocabulary.base import PREFIX_ONCE, Kind, Names, Vocabulary, strip_around
from llama.text.vocabulary.byte_level import PATTERNS, bytes_of
from llama.text.vocabulary.spm import SPACE, proto


class Codec(Protocol):
    """Attributes:
    model: the library's object.
    token_bytes: what each id stands for; nothing for an id that no token has.
    word_starts: the ids whose first byte, a space, isn't text where they come first.
    """

    model: Any
    token_bytes: List[bytes]
    word_starts: FrozenSet[int]

    def encode(
        self, s: str, allowed: Names, disallowed: Literal["all"] | Collection[str], begins: bool
    ) -> List[int]:
        """Ids of a text in which the allowed names of special tokens become these. It begins
        a text, or goes on with one."""


def codec(vocabulary: Vocabulary) -> Codec:
    """The codec of a vocabulary."""
    kinds: Dict[str, Any] = {"byte-level": ByteLevel, "spm": SentencePiece, "json": HuggingFace}
    return kinds[vocabulary.kind](vocabulary)


class ByteLevel:
    """Byte-level BPE, done by tiktoken."""

    def __init__(self, vocabulary: Vocabulary):
        self._special, self._n_words = vocabulary.special_tokens, vocabulary.n_words
        self._max_chars, self._max_run = vocabulary.cuts
        over = f"{{{self._max_run + 1},}}"
        # Looked for only where a run begins: to try at each character would take quadratic time.
        self._long_run = re.compile(rf"(?<!\s)\s{over}|(?<!\S)\S{over}")

        # tiktoken can't do without any of the 256 bytes. A vocabulary may lack some that UTF-8
        # hardly uses; they get ids beyond the vocabulary, which encode drops as llama.cpp does.
        ranks = dict(vocabulary.ranks)
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        ranks.update({byte: self._n_words + i for i, byte in enumerate(absent)})
        self._drops = bool(absent)
        self.model = tiktoken.Encoding(
            name=vocabulary.name,
            pat_str=PATTERNS[vocabulary.pre],
            mergeable_ranks=ranks,
            special_tokens=self._special,
        )
        # Of two names that begin alike tiktoken may find the shorter one in a text.
        nested = any(b.startswith(a) for a, b in pairwise(sorted(self._special)))
        self._split = nested or bool(vocabulary.lstrip or vocabulary.rstrip)
        self._vocabulary = vocabulary
        table = {i: token for token, i in vocabulary.ranks.items()} | vocabulary.decode_only
        table.update({i: name.encode() for name, i in self._special.items()})
        self.token_bytes = [table[i] for i in range(self._n_words)]
        self.word_starts: FrozenSet[int] = frozenset()

    def encode(
        self, s: str, allowed: Names, disallowed: Literal["all"] | Collection[str], begins: bool
    ) -> List[int]:
        def plain(text: str) -> List[int]:
            return self.model.encode(text, allowed_special=allowed, disallowed_special=disallowed)

        parts = [*self._parts(s)] or [s]
        if self._split:
            ids: List[int] = []
            for part in parts:
                for i, piece in enumerate(sections(part, self._special, allowed, self._vocabulary)):
                    ids += [self._special[piece]] if i % 2 else plain(piece)
        elif len(parts) == 1:
            ids = plain(parts[0])
        else:  # tiktoken lets other threads run meanwhile
            with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as threads:
                ids = [*chain.from_iterable(threads.map(plain, parts))]
        if self._drops and max(ids, default=0) >= self._n_words:
            ids = [i for i in ids if i < self._n_words]
        return ids

    def _parts(self, s: str) -> Iterator[str]:
        step = self._max_chars or len(s) or 1
        for begin in range(0, len(s), step):
            part, at = s[begin : begin + step], 0
            if not _has_long_run(part, self._max_run):
                yield part
                continue
            for run in self._long_run.finditer(part):
                for cut in range(run.start() + self._max_run, run.end(), self._max_run):
                    yield part[at:cut]
                    at = cut
            yield part[at:]


def _has_long_run(s: str, longest: int) -> bool:
    """Whether a text has more than so many characters in a row that are, or aren't, white space.

    Such a run lies across a multiple of that number, so only what is around these is looked at.
    """
    for at in range(0, len(s), longest):
        before, after = s[max(0, at - longest) : at], s[at : at + longest + 1]
        if s[at].isspace():
            run = len(before) - len(before.rstrip()) + len(after) - len(after.lstrip())
        else:
            run = len(after.split(None, 1)[0])
            if before and not before[-1].isspace():
                run += len(before.rsplit(None, 1)[-1])
        if run > longest:
            return True
    return False


def names_in(special: Dict[str, int], allowed: Names) -> Pattern[str]:
    """A pattern that finds allowed names, the longest where several begin alike."""
    names = [name for name in special if allowed == "all" or name in allowed]
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(f"({longest_first or '(?!)'})")


def sections(s: str, special: Dict[str, int], allowed: Names, vocabulary: Vocabulary) -> List[str]:
    """A text split at allowed names, which are at the odd places."""
    parts = names_in(special, allowed).split(s)
    return strip_around(parts, [special[name] for name in parts[1::2]], vocabulary)


class _Pieces(ABC):
    """Shared by codecs of libraries without special tokens: text is split at their names first."""

    def __init__(self, vocabulary: Vocabulary):
        self._special, self._vocabulary = vocabulary.special_tokens, vocabulary
        self._cut_at = self._special  # the library finds the others
        # No text may become one of these unless its name is allowed.
        self._control = {
            i for name, i in self._special.items() if name not in vocabulary.user_defined
        }

    def encode(
        self, s: str, allowed: Names, disallowed: Literal["all"] | Collection[str], begins: bool
    ) -> List[int]:
        if disallowed:
            names = self._special.keys() if disallowed == "all" else set(disallowed)
            forbidden = set() if allowed == "all" else names - allowed
            found = names_in(self._special, forbidden).search(s)
            if forbidden and found:
                raise ValueError(f"the text holds the disallowed special token {found[0]!r}")
        ids: List[int] = []
        for i, piece in enumerate(sections(s, self._cut_at, allowed, self._vocabulary)):
            ids += [self._special[piece]] if i % 2 else self._text(piece, begins and i == 0)
        return ids

    def _text(self, text: str, begins: bool) -> List[int]:
        """Ids of ordinary text: what would become a control token is cut in two.

        Should a vocabulary make one even so, it is left out: no text may become a control token.
        """
        ids = self._plain(text, begins) if text else []
        if self._control.isdisjoint(ids):
            return ids
        ids = []
        for i, piece in enumerate(names_in(self._special, "all").split(text)):
            parts = [piece[:1], piece[1:]] if i % 2 else [piece]
            for part in filter(None, parts):
                ids += self._plain(part, begins and not ids)
        return [i for i in ids if i not in self._control or i == self._unknown]

    @abstractmethod
    def _plain(self, text: str, begins: bool) -> List[int]:
        """Ids of a text as the library gives them; of one that doesn't begin without the space
        that is put before texts, should it come but once."""

    _unknown: Any = None  # what stands for text that has no token


class SentencePiece(_Pieces):
    """Done by `sentencepiece`, which never makes control tokens of text."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self.model = sentencepiece.SentencePieceProcessor()
        self.model.LoadFromSerializedProto(vocabulary.model)
        saved = proto.ModelProto.FromString(vocabulary.model)
        self._once = saved.normalizer_spec.add_dummy_prefix and vocabulary.prefix_once
        if self._once:
            goes_on = proto.ModelProto.FromString(vocabulary.model)
            goes_on.normalizer_spec.add_dummy_prefix = False
            self._goes_on = sentencepiece.SentencePieceProcessor()
            self._goes_on.LoadFromSerializedProto(goes_on.SerializeToString())
        self._unknown = self.model.unk_id()
        self._control.discard(self._unknown)
        self.token_bytes = [b""] * vocabulary.n_words
        for i, piece in enumerate(saved.pieces):
            if piece.type == Kind.BYTE:
                self.token_bytes[i] = bytes([int(piece.piece[1:-1], 16)])
            elif piece.type == Kind.UNKNOWN:
                self.token_bytes[i] = saved.trainer_spec.unk_surface.encode()
            elif piece.type != Kind.CONTROL:
                self.token_bytes[i] = piece.piece.replace(SPACE, " ").encode()
        its_own = {piece.piece for piece in saved.pieces if piece.type == Kind.USER_DEFINED}
        self._cut_at = {name: i for name, i in self._special.items() if name not in its_own}
        for name, i in self._special.items():
            if i >= len(saved.pieces):
                self.token_bytes[i] = name.encode()
        prefixed = saved.normalizer_spec.add_dummy_prefix
        self.word_starts = frozenset(
            i for i, piece in enumerate(saved.pieces) if prefixed and piece.piece[:1] == SPACE
        )

    def _plain(self, text: str, begins: bool) -> List[int]:
        # Those who put it there once, as Hugging Face's Metaspace, do so where there is none.
        bare = self._once and (not begins or text[0] in (" ", SPACE))
        return (self._goes_on if bare else self.model).encode(_without_surrogates(text))


class HuggingFace(_Pieces):
    """Done by `tokenizers`, with the names of special tokens taken as text.

    Raises:
        ValueError: a decoder of which it isn't known what bytes a token stands for.
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        data = json.loads(vocabulary.model)
        self.model = self._goes_on = _package(data)
        cuts = json.dumps(data.get("pre_tokenizer"))
        if PREFIX_ONCE in cuts:
            without = json.loads(cuts.replace(PREFIX_ONCE, '"prepend_scheme": "never"'))
            self._goes_on = _package(data | {"pre_tokenizer": without})
        decoder = json.dumps(data.get("decoder"), ensure_ascii=False)
        by_bytes, by_spaces = '"ByteLevel"' in decoder, SPACE in decoder or '"Metaspace"' in decoder
        if not by_bytes and not by_spaces:
            raise ValueError(f"{vocabulary.name}: its decoder isn't known here: {decoder[:200]}")
        unknown = data["model"].get("unk_token")
        self._unknown = self.model.token_to_id(unknown) if unknown else None
        self._control.discard(self._unknown)
        names = {i: name for name, i in self._special.items()}
        self.token_bytes, starts = [], set()
        for i in range(vocabulary.n_words):
            token = names.get(i) or self.model.id_to_token(i) or ""
            if i in names:
                said = token.encode()
            elif by_bytes:
                said = bytes_of(token)
            elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                said = bytes([int(token[1:-1], 16)])
            else:
                said = token.replace(SPACE, " ").encode()
                starts.add(i) if token[:1] == SPACE else None
            self.token_bytes.append(said)
        strips = '"Strip"' in decoder or ('"Metaspace"' in decoder and "never" not in decoder)
        self.word_starts = frozenset(starts) if strips else frozenset()

    def _plain(self, text: str, begins: bool) -> List[int]:
        model = self.model if begins else self._goes_on
        return model.encode(_without_surrogates(text), add_special_tokens=False).ids


def _package(data: Dict[str, Any]) -> tokenizers.Tokenizer:
    """The package's tokenizer of a tokenizer.json, for texts of any length."""
    model = tokenizers.Tokenizer.from_str(json.dumps(data))
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    return model


def _without_surrogates(text: str) -> str:
    """Lone surrogates, which UTF-8 doesn't have, as U+FFFD; tiktoken does the same itself."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
