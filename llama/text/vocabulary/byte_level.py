"""Byte-level BPE vocabularies: the tokenizer.model of Llama 3 and 4, and the kind `gpt2` in GGUF.

tiktoken, which encodes with them, needs only the tokens' bytes in the order of their merges.
"""

import base64
import binascii
from functools import lru_cache
from pathlib import Path
from typing import AbstractSet, Any, Dict, List, Mapping, Optional

from llama.text.encoder import IMAGE
from llama.text.vocabulary.base import STOP_NAMES, Kind, Vocabulary, check_ids
from llama.text.vocabulary.config import gguf_template

# How text is cut into words before BPE, by the names that GGUF gives these patterns.
PATTERNS = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama4": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    ),
}

ALIASES = {"refact": "smollm", "smaug-bpe": "llama-bpe"}  # Granite's, SmolLM3's; the same rules

# Longer inputs, and longer runs of space or of anything else, are cut there before tokenizing:
# (characters, run). For Meta's files as Meta does, whose ids are the reference; otherwise only
# where tiktoken's regular expressions would give up.
META_CUTS = (400_000, 25_000)
SAFE_CUTS = (None, 400_000)


class NotByteLevelError(ValueError):
    """Not byte-level BPE as tiktoken does it, which merges in the order of ids."""


LLAMA4_WORDS = 200_000  # ordinary tokens; Llama 3 has 128,000


def read_meta(path: Path) -> Vocabulary:
    """Meta's file for Llama 3 and 4: a line `base64 rank` per token; special tokens by rule."""
    data = path.read_bytes()
    if data[:1] == b"<" or data[:7] == b"version":
        raise ValueError(
            f"{path} begins with {data[:20]!r}: not a tokenizer.model (a web page or a "
            "Git LFS pointer?); take the file from the checkpoint's directory, or fetch it again"
        )
    ranks: Dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise ValueError(
            f"{path}: line {len(ranks) + 1} isn't `base64 rank`: not Meta's tokenizer.model"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError(f"{path} is cut off or damaged: its ranks aren't 0 to {len(ranks) - 1}")
    pre = "llama4" if len(ranks) == LLAMA4_WORDS else "llama-bpe"
    special = meta_special_tokens(pre, len(ranks))
    pad = "<|finetune_right_pad|>" if pre == "llama4" else "<|finetune_right_pad_id|>"
    return Vocabulary(
        name=path.name,
        kind="byte-level",
        pre=pre,
        ranks=ranks,
        special_tokens=special,
        user_defined=frozenset(),
        n_words=len(ranks) + len(special),
        bos_id=special["<|begin_of_text|>"],
        eos_id=special["<|end_of_text|>"],
        pad_id=special[pad],
        stop_tokens={special[name] for name in STOP_NAMES if name in special},
        add_bos=True,
        chat_template=None,
        cuts=META_CUTS,
    )


def meta_special_tokens(pre: str, n_ordinary: int) -> Dict[str, int]:
    """Meta's rule: special tokens by their names, which follow the ordinary ones."""
    return (llama4_special_tokens if pre == "llama4" else llama3_special_tokens)(n_ordinary)


def llama4_special_tokens(n_ordinary: int) -> Dict[str, int]:
    """2048 of them, in ranges with reserved ones. Source: meta-llama/llama-models, llama4."""

    def reserved(kind: str, first: int, last: int) -> List[str]:
        return [f"<|{kind}reserved_special_token_{i}|>" for i in range(first, last + 1)]

    names = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>",
        "<|fim_suffix|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>",
        *reserved("text_post_train_", 0, 5), "<|python_start|>", "<|python_end|>",
        "<|finetune_right_pad|>", *reserved("text_post_train_", 8, 68), "<|image_start|>",
        "<|image_end|>", *reserved("vision_", 0, 1), "<|tile_x_separator|>",
        "<|tile_y_separator|>", *reserved("vision_", 2, 5), "<|image|>",
        *reserved("vision_", 6, 6), "<|patch|>", *reserved("vision_", 7, 1047),
        *reserved("reasoning_", 0, 7), "<|reasoning_thinking_start|>",
        "<|reasoning_thinking_end|>",
    ]  # fmt: skip
    names += reserved("", 0, 2047 - len(names))
    return {name: n_ordinary + i for i, name in enumerate(names)}


def llama3_special_tokens(n_ordinary: int) -> Dict[str, int]:
    """Meta's rule: 256 special tokens follow the ordinary ones. Names are those of Llama 3.1."""
    names = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
        "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
        "<|image|>",
    ]  # fmt: skip
    names += [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(names) + 2)]
    return {name: n_ordinary + i for i, name in enumerate(names)}


def image_beyond(special: Mapping[str, int]) -> Dict[str, int]:
    """Llama 3's special tokens by Meta's rule, with <|image|> after them, where Llama 3.2 Vision
    reads it, and where Hugging Face's have it."""
    end = max(special.values()) + 1
    return {n.replace(IMAGE, "<|reserved_special_token_246|>"): i for n, i in special.items()} | {
        IMAGE: end
    }


@lru_cache
def byte_alphabet() -> Dict[str, int]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, encoder.py), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): byte for byte in printable}
    stand_ins.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return stand_ins


