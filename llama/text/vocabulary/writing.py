"""A vocabulary written into other files: tokenizer.model, tokenizer.json, metadata of GGUF."""

import base64
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from llama.text.files import write_json
from llama.text.vocabulary.base import STOP_NAMES, Kind, Vocabulary
from llama.text.vocabulary.byte_level import (
    LLAMA4_WORDS,
    byte_alphabet,
    image_beyond,
    meta_special_tokens,
    split_rule,
)
from llama.text.vocabulary.spm import SPACE, metaspace, proto


def tokens_of(vocabulary: Vocabulary) -> List[str]:
    """All tokens by id: special ones by name, the others in GPT-2's alphabet."""
    stand_ins = {byte: c for c, byte in byte_alphabet().items()}
    by_id = {i: token for token, i in vocabulary.ranks.items()} | vocabulary.decode_only
    tokens = {i: "".join(stand_ins[b] for b in token) for i, token in by_id.items()}
    tokens |= {i: name for name, i in vocabulary.special_tokens.items()}
    return [tokens[i] for i in range(vocabulary.n_words)]


def merges_of(vocabulary: Vocabulary) -> List[Tuple[str, str]]:
    """The merge that makes each token, in order: the last one when BPE builds it from its bytes."""
    stand_ins = {byte: c for c, byte in byte_alphabet().items()}
    ranks, merges = vocabulary.ranks, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            best = min(pairs)
            if best >= rank:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            a, b = ("".join(stand_ins[byte] for byte in part) for part in parts)
            merges.append((a, b))
    return merges


def write_tokenizer(vocabulary: Vocabulary, directory: Path) -> Path:
    """Write a tokenizer beside weights in Meta's format; returns the file.

    That is Meta's tokenizer.model where it can express the whole vocabulary, else tokenizer.json.
    """
    if vocabulary.kind != "byte-level":
        twin = _pieces_json(vocabulary) if vocabulary.kind == "spm" else None
        return _write(vocabulary, directory, twin)
    pre, ordinary = vocabulary.pre, len(vocabulary.ranks)
    rule = meta_special_tokens(pre, ordinary)
    by_rule = vocabulary.special_tokens in (rule, image_beyond(rule))
    whole = sorted(vocabulary.ranks.values()) == list(range(ordinary))
    known = pre == ("llama4" if ordinary == LLAMA4_WORDS else "llama-bpe")
    if by_rule and whole and known and not vocabulary.chat_template:
        path = directory / "tokenizer.model"
        lines = sorted(vocabulary.ranks.items(), key=lambda item: item[1])
        path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in lines))
        return path
    return write_for_hugging_face(vocabulary, directory)


def for_images(vocabulary: Vocabulary) -> Vocabulary:
    """Meta's of Llama 3.2 Vision with the token of images beyond it; others as they are."""
    rule = meta_special_tokens("llama-bpe", len(vocabulary.ranks))
    if vocabulary.kind != "byte-level" or vocabulary.special_tokens != rule:
        return vocabulary
    return vocabulary._replace(special_tokens=image_beyond(rule), n_words=vocabulary.n_words + 1)


def write_for_hugging_face(vocabulary: Vocabulary, directory: Path) -> Path:
    """Write the tokenizer (SentencePiece's tokenizer.model, if it is one, and tokenizer.json),
    tokenizer_config.json and generation_config.json, as transformers reads them; returns the first.

    Raises:
        ValueError: a SentencePiece model of a kind that transformers would take for BPE.
    """
    twin = _pieces_json(vocabulary) if vocabulary.kind == "spm" else None
    if vocabulary.kind == "spm" and twin is None:
        model_type = proto.ModelProto.FromString(vocabulary.model).trainer_spec.model_type
        if model_type != proto.TrainerSpec.BPE:
            raise ValueError(
                f"{vocabulary.name} is a SentencePiece model that isn't BPE, and normalizes its "
                "text; transformers would take it for BPE: pass a tokenizer.json that comes with "
                "the model as tokenizer_path"
            )
    return _write(vocabulary, directory, twin)


