"""What a tokenizer file says, in one form for all kinds of files."""

from enum import IntEnum
from pathlib import Path
from typing import AbstractSet, Dict, Iterable, List, Literal, NamedTuple, Optional, Set, Tuple

Names = Literal["all"] | AbstractSet[str]  # of special tokens


class Kind(IntEnum):
    """Kinds of tokens, numbered alike by SentencePiece and GGUF."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


# Names under which vocabularies have an end of text, turn or message.
STOP_NAMES = {
    "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>",
    "<|eot|>", "<|eom|>",
}  # fmt: skip

PREFIX_ONCE = '"prepend_scheme": "first"'  # how a tokenizer.json says it
MAX_WORDS = 1 << 24  # far beyond any vocabulary: a damaged id must not take all memory


class Vocabulary(NamedTuple):
    """What a tokenizer file says."""

    name: str
    kind: Literal["byte-level", "spm", "json"]  # encoded by tiktoken, sentencepiece, tokenizers
    special_tokens: Dict[str, int]
    user_defined: AbstractSet[str]  # of the special ones, those that text may contain
    n_words: int
    bos_id: Optional[int]
    eos_id: int
    pad_id: int
    stop_tokens: Set[int]
    add_bos: bool  # whether a text to complete begins with bos
    chat_template: Optional[str]
    # special tokens that take white space before them, or after them, with them
    lstrip: AbstractSet[int] = frozenset()
    rstrip: AbstractSet[int] = frozenset()
    # byte-level
    pre: str = ""  # the rule by which text is cut into words: a key of PATTERNS
    ranks: Dict[bytes, int] = {}  # noqa: RUF012  # mergeable bytes -> id; a lower id merges first
    decode_only: Dict[int, bytes] = {}  # noqa: RUF012  # tokens that no text is encoded to
    cuts: Tuple[Optional[int], int] = (None, 0)  # see byte_level.META_CUTS
    # spm: a serialized ModelProto; json: the text of tokenizer.json
    model: bytes = b""
    # spm: whether the space that is put before a text comes at its beginning alone, rather
    # than after each special token, too
    prefix_once: bool = False


def strip_around(parts: List[str], ids: Iterable[int], vocabulary: Vocabulary) -> List[str]:
    """Text with special tokens at the odd places, without the white space that these take."""
    for at, i in zip(range(1, len(parts), 2), ids, strict=True):
        if i in vocabulary.lstrip:
            parts[at - 1] = parts[at - 1].rstrip()
        if i in vocabulary.rstrip:
            parts[at + 1] = parts[at + 1].lstrip()
    return parts


def check_ids(path: Path, ids: List[Optional[int]], n_words: int) -> None:
    """Raises ValueError for a bos, eos, pad or stop id that is no token."""
    for i in ids:
        if i is not None and (not isinstance(i, int) or not 0 <= i < n_words):
            raise ValueError(f"{path}: the bos, eos or pad id {i} isn't one of {n_words} tokens")