def bytes_of(token: str) -> bytes:
    """The bytes of a token in that alphabet; what isn't in it is text as it stands."""
    alphabet = byte_alphabet()
    return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token)


def from_gguf(path: Path, metadata: Dict[str, Any]) -> Vocabulary:
    """The vocabulary in a .gguf file, of the kind `gpt2`: byte-level BPE."""

    def require(key: str):
        if key not in metadata:
            raise ValueError(f"{path} lacks the metadata key {key}: it holds no vocabulary")
        return metadata[key]

    def strings(key: str) -> List[str]:
        values = require(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{path}: {key} isn't a list of strings")
        return values

    named = str(metadata.get("tokenizer.ggml.pre", "(none)"))
    pre = ALIASES.get(named, named)
    if pre not in PATTERNS:
        raise ValueError(
            f"{path} cuts text into words by the rule {pre!r}; known here: {', '.join(PATTERNS)}"
        )
    tokens = strings("tokenizer.ggml.tokens")
    special = [
        metadata.get(f"tokenizer.ggml.{key}_token_id")
        for key in ("bos", "eos", "eot", "eom", "padding")
    ]
    default = [Kind.CONTROL if i in special else Kind.NORMAL for i in range(len(tokens))]
    types: List[int] = metadata.get("tokenizer.ggml.token_type", default)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{path} doesn't give one type for each of its {len(tokens)} tokens")
    eos_id = require("tokenizer.ggml.eos_token_id")
    also = (metadata.get(f"tokenizer.ggml.{key}_token_id", eos_id) for key in ("eot", "eom"))
    return build(
        path,
        pre,
        tokens,
        types,
        [merge.replace(" ", "") for merge in strings("tokenizer.ggml.merges")],
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_id=eos_id,
        pad_id=metadata.get("tokenizer.ggml.padding_token_id", eos_id),
        stop={eos_id, *also},
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", named == "llama-bpe"),
        chat_template=gguf_template(metadata),
    )


def build(
    path: Path,
    pre: str,
    tokens: List[str],
    types: List[int],
    merges: List[str],
    *,
    bos_id: Optional[int],
    eos_id: int,
    pad_id: int,
    stop: AbstractSet[int],
    add_bos: bool,
    chat_template: Optional[str],
) -> Vocabulary:
    """Tokens in GPT-2's alphabet, with what each merge makes, in order: as tiktoken has them."""
    ids = {token: i for i, token in enumerate(tokens)}
    alphabet = byte_alphabet()
    special_kinds = (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
    special = {token: i for token, i in ids.items() if types[i] in special_kinds}
    ranks: Dict[bytes, int] = {}

    # Characters of the alphabet become the bytes they stand for, any other what isn't a byte.
    table = dict.fromkeys(range(256), 256) | {ord(c): byte for c, byte in alphabet.items()}

    def raw_of(token: str) -> bytes:
        try:
            return token.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"{path}: {token!r} isn't a token of byte-level BPE") from None

    for stand_in in alphabet:
        if stand_in in ids and stand_in not in special:
            ranks[raw_of(stand_in)] = ids[stand_in]
    last = -1
    for token in merges:
        if token not in ids:
            raise ValueError(f"{path}: a merge makes {token!r}, which isn't a token")
        if token in special:
            continue  # else ordinary text would become a control token
        raw = raw_of(token)
        if raw in ranks:
            continue  # reached by an earlier merge
        if ids[token] < last:
            raise NotByteLevelError(f"{path}: the merge to {token!r} is out of the order of ids")
        last = ids[token]
        ranks[raw] = last
    if pre == "llama-bpe":
        for token, i in ids.items():
            if types[i] == Kind.NORMAL:
                ranks[raw_of(token)] = i  # a whole word that is a token is taken without merges
    # What no merge makes, what is there twice, what is unused.
    encoded = {*ranks.values(), *special.values()}
    decode_only = {i: bytes_of(token) for i, token in enumerate(tokens) if i not in encoded}
    check_ids(path, [*stop, pad_id, eos_id, bos_id], len(tokens))
    return Vocabulary(
        name=path.name,
        kind="byte-level",
        pre=pre,
        ranks=ranks,
        special_tokens=special,
        decode_only=decode_only,
        user_defined=frozenset(
            name for name, i in special.items() if types[i] == Kind.USER_DEFINED
        ),
        n_words=len(tokens),
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        stop_tokens={*stop, *(ids[name] for name in STOP_NAMES if name in special)},
        add_bos=add_bos,
        chat_template=chat_template,
        cuts=SAFE_CUTS,
    )


def pre_of(pre_tokenizer: Dict[str, Any]) -> Optional[str]:
    """The name of the rule by which a tokenizer.json cuts text into words, if it is known."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    parts = [{k: v for k, v in part.items() if k != "trim_offsets"} for part in parts]
    gpt2 = byte_level | {"use_regex": True}
    parts = [gpt2 if part == byte_level else part for part in parts]  # True is its default
    if parts == [gpt2]:
        return "gpt-2"
    if parts == [{"type": "Digits", "individual_digits": True}, gpt2]:
        return "smollm"
    for name in PATTERNS:
        if parts == [split_rule(name), byte_level | {"use_regex": False}]:
            return name
    return None


def split_rule(pre: str) -> Dict[str, Any]:
    pattern = {"Regex": PATTERNS[pre]}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