def _write(vocabulary: Vocabulary, directory: Path, twin: Optional[Dict[str, Any]]) -> Path:
    """The files, with a SentencePiece model's tokenizer.json if it has one."""
    names: Dict[Optional[int], str] = {i: name for name, i in vocabulary.special_tokens.items()}
    for key, i in (("bos", vocabulary.bos_id), ("eos", vocabulary.eos_id)):
        if i is not None and i not in names:
            raise ValueError(f"the {key} id {i} of {vocabulary.name} isn't a special token's")
    config: Dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": names.get(vocabulary.bos_id),
        "eos_token": names.get(vocabulary.eos_id),
        "pad_token": names.get(vocabulary.pad_id),
        "add_bos_token": vocabulary.add_bos,
    }
    if vocabulary.kind == "spm":
        path = directory / "tokenizer.model"
        path.write_bytes(vocabulary.model)
        if twin is None:
            config |= {"tokenizer_class": "LlamaTokenizer", "legacy": not vocabulary.prefix_once}
        else:
            write_json(directory / "tokenizer.json", twin)
        added = _added_tokens(vocabulary)
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    else:
        path = directory / "tokenizer.json"
        if vocabulary.kind == "json":
            path.write_bytes(vocabulary.model)
        else:
            write_json(path, _tokenizer_json(vocabulary))
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    write_json(directory / "tokenizer_config.json", config)
    generation = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": sorted(vocabulary.stop_tokens),
        "pad_token_id": vocabulary.pad_id,
    }
    write_json(directory / "generation_config.json", generation)
    return path


def _added_tokens(vocabulary: Vocabulary) -> List[Dict[str, Any]]:
    return [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": i in vocabulary.lstrip,
            "rstrip": i in vocabulary.rstrip,
            "normalized": False,
            "special": name not in vocabulary.user_defined,
        }
        for name, i in sorted(vocabulary.special_tokens.items(), key=lambda item: item[1])
    ]


def _post_processor(vocabulary: Vocabulary, tokens: List[str]) -> Any:
    """What puts bos before a text, if that is what the vocabulary wants."""
    if not vocabulary.add_bos or vocabulary.bos_id is None:
        return None
    bos = tokens[vocabulary.bos_id]
    first: Dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": text, "type_id": 0}} for text in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], first, texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
    }


def _pieces_json(vocabulary: Vocabulary) -> Optional[Dict[str, Any]]:
    """tokenizer.json of a SentencePiece model, of the kinds BPE and Unigram; None where it takes
    more.
    """
    model = proto.ModelProto.FromString(vocabulary.model)
    normalizer = model.normalizer_spec
    plain = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    kinds = {proto.TrainerSpec.BPE: _merging, proto.TrainerSpec.UNIGRAM: _unigram}
    if model.trainer_spec.model_type not in kinds or not plain:
        return None
    tokens = [piece.piece for piece in model.pieces]
    tokens += [""] * (vocabulary.n_words - len(tokens))
    for name, i in vocabulary.special_tokens.items():
        tokens[i] = name
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    once = normalizer.add_dummy_prefix and vocabulary.prefix_once
    prefixed = [{"type": "Prepend", "prepend": SPACE}] if normalizer.add_dummy_prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return _json(
        vocabulary,
        tokens,
        normalizer=None if once else {"type": "Sequence", "normalizers": [*prefixed, replace]},
        pre_tokenizer=metaspace("first") if once else None,
        decoder={"type": "Sequence", "decoders": decoders},
        model=kinds[model.trainer_spec.model_type](model, tokens),
    )


def _unigram(model: Any, tokens: List[str]) -> Dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": [[piece.piece, piece.score] for piece in model.pieces],
    }


