"""Text to token ids and back, and Llama 3's chat format.

Both vocabularies read here are byte-level BPE and run on tiktoken: Llama 3's `tokenizer.model`, and
the one inside a .gguf file. Text is never trusted: unless a caller allows it, the name of a special
token in a text is encoded as the ordinary characters it consists of.
"""

import base64
import binascii
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
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypedDict,
)

import tiktoken

from llama.gguf_header import is_gguf, read_header

Role = Literal["system", "user", "assistant", "ipython", "tool"]
ROLES = ("system", "user", "assistant", "ipython", "tool")


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

# How text is cut into words before BPE, by the names that GGUF gives these patterns.
PATTERNS = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    ),
}

# GGUF's kinds of tokens, of those that matter here.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Names under which vocabularies have an end of text, turn or message.
STOP_NAMES = {
    "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>",
}  # fmt: skip

# Longer inputs, and longer runs of space or of anything else, are cut there before tokenizing:
# (characters, run). For Meta's files as Meta does, whose ids are the reference; otherwise only
# where tiktoken's regular expressions would give up.
META_CUTS = (400_000, 25_000)
SAFE_CUTS = (None, 400_000)


class Vocabulary(NamedTuple):
    """What a tokenizer file says."""

    name: str
    pattern: str
    ranks: Dict[bytes, int]  # mergeable bytes -> id; a lower id merges first
    special_tokens: Dict[str, int]
    decode_only: Dict[int, bytes]  # tokens that no text is encoded to
    user_defined: AbstractSet[str]  # of the special ones, those that text may contain
    n_words: int
    bos_id: Optional[int]
    eos_id: int
    pad_id: int
    stop_tokens: Set[int]
    add_bos: bool  # whether a text to complete begins with bos
    chat_template: Optional[str]
    cuts: Tuple[Optional[int], int]


class Tokenizer:
    """Encodes and decodes with a vocabulary from Llama 3's tokenizer.model or from a .gguf file.

    Attributes:
        n_words: size of the vocabulary, special tokens included.
        special_tokens: their ids by name.
        bos_id, eos_id, pad_id: ids; bos_id is None where a vocabulary has none.
        stop_tokens: the ids at which generation ends.
        add_bos: whether text to be completed begins with bos.
        chat_template: the Jinja2 template that came with a .gguf file, or None.
        model: the tiktoken encoding.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a vocabulary that is read here; says what it is.
    """

    def __init__(self, model_path: str | Path):
        path = Path(model_path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer file at {path}")
        vocabulary = _from_gguf(path) if is_gguf(path) else _from_llama3(path)
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
            pat_str=vocabulary.pattern,
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


def _from_llama3(path: Path) -> Vocabulary:
    """Meta's file for all of Llama 3: a line `base64 rank` per token; special tokens by rule."""
    data = path.read_bytes()
    if data[:1] == b"\n" and b"<unk>" in data[:64]:
        raise ValueError(
            f"{path} is a SentencePiece model, as Llama 1 and 2 have; "
            "Llama 3's tokenizer.model is needed here"
        )
    if data[:1] in (b"{", b"<") or data[:7] == b"version":
        raise ValueError(
            f"{path} begins with {data[:20]!r}: not a tokenizer.model (JSON, a web page or a Git "
            "LFS pointer?); take the file from the checkpoint's directory or ./download.sh"
        )
    ranks: Dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise ValueError(
            f"{path}: line {len(ranks) + 1} isn't `base64 rank`: not Llama 3's tokenizer.model"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError(f"{path} is cut off or damaged: its ranks aren't 0 to {len(ranks) - 1}")
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
    ]
    names += [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(names) + 2)]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    return Vocabulary(
        name=path.name,
        pattern=PATTERNS["llama-bpe"],
        ranks=ranks,
        special_tokens=special,
        decode_only={},
        user_defined=frozenset(),
        n_words=len(ranks) + len(special),
        bos_id=special["<|begin_of_text|>"],
        eos_id=special["<|end_of_text|>"],
        pad_id=special["<|finetune_right_pad_id|>"],
        stop_tokens={special[name] for name in STOP_NAMES if name in special},
        add_bos=True,
        chat_template=None,
        cuts=META_CUTS,
    )


def _byte_alphabet() -> Dict[str, int]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, encoder.py), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): byte for byte in printable}
    stand_ins.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return stand_ins


