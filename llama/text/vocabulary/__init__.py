"""What a tokenizer file says, whoever wrote it: Meta's, Hugging Face's, SentencePiece's, GGUF's.

Files are told apart by their content, never by their name.
"""

from pathlib import Path
from typing import AbstractSet, Dict, List, Literal, NamedTuple, Optional, Set, Tuple

from llama.text.gguf_header import is_gguf, read_header

__all__ = ["STOP_NAMES", "Vocabulary", "check_ids", "read"]

# Kinds of tokens, numbered alike by SentencePiece and GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Names under which vocabularies have an end of text, turn or message.
STOP_NAMES = {
    "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>",
}  # fmt: skip


class Vocabulary(NamedTuple):
    """What a tokenizer file says."""

    name: str
    kind: Literal["byte-level", "spm", "json"]  # who encodes: tiktoken, sentencepiece, tokenizers
    special_tokens: Dict[str, int]
    user_defined: AbstractSet[str]  # of the special ones, those that text may contain
    n_words: int
    bos_id: Optional[int]
    eos_id: int
    pad_id: int
    stop_tokens: Set[int]
    add_bos: bool  # whether a text to complete begins with bos
    chat_template: Optional[str]
    # byte-level
    pre: str = ""  # the rule by which text is cut into words: a key of PATTERNS
    ranks: Dict[bytes, int] = {}  # noqa: RUF012  # mergeable bytes -> id; a lower id merges first
    decode_only: Dict[int, bytes] = {}  # noqa: RUF012  # tokens that no text is encoded to
    cuts: Tuple[Optional[int], int] = (None, 0)  # see byte_level.META_CUTS
    # spm: a serialized ModelProto; json: the text of tokenizer.json
    model: bytes = b""


def read(path: str | Path) -> Vocabulary:
    """Read a tokenizer file: tokenizer.model of Llama 3 or of SentencePiece, tokenizer.json, GGUF.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a vocabulary that is read here; says what it is.
    """
    from llama.text.vocabulary import byte_level, spm, tokenizer_json

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file at {path}")
    if is_gguf(path):
        metadata = read_header(path).metadata
        kind = metadata.get("tokenizer.ggml.model")
        readers = {"gpt2": byte_level.from_gguf, "llama": spm.from_gguf}
        if kind is None:
            raise ValueError(
                f"{path} lacks the metadata key tokenizer.ggml.model: it holds no vocabulary"
            )
        if not isinstance(kind, str) or kind not in readers:
            known = " and ".join(map(repr, readers))
            raise ValueError(f"{path} has a vocabulary of the kind {kind!r}; {known} are read here")
        return readers[kind](path, metadata)
    with path.open("rb") as file:
        start = file.read(64)
    if start.lstrip()[:1] == b"{":
        return tokenizer_json.read(path)
    return spm.read(path) if start[:1] == b"\n" else byte_level.read_llama3(path)


def check_ids(path: Path, ids: List[Optional[int]], n_words: int) -> None:
    """Raises ValueError for a bos, eos, pad or stop id that is no token."""
    for i in ids:
        if i is not None and (not isinstance(i, int) or not 0 <= i < n_words):
            raise ValueError(f"{path}: the bos, eos or pad id {i} isn't one of {n_words} tokens")
