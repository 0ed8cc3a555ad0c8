"""A vocabulary written into other files: tokenizer.model, tokenizer.json, metadata of GGUF."""

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Dict, List, Tuple

from llama.vocabulary import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    byte_alphabet,
    llama3_special_tokens,
    split_rule,
)


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
    """Write a tokenizer beside weights: Meta's tokenizer.model where its rule gives the special
    tokens, else a tokenizer.json; returns the file."""
    ordinary = vocabulary.n_words - 256
    by_rule = llama3_special_tokens(ordinary) == vocabulary.special_tokens
    whole = sorted(vocabulary.ranks.values()) == list(range(ordinary))
    if by_rule and whole and vocabulary.pre == "llama-bpe" and not vocabulary.chat_template:
        path = directory / "tokenizer.model"
        lines = sorted(vocabulary.ranks.items(), key=lambda item: item[1])
        path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in lines))
        return path
    return write_tokenizer_json(vocabulary, directory)


def write_tokenizer_json(vocabulary: Vocabulary, directory: Path) -> Path:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json; returns the first."""
    tokens = tokens_of(vocabulary)
    special = sorted(vocabulary.special_tokens.items(), key=lambda item: item[1])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    processor: Dict[str, Any] = {**byte_level, "use_regex": False}
    if vocabulary.add_bos and vocabulary.bos_id is not None:
        bos = tokens[vocabulary.bos_id]
        first: Dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 0}}
        texts = [{"Sequence": {"id": text, "type_id": 0}} for text in "AB"]
        processor = {
            "type": "TemplateProcessing",
            "single": [first, texts[0]],
            "pair": [first, texts[0], first, texts[1]],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
        }
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": name not in vocabulary.user_defined,
            }
            for name, i in special
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split_rule(vocabulary.pre), {**byte_level, "use_regex": False}],
        },
        "post_processor": processor,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges_of(vocabulary),
        },
    }
    config: Dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": None if vocabulary.bos_id is None else tokens[vocabulary.bos_id],
        "eos_token": tokens[vocabulary.eos_id],
        "pad_token": tokens[vocabulary.pad_id],
        "add_bos_token": vocabulary.add_bos,
    }
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    generation = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": sorted(vocabulary.stop_tokens),
        "pad_token_id": vocabulary.pad_id,
    }
    path = directory / "tokenizer.json"
    for file, value in (
        (path, data),
        (directory / "tokenizer_config.json", config),
        (directory / "generation_config.json", generation),
    ):
        file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def write_gguf(vocabulary: Vocabulary, writer: Any, vocab_size: int) -> None:
    """Add a vocabulary to a gguf.GGUFWriter, filled up to vocab_size with unused tokens."""
    tokens = tokens_of(vocabulary)
    kinds = {i: CONTROL for i in vocabulary.special_tokens.values()}
    kinds |= {vocabulary.special_tokens[name]: USER_DEFINED for name in vocabulary.user_defined}
    types = [kinds.get(i, NORMAL) for i in range(len(tokens))]
    missing = range(len(tokens), vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in missing])
    writer.add_token_types(types + [UNUSED for _ in missing])
    writer.add_token_merges([f"{a} {b}" for a, b in merges_of(vocabulary)])
    if vocabulary.bos_id is not None:
        writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_pad_token_id(vocabulary.pad_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    if "<|eot_id|>" in vocabulary.special_tokens:
        writer.add_eot_token_id(vocabulary.special_tokens["<|eot_id|>"])
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