def _from_gguf(path: Path) -> Vocabulary:
    """The vocabulary in a .gguf file, of the kind `gpt2`: byte-level BPE."""
    metadata = read_header(path).metadata

    def require(key: str):
        if key not in metadata:
            raise ValueError(f"{path} lacks the metadata key {key}: it holds no vocabulary")
        return metadata[key]

    def strings(key: str) -> List[str]:
        values = require(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{path}: {key} isn't a list of strings")
        return values

    kind = require("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"{path} has a vocabulary of the kind {kind!r}; 'gpt2' is read here")
    pre = metadata.get("tokenizer.ggml.pre", "(none)")
    if pre not in PATTERNS:
        raise ValueError(
            f"{path} cuts text into words by the rule {pre!r}; known here: {', '.join(PATTERNS)}"
        )
    tokens = strings("tokenizer.ggml.tokens")
    types: List[int] = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{path} doesn't give one type for each of its {len(tokens)} tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    alphabet = _byte_alphabet()

    special = {
        token: i for token, i in ids.items() if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    ranks: Dict[bytes, int] = {}

    def add(token: str) -> None:
        try:
            ranks[bytes(alphabet[c] for c in token)] = ids[token]
        except KeyError:
            raise ValueError(f"{path}: {token!r} isn't a token of byte-level BPE") from None

    for stand_in in alphabet:
        if stand_in in ids and stand_in not in special:
            add(stand_in)
    last = -1
    for merge in strings("tokenizer.ggml.merges"):
        token = merge.replace(" ", "")
        if token not in ids:
            raise ValueError(f"{path}: the merge {merge!r} makes a token that isn't there")
        if token in special:
            continue  # else ordinary text would become a control token
        if bytes(alphabet.get(c, 0) for c in token) in ranks:
            continue  # reached by an earlier merge
        if ids[token] < last:
            # tiktoken merges in the order of ids
            raise ValueError(f"{path}: the merge {merge!r} is out of the order of ids; unsupported")
        last = ids[token]
        add(token)
    if pre == "llama-bpe":
        for token, i in ids.items():
            if types[i] == _NORMAL:
                add(token)  # Llama 3 takes a whole word that is a token, merges or not
    # What no merge makes, what is there twice, what is unused.
    encoded = {*ranks.values(), *special.values()}
    decode_only = {
        i: b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token)
        for i, token in enumerate(tokens)
        if i not in encoded
    }

    stop = {ids[name] for name in STOP_NAMES if name in special}
    for key in ("eos", "eot", "eom"):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            stop.add(metadata[f"tokenizer.ggml.{key}_token_id"])
    eos_id = require("tokenizer.ggml.eos_token_id")
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    pad_id = metadata.get("tokenizer.ggml.padding_token_id", eos_id)
    for i in (*stop, pad_id, eos_id if bos_id is None else bos_id):
        if not isinstance(i, int) or not 0 <= i < len(tokens):
            raise ValueError(
                f"{path}: the bos, eos or pad id {i} isn't one of {len(tokens)} tokens"
            )
    return Vocabulary(
        name=path.name,
        pattern=PATTERNS[pre],
        ranks=ranks,
        special_tokens=special,
        decode_only=decode_only,
        user_defined=frozenset(name for name, i in special.items() if types[i] == _USER_DEFINED),
        n_words=len(tokens),
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        stop_tokens=stop,
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"),
        chat_template=metadata.get("tokenizer.chat_template"),
        cuts=SAFE_CUTS,
    )


class ChatFormat:
    """Llama 3's chat format: <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>.

    Source: Meta's `ChatFormat` (meta-llama/llama3, llama/tokenizer.py). Roles and contents are
    encoded as ordinary text, so that the only control tokens are those put here.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> List[int]:
        special, encode = self.tokenizer.special_tokens, self.tokenizer.encode
        role = "ipython" if message["role"] == "tool" else message["role"]
        return [
            special["<|start_header_id|>"],
            *encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> List[int]:
        return [
            *self.encode_header(message),
            *self.tokenizer.encode(message["content"].strip(), bos=False, eos=False),
            self.tokenizer.special_tokens["<|eot_id|>"],
        ]

    def encode_dialog_prompt(self, dialog: Dialog) -> List[int]:
        """The dialog, and the header of the assistant's answer for the model to go on from."""
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            ids.extend(self.encode_message(message))
        return ids + self.encode_header({"role": "assistant", "content": ""})
