"""Text to token ids and back.

All vocabularies read here are byte-level BPE and run on tiktoken: Llama 3's `tokenizer.model`, the
one inside a .gguf file, and Hugging Face's `tokenizer.json`. Text is never trusted: unless a caller
allows it, the name of a special token in a text is encoded as the ordinary characters it consists
of.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import (
    AbstractSet,
    Collection,
    Dict,
    Iterator,
    List,
    Literal,
    Sequence,
    Set,
)

import tiktoken

from llama.chat import ROLES, ChatFormat, Dialog, Message, Role
from llama.vocabulary import PATTERNS, read

__all__ = ["ROLES", "ChatFormat", "Dialog", "Message", "Role", "Tokenizer"]


class Tokenizer:
    """Encodes and decodes with the vocabulary of a tokenizer.model, .gguf or tokenizer.json file.

    Attributes:
        n_words: size of the vocabulary, special tokens included.
        special_tokens: their ids by name.
        bos_id, eos_id, pad_id: ids; bos_id is None where a vocabulary has none.
        stop_tokens: the ids at which generation ends.
        add_bos: whether text to be completed begins with bos.
        chat_template: the Jinja2 template that came with the vocabulary, or None.
        model: the tiktoken encoding.
        vocabulary: all that the file says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a vocabulary that is read here; says what it is.
    """

    def __init__(self, model_path: str | Path):
        vocabulary = read(model_path)
        self.vocabulary = vocabulary
        self.special_tokens: Dict[str, int] = vocabulary.special_tokens
        self.n_words: int = vocabulary.n_words
        self.bos_id = vocabulary.bos_id
        self.eos_id: int = vocabulary.eos_id
        self.pad_id: int = vocabulary.pad_id
        self.stop_tokens: Set[int] = vocabulary.stop_tokens
        self.add_bos: bool = vocabulary.add_bos
        self.chat_template = vocabulary.chat_template
        self._user_defined = vocabulary.user_defined
        self._max_chars, self._max_run = vocabulary.cuts
        over = f"{{{self._max_run + 1},}}"
        # Looked for only where a run begins: to try at each character would take quadratic time.
        self._long_run = re.compile(rf"(?<!\s)\s{over}|(?<!\S)\S{over}")

        # tiktoken can't do without any of the 256 bytes. A vocabulary may lack some that UTF-8
        # hardly uses; they get ids beyond the vocabulary, which encode drops as llama.cpp does.
        ranks = dict(vocabulary.ranks)
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        ranks.update({byte: self.n_words + i for i, byte in enumerate(absent)})
        self._drops = bool(absent)
        self.model = tiktoken.Encoding(
            name=vocabulary.name,
            pat_str=PATTERNS[vocabulary.pre],
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        # Of two names that begin alike tiktoken may find the shorter one in a text.
        self._nested = any(b.startswith(a) for a, b in pairwise(sorted(self.special_tokens)))
        table = {i: token for token, i in vocabulary.ranks.items()} | vocabulary.decode_only
        table.update({i: name.encode() for name, i in self.special_tokens.items()})
        self._bytes = [table[i] for i in range(self.n_words)]

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> List[int]:
        """Token ids of a text of any length.

        Args:
            bos, eos: whether the id of that name comes first or last.
            allowed_special: names of special tokens that become their ids where the text has them
                ("all" for every one). By default they are text like any other.
            disallowed_special: names at which to raise instead.

        Raises:
            ValueError: a disallowed name in the text, or bos where the vocabulary has none.
            TypeError: s isn't a string.
        """
        if not isinstance(s, str):
            raise TypeError(f"encode takes a str, not {type(s).__name__}")
        if allowed_special != "all":
            allowed_special = self._user_defined | allowed_special
        ids: List[int] = []
        if bos:
            if self.bos_id is None:
                raise ValueError("this vocabulary has no bos token: pass bos=False")
            ids.append(self.bos_id)
        for part in self._parts(s):
            ids.extend(self._encode(part, allowed_special, disallowed_special))
        if self._drops:
            ids = [i for i in ids if i < self.n_words]
        if eos:
            ids.append(self.eos_id)
        return ids

    def _encode(
        self,
        s: str,
        allowed: Literal["all"] | AbstractSet[str],
        disallowed: Literal["all"] | Collection[str],
    ) -> List[int]:
        def plain(text: str) -> List[int]:
            return self.model.encode(text, allowed_special=allowed, disallowed_special=disallowed)

        if not self._nested:
            return plain(s)
        names = [name for name in self.special_tokens if allowed == "all" or name in allowed]
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
        ids: List[int] = []
        for i, piece in enumerate(re.split(f"({longest_first})", s)):
            ids.extend([self.special_tokens[piece]] if i % 2 else plain(piece))
        return ids

    def _parts(self, s: str) -> Iterator[str]:
        step = self._max_chars or len(s) or 1
        for begin in range(0, len(s), step):
            part, at = s[begin : begin + step], 0
            for run in self._long_run.finditer(part):
                for cut in range(run.start() + self._max_run, run.end(), self._max_run):
                    yield part[at:cut]
                    at = cut
            yield part[at:]

    def decode(self, t: Sequence[int]) -> str:
        """The text of token ids; bytes that aren't UTF-8 become U+FFFD.

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        return self.decode_bytes(t).decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """The bytes of token ids, which may begin or end within a character."""
        for i in t:
            if not 0 <= i < self.n_words:
                raise ValueError(
                    f"token id {i}: this vocabulary has the ids 0 to {self.n_words - 1}"
                )
        return b"".join(self._bytes[i] for i in t)
