"""Text to token ids and back.

One class for every vocabulary (`llama.text.vocabulary`): Llama 3's and SentencePiece's
tokenizer.model, Hugging Face's tokenizer.json, both kinds inside GGUF. Text is never trusted:
unless a caller allows it, the name of a special token in a text is encoded as the ordinary
characters it consists of.
"""

import codecs
import hashlib
from pathlib import Path
from typing import Collection, Dict, List, Literal, Sequence, Set

from llama.text.chat import ROLES, ChatFormat, Dialog, Message, Role
from llama.text.vocabulary.base import Names, Vocabulary
from llama.text.vocabulary.codecs import codec
from llama.text.vocabulary.reading import read

__all__ = ["ROLES", "ChatFormat", "Dialog", "Message", "Role", "StreamDecoder", "Tokenizer"]


class Tokenizer:
    """Encodes and decodes with the vocabulary of a tokenizer.model, .gguf or tokenizer.json file,
    or with one that has been read.

    Attributes:
        n_words: size of the vocabulary, special tokens included.
        special_tokens: their ids by name.
        bos_id, eos_id, pad_id: ids; bos_id is None where a vocabulary has none.
        stop_tokens: the ids at which generation ends.
        add_bos: whether text to be completed begins with bos.
        chat_template: the Jinja2 template that came with the vocabulary, or None.
        model: what encodes: a tiktoken.Encoding, SentencePieceProcessor or tokenizers.Tokenizer.
        vocabulary: everything that was read from the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tokenizer file, or of an unsupported kind, which is named.
    """

    def __init__(self, model_path: str | Path | Vocabulary):
        vocabulary = model_path if isinstance(model_path, Vocabulary) else read(model_path)
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
        self._codec = codec(vocabulary)
        self.model = self._codec.model

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Names = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
        begins: bool = True,
    ) -> List[int]:
        """Token ids of a text of any length.

        Args:
            bos, eos: whether the id of that name comes first or last.
            allowed_special: names of special tokens that become their ids where the text has them
                ("all" for every one). By default they are text like any other.
            disallowed_special: names at which to raise instead.
            begins: whether the text comes first. Some vocabularies of SentencePiece put a space
                before a text there alone, and none where it goes on after a special token.

        Raises:
            ValueError: a disallowed name in the text, or bos where the vocabulary has none.
            TypeError: s isn't a string.
        """
        if not isinstance(s, str):
            raise TypeError(f"encode takes a str, not {type(s).__name__}")
        if allowed_special != "all":
            allowed_special = self._user_defined | allowed_special
        ids = self._codec.encode(s, allowed_special, disallowed_special, begins)
        if bos:
            if self.bos_id is None:
                raise ValueError("this vocabulary has no bos token: pass bos=False")
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, t: Sequence[int]) -> str:
        """The text of token ids; bytes that aren't UTF-8 become U+FFFD.

        SentencePiece puts a space before a text, which is taken away here, as its own decoder does.

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        data = self.decode_bytes(t)
        first = next((i for i in t if self._codec.token_bytes[i]), None)
        if first in self._codec.word_starts:
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """The bytes of token ids, which may begin or end within a character."""
        for i in t:
            if not 0 <= i < self.n_words:
                raise ValueError(
                    f"token id {i}: this vocabulary has the ids 0 to {self.n_words - 1}"
                )
        token_bytes = self._codec.token_bytes
        return b"".join(token_bytes[i] for i in t)

    def agrees(self, other: "Tokenizer") -> bool:
        """Whether every id means the same in both vocabularies."""
        mine, theirs = self._codec.token_bytes, other._codec.token_bytes
        return mine == theirs and self.special_tokens == other.special_tokens

    def fingerprint(self) -> str:
        """A hash of what every id means and of the rest of the vocabulary: the same for the same
        vocabulary in another kind of file."""
        v, words = self.vocabulary, self._codec.token_bytes
        rest = [v.special_tokens, v.bos_id, sorted(v.stop_tokens), v.add_bos, v.chat_template]
        return hashlib.sha256(repr([words, *rest]).encode()).hexdigest()[:16]

    def stream(self) -> "StreamDecoder":
        """A decoder of tokens that come one by one: what it gives adds up to `decode`'s text."""
        return StreamDecoder(self)


class StreamDecoder:
    """Token ids to text as they come. Bytes are held until they are whole characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun = False

    def feed(self, token: int) -> str:
        """The characters that a token completes; often none, or one that began earlier.

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        data = self._tokenizer.decode_bytes([token])
        if data and not self._begun:
            self._begun = True
            if token in self._tokenizer._codec.word_starts:
                data = data[1:]
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD if the last character isn't whole, else nothing."""
        return self._utf8.decode(b"", final=True)