def _merging(model: Any, tokens: List[str]) -> Dict[str, Any]:
    """SentencePiece joins the two neighbours that make the piece of the highest score, so the
    merges are all ways to make each piece, in the order of the scores.
    """
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    made = {piece.piece: piece.score for piece in model.pieces if piece.type == Kind.NORMAL}
    merges: List[Tuple[str, str]] = []
    for piece in sorted(made, key=lambda piece: (-made[piece], ids[piece])):
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [(a, b) for a, b in splits if a in made and b in made]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return _bpe(
        unk_token=tokens[model.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=False,
        vocab=ids,
        merges=merges,
    )


def _tokenizer_json(vocabulary: Vocabulary) -> Dict[str, Any]:
    """tokenizer.json of a byte-level vocabulary."""
    tokens = tokens_of(vocabulary)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    rules = [split_rule(vocabulary.pre), {**byte_level, "use_regex": False}]
    model = _bpe(
        unk_token=None,
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=vocabulary.pre == "llama-bpe",
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges_of(vocabulary),
    )
    return _json(
        vocabulary,
        tokens,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": rules},
        decoder={**byte_level, "use_regex": False},
        model=model,
    )


def _bpe(**model: Any) -> Dict[str, Any]:
    unset = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return {"type": "BPE", **dict.fromkeys(unset), **model}


def _json(
    vocabulary: Vocabulary,
    tokens: List[str],
    normalizer: Any,
    pre_tokenizer: Any,
    decoder: Any,
    model: Dict[str, Any],
) -> Dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(vocabulary, tokens),
        "decoder": decoder,
        "model": model,
    }


def write_gguf(vocabulary: Vocabulary, writer: Any, vocab_size: int) -> None:
    """Add a vocabulary to a gguf.GGUFWriter, filled up to vocab_size with unused tokens.

    Raises:
        ValueError: a vocabulary that GGUF has no kind for.
    """
    if vocabulary.kind == "json":
        raise ValueError(
            f"{vocabulary.name} is neither byte-level BPE nor SentencePiece, and GGUF knows no "
            "other kind: pass a tokenizer.model that comes with the model as tokenizer_path"
        )
    if vocabulary.kind == "spm":
        _write_pieces(vocabulary, writer, vocab_size)
    else:
        _write_byte_level(vocabulary, writer, vocab_size)
    for key, i in (("bos", vocabulary.bos_id), ("eos", vocabulary.eos_id)):
        if i is not None:
            getattr(writer, f"add_{key}_token_id")(i)
    writer.add_pad_token_id(vocabulary.pad_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    special = vocabulary.special_tokens
    known = {vocabulary.eos_id, *(special[name] for name in STOP_NAMES if name in special)}
    others = sorted(vocabulary.stop_tokens - known)  # that readers wouldn't know by their names
    if "<|eot_id|>" in special:
        writer.add_eot_token_id(special["<|eot_id|>"])
    elif others:
        writer.add_eot_token_id(others.pop(0))
    if others:
        writer.add_eom_token_id(others.pop(0))
    if others:
        warnings.warn(f"GGUF has no place for the stop tokens {others}", stacklevel=2)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _write_byte_level(vocabulary: Vocabulary, writer: Any, vocab_size: int) -> None:
    tokens = tokens_of(vocabulary)
    special = vocabulary.special_tokens
    kinds = dict.fromkeys(special.values(), Kind.CONTROL)
    kinds |= {special[name]: Kind.USER_DEFINED for name in vocabulary.user_defined}
    types = [kinds.get(i, Kind.NORMAL) for i in range(len(tokens))]
    missing = range(len(tokens), vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in missing])
    writer.add_token_types(types + [Kind.UNUSED for _ in missing])
    writer.add_token_merges([f"{a} {b}" for a, b in merges_of(vocabulary)])


def _write_pieces(vocabulary: Vocabulary, writer: Any, vocab_size: int) -> None:
    model = proto.ModelProto.FromString(vocabulary.model)
    normalizer = model.normalizer_spec
    if model.trainer_spec.model_type != proto.TrainerSpec.BPE or normalizer.precompiled_charsmap:
        raise ValueError(
            f"{vocabulary.name} is a SentencePiece model that isn't BPE or normalizes characters, "
            "and GGUF's kind for Llama does neither: write another format"
        )
    pieces = [(p.piece, p.score, p.type) for p in model.pieces]
    added = {i: name for name, i in vocabulary.special_tokens.items()}
    for i in range(len(pieces), max(vocab_size, vocabulary.n_words)):
        kind = Kind.USER_DEFINED if added.get(i) in vocabulary.user_defined else Kind.CONTROL
        pieces.append((added[i], 0.0, kind) if i in added else (f"[PAD{i}]", 0.0, Kind.UNUSED))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_unk_token_id(model.trainer_spec.unk_id)
    writer.add_add_space_prefix(normalizer.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(normalizer.remove_extra_whitespaces)
