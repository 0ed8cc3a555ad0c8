"""Reads a tokenizer file. Its kind is detected from its content, never from its name."""

from pathlib import Path

from llama.text.gguf_header import is_gguf, read_header
from llama.text.vocabulary import byte_level, spm, tokenizer_json
from llama.text.vocabulary.base import Vocabulary


def read(path: str | Path) -> Vocabulary:
    """Read a tokenizer file: tokenizer.model of Llama 3, 4 or SentencePiece, tokenizer.json, GGUF.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tokenizer file, or of an unsupported kind, which is named.
    """
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
    return spm.read(path) if start[:1] == b"\n" else byte_level.read_meta(path)
