"""SentencePiece vocabularies: Llama 1's and 2's tokenizer.model, and the kind `llama` in GGUF.

A GGUF file lists pieces, scores and types: all that a SentencePiece model of the kind BPE consists
of. So such a model is built from them, and the `sentencepiece` package encodes with it.
"""

import re
from pathlib import Path
from typing import Any, Dict, List, Mapping

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from llama.text.vocabulary.base import STOP_NAMES, Kind, Vocabulary, check_ids
from llama.text.vocabulary.config import TokenizerConfig, gguf_template

proto: Any = sentencepiece_model_pb2  # its classes are made as it is imported
SPACE = "\u2581"  # how pieces write a space


def metaspace(scheme: str) -> Dict[str, Any]:
    """What makes SPACE of spaces in a tokenizer.json, and puts one before a text by a scheme."""
    rule = {"replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return {"type": "Metaspace", **rule}


def read(path: Path) -> Vocabulary:
    """A SentencePiece model, with what Hugging Face's files beside it say of it."""
    return from_model(path, path.read_bytes(), TokenizerConfig(path))


def from_model(path: Path, data: bytes, config: TokenizerConfig) -> Vocabulary:
    """The vocabulary of a serialized SentencePiece model.

    Raises:
        ValueError: not such a model, or one without an end of text.
    """
    model = load(path, data)
    pieces = proto.ModelProto.FromString(data).pieces
    special = {p.piece: i for i, p in enumerate(pieces) if p.type in (Kind.UNKNOWN, Kind.CONTROL)}
    user_defined = {p.piece: i for i, p in enumerate(pieces) if p.type == Kind.USER_DEFINED}
    added = {
        token["content"]: i
        for i, token in config.tokens.items()
        if i >= len(pieces)
        or (pieces[i].type == Kind.NORMAL and pieces[i].piece == token["content"])
    }
    in_text = {name for name, i in added.items() if not config.tokens[i].get("special")}
    special |= user_defined | added
    n_words = max(len(pieces) - 1, *added.values(), 0) + 1
    bos_id = config.named("bos_token", special)
    bos_id = (model.bos_id() if model.bos_id() >= 0 else None) if bos_id is None else bos_id
    eos_id = config.named("eos_token", special)
    eos_id = model.eos_id() if eos_id is None else eos_id
    if eos_id < 0:
        raise ValueError(f"{path} has no end-of-text token")
    pad_id = config.named("pad_token", special)
    stop = {eos_id, *config.stop, *(special[name] for name in STOP_NAMES if name in special)}
    stop |= {i for i in (model.eos_id(), special.get("</s>", -1)) if i >= 0}
    vocabulary = Vocabulary(
        name=path.name,
        kind="spm",
        special_tokens=special,
        user_defined=frozenset(user_defined) | in_text,
        n_words=n_words,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        stop_tokens=stop,
        add_bos=config.add_bos(bos_id, default=bos_id is not None),
        chat_template=config.chat_template,
        model=data,
        prefix_once=bool(config.prefix_once),
        **config.strips(),
    )
    check_ids(path, [bos_id, eos_id, vocabulary.pad_id, *stop], n_words)
    return vocabulary


def load(path: Path, data: bytes) -> SentencePieceProcessor:
    """Raises ValueError if `sentencepiece` can't make a model of the bytes."""
    model = SentencePieceProcessor()
    try:
        loaded = model.LoadFromSerializedProto(data)
    except Exception as error:  # its own exceptions are of several types
        raise ValueError(f"{path} isn't a usable SentencePiece model: {error}") from None
    if not loaded or not model.get_piece_size():
        raise ValueError(f"{path} isn't a usable SentencePiece model")
    for i, piece in enumerate(proto.ModelProto.FromString(data).pieces):
        pattern = r"<0x[0-9A-F]{2}>" if piece.type == Kind.BYTE else r"(?s:.*)"
        # It is bytes where it isn't UTF-8.
        if not isinstance(piece.piece, str) or not re.fullmatch(pattern, piece.piece):
            raise ValueError(f"{path} isn't a usable SentencePiece model: its piece {i} is damaged")
    return model


def has_pieces(path: Path, data: bytes, by_id: Mapping[int, str]) -> bool:
    """Whether the pieces of a serialized SentencePiece model have the names that are given."""
    load(path, data)
    pieces = proto.ModelProto.FromString(data).pieces
    return all(by_id.get(i, p.piece) == p.piece for i, p in enumerate(pieces))


def from_gguf(path: Path, metadata: Dict[str, Any]) -> Vocabulary:
    """The vocabulary in a .gguf file of the kind `llama`."""

    def values(key: str, kind: type) -> List[Any]:
        found = metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(found, list) or not all(isinstance(v, kind) for v in found):
            raise ValueError(f"{path}: tokenizer.ggml.{key} isn't a list of {kind.__name__}")
        return found

    def optional(key: str, default: Any) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens, scores = values("tokens", str), values("scores", float)
    types = values("token_type", int)
    if not len(tokens) == len(scores) == len(types):
        raise ValueError(
            f"{path} has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types"
        )
    model = proto.ModelProto()
    names = set()
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if kind not in [*Kind]:
            raise ValueError(f"{path}: token {i} is of the unknown type {kind}")
        # SentencePiece wants unique names; one that comes again encodes nothing.
        if not token or token in names:
            token, kind = f"[{i}] {token}", Kind.UNUSED
        names.add(token)
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = types.count(Kind.BYTE) == 256
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(optional("add_space_prefix", True))
    strips = bool(optional("remove_extra_whitespaces", False))
    model.normalizer_spec.remove_extra_whitespaces = strips
    defaults = {"bos": ("bos", 1), "eos": ("eos", 2), "unk": ("unknown", 0), "pad": ("padding", -1)}
    for key, (theirs, default) in defaults.items():
        i = optional(f"{theirs}_token_id", default)
        if not isinstance(i, int) or not -1 <= i < len(tokens):
            raise ValueError(f"{path}: the {key} id {i} isn't one of {len(tokens)} tokens")
        setattr(model.trainer_spec, f"{key}_id", i)
        if i >= 0:
            setattr(model.trainer_spec, f"{key}_piece", model.pieces[i].piece)
    vocabulary = from_model(path, model.SerializeToString(), TokenizerConfig(None))
    bos_id, eos_id = model.trainer_spec.bos_id, model.trainer_spec.eos_id
    pad_id = model.trainer_spec.pad_id
    also = {optional(f"{key}_token_id", eos_id) for key in ("eot", "eom")}
    check_ids(path, [*also], len(tokens))
    return vocabulary._replace(
        bos_id=bos_id if bos_id >= 0 else None,
        eos_id=eos_id,
        pad_id=pad_id if pad_id >= 0 else eos_id,
        stop_tokens=vocabulary.stop_tokens | {eos_id} | also,
        add_bos=bool(optional("add_bos_token", bos_id >= 0)),
        chat_template=gguf_template(metadata),
    )
