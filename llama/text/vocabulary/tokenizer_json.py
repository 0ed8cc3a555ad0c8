"""Hugging Face's tokenizer.json, with what stands beside it.

Where the file's own settings prove that it is byte-level BPE as tiktoken does it, tiktoken encodes,
being faster. A SentencePiece model beside it is what it was made from, and is taken. Anything else
is left to the `tokenizers` package.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import tokenizers

from llama.text.files import read_object
from llama.text.vocabulary import spm
from llama.text.vocabulary.base import (
    MAX_WORDS,
    PREFIX_ONCE,
    STOP_NAMES,
    Kind,
    Vocabulary,
    check_ids,
)
from llama.text.vocabulary.byte_level import NotByteLevelError, build, pre_of
from llama.text.vocabulary.config import FLAGS, TokenizerConfig


def read(path: Path) -> Vocabulary:
    """Raises ValueError for what is no tokenizer.json, or one without an end of text."""
    config, data = TokenizerConfig(path), _checked(path)
    try:
        by_id, types = _tokens(path, data, config)
        ids = {token: i for i, token in by_id.items()}
        eos_id = config.named("eos_token", ids)
        eos_id = config.stop[0] if eos_id is None and config.stop else eos_id
        bos_id, pad_id = (config.named(f"{key}_token", ids) for key in ("bos", "pad"))
        if eos_id is None:
            raise ValueError(
                f"no eos token in tokenizer_config.json or generation_config.json by {path}"
            )
        processor = json.dumps(data.get("post_processor"), ensure_ascii=False)
        processed = bos_id is not None and f'"{by_id[bos_id]}"' in processor
        common: Dict[str, Any] = dict(
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            add_bos=processed or config.add_bos(bos_id, default=False),
            chat_template=config.chat_template,
        )
        stop = {eos_id, *config.stop}
        try:
            pre, merges = _byte_level(data, by_id)
            tokens = [by_id[i] for i in range(len(by_id))]
            kinds = [types[i] for i in range(len(by_id))]
            vocabulary = build(path, pre, tokens, kinds, merges, stop=stop, **common)
            return vocabulary._replace(**config.strips())
        except NotByteLevelError:
            pass
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: model or added_tokens is of no known tokenizer.json: {error!r}"
        ) from None

    if config.prefix_once is None:
        config.prefix_once = PREFIX_ONCE in json.dumps(data["pre_tokenizer"])
    elif data["model"].get("byte_fallback"):  # LlamaTokenizer takes its own rule
        scheme = "first" if config.prefix_once else "always"
        data |= {"normalizer": None, "pre_tokenizer": spm.metaspace(scheme)}
    original = path.with_name("tokenizer.model")
    model = original.read_bytes() if original.is_file() else b""
    # Its pieces may have been renamed, to the names of a chat format's tokens.
    if model[:1] == b"\n" and spm.has_pieces(original, model, by_id):
        vocabulary = spm.from_model(original, model, config)
        if vocabulary.n_words == max(by_id) + 1:
            return vocabulary
    if refusal := _refusal(data):
        # The package doesn't say where: it's the key without whose value it is content.
        neutral: Dict[str, Any] = {"version": "1.0", **dict.fromkeys(_NULLABLE), "added_tokens": []}
        keys = [key for key in neutral if not _refusal(data | {key: neutral[key]})]
        raise ValueError(f"{path}: {(keys or ['model'])[0]} isn't usable: {refusal}")
    special = {by_id[i]: i for i, kind in types.items() if kind != Kind.NORMAL}
    check_ids(path, [bos_id, common["pad_id"], *stop], max(by_id) + 1)
    return Vocabulary(
        name=path.name,
        kind="json",
        special_tokens=special,
        user_defined=frozenset(by_id[i] for i, kind in types.items() if kind == Kind.USER_DEFINED),
        n_words=max(by_id) + 1,
        stop_tokens=stop | {special[name] for name in STOP_NAMES if name in special},
        model=json.dumps(data).encode(),
        **common,
        **config.strips(),
    )


_NULLABLE = (
    "truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"
)  # fmt: skip


def _checked(path: Path) -> Dict[str, Any]:
    """The file's object, with the types of its values checked and null where there is none."""
    kinds = {"model": dict, "added_tokens": list, **dict.fromkeys(_NULLABLE, dict)}
    data = dict.fromkeys(kinds) | read_object(path)
    for key, kind in kinds.items():
        value = data[key]
        if not isinstance(value, kind) and (value is not None or key == "model"):
            what = "array" if kind is list else "object"
            raise ValueError(f"{path}: {key}={value!r:.80} isn't a JSON {what}")
    return data | {"added_tokens": data["added_tokens"] or []}


def _refusal(data: Dict[str, Any]) -> str:
    """What the `tokenizers` package has against a tokenizer.json; nothing if it reads it."""
    try:
        tokenizers.Tokenizer.from_str(json.dumps(data)).encode("\ufffe")  # no vocabulary has it
    except Exception as error:  # the package raises no type of its own
        return str(error) or repr(error)
    return ""


def _tokens(path: Path, data: Dict[str, Any], config: TokenizerConfig) -> Any:
    """All tokens by id, and the type of each.

    Added tokens that only tokenizer_config.json has are put into `data`, as transformers does: with
    the id that their name has, or else the next one. `config` has all of them then.
    """
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: pairs of token and score
        vocab = {pair[0]: i for i, pair in enumerate(vocab)}
    by_id: Dict[int, str] = {i: token for token, i in vocab.items()}
    added = {token["id"]: token for token in data["added_tokens"]}
    by_id |= {i: token["content"] for i, token in added.items()}
    if not vocab or not all(type(i) is int and 0 <= i < MAX_WORDS for i in by_id):
        raise ValueError(f"{path}: ids in model.vocab or added_tokens aren't numbers from 0 up")
    ids = {token: i for i, token in by_id.items()}
    flags = dict.fromkeys(FLAGS, False)
    for _, token in sorted(config.tokens.items()):
        i = ids.setdefault(token["content"], max(by_id) + 1)
        by_id[i] = token["content"]
        normalized = {"normalized": not token.get("special")}
        added[i] = {**flags, **normalized, **added.get(i, {}), **token, "id": i}
    for name in config.named_tokens.values():
        if name in ids and ids[name] not in added:
            added[ids[name]] = {**flags, "id": ids[name], "content": name, "special": True}
    data["added_tokens"] = [added[i] for i in sorted(added)]
    config.tokens = added
    types = dict.fromkeys(by_id, Kind.NORMAL)
    types |= {i: Kind.CONTROL if t.get("special") else Kind.USER_DEFINED for i, t in added.items()}
    return by_id, types


def _byte_level(data: Dict[str, Any], by_id: Dict[int, str]) -> Tuple[str, List[str]]:
    """The rule for words and the merges, of byte-level BPE that tiktoken does exactly.

    Raises:
        NotByteLevelError: some setting asks for more.
    """
    model = data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    plain = not any(model.get(key) for key in ("byte_fallback", "dropout", "fuse_unk", *affixes))
    if kind != "BPE" or not plain or data.get("normalizer"):
        raise NotByteLevelError
    pre = pre_of(data["pre_tokenizer"] or {})
    if pre is None or (pre == "llama-bpe") != bool(model.get("ignore_merges")):
        raise NotByteLevelError
    for token in data["added_tokens"]:
        if token.get("single_word") and not token.get("special"):
            raise NotByteLevelError
    if sorted(by_id) != list(range(len(by_id))):
        raise NotByteLevelError
    merges: List[str] = [
        merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
        for merge in model["merges"]
    ]
    return pre, merges
