"""The tokenizer against three peers: Meta's own (llama-models), llama.cpp and `tokenizers`."""

import base64
import contextlib
import http.client
import io
import json
import random
import re
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence
from urllib.parse import urlparse

import gguf
import numpy as np
import pytest
import tokenizers
import xllamacpp
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama import Tokenizer
from llama.text.vocabulary.byte_level import PATTERNS

CASES = json.loads((DATA / "tokenizer_cases.json").read_text())
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# Bytes of UTF-8 that SmolLM2's vocabulary has no token for: some control characters, and the first
# byte of what lies beyond U+3FFFF.
ABSENT = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


# --- strings -------------------------------------------------------------------------------------

_WORDS = {
    "words": "the quick Brown fox JUMPS über straße naïve Ōsaka tokenization llama antidis",
    "contractions": "'s 't 're 've 'm 'll 'd 'S 'RE 'Ll don't we'Ve I'M ’s '' 'x",
    "digits": "0 7 42 123 1234 1234567 3.14 1,000 ٣٤ ๓ ५६ ² ½ Ⅷ １２",
    "cyrillic, greek": "привет Ёж λόγος Ωμέγα",
    "right to left": "שלום مرحبا بِسْمِ עִבְרִית",
    "marks": "हिन्दी ที่นี่ க்ஷ é ñ á̈ ﷺ",
    "cjk": "你好 世界 日本語 カタカナ 한국어 ，。 「」",
    "emoji": "😀 👩\u200d👩\u200d👧 👍🏽 🇫🇷 ☀️ 🏴\U000e0067\U000e007f",
    "punctuation": "! ? ... -- – “ ” @#$ %^& */ => :: \\ ~ `` <> </s>",
}
PIECES = {
    **{kind: words.split() for kind, words in _WORDS.items()},
    "code": ["def f(x):", "\treturn x+1", "{'a': [1]}", "if (a&&b){", "//", "#!", "http://a.b/c?d=1"],
    "spaces": [" ", " ", " ", "  ", "   ", "\t", "\t ", " " * 9, "\u00a0", "\u2003", "\u3000"],
    "newlines": ["\n", "\n\n", "\r\n", " \n", "\n ", "\r", "\n\t", "   \n\n  ", "\u2028", "\x0b"],
    "invisible": ["\u200b", "\u200d", "\ufeff", "\u0301", "\u00ad", "\ufe0f"],
    "names": ["<|eot_id|>", "<|im_end|>", "<|begin_of_text|>", "<|", "|>", "<|endoftext|>"],
}  # fmt: skip


def random_texts(seed: int, n: int) -> List[str]:
    """Texts that mix scripts, white space and everything else that the patterns tell apart."""
    rng = random.Random(seed)
    kinds = list(PIECES)
    texts = []
    for _ in range(n):
        few = rng.sample(kinds, rng.randint(1, 6)) + ["spaces"] * rng.randint(0, 2)
        parts = []
        for _ in range(rng.randint(1, 24)):
            if rng.random() < 0.03:  # any character of the first two planes
                code = rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x20, 0x20000)])
                parts.append("" if 0xD800 <= code < 0xE000 else chr(code))
            else:
                parts.append(rng.choice(PIECES[rng.choice(few)]))
        texts.append("".join(parts))
    return texts


def glued_tokens(seed: int, n: int, tokenizer: Tokenizer) -> List[str]:
    """Tokens put together without regard to sense: what tries the order of the merges hardest."""
    rng = random.Random(seed)
    special = set(tokenizer.special_tokens.values())
    texts = []
    while len(texts) < n:
        ids = [rng.randrange(tokenizer.n_words) for _ in range(rng.randint(2, 6))]
        text = tokenizer.decode([i for i in ids if i not in special])
        if "\ufffd" not in text:
            texts.append(text)
    return texts


def without_absent(text: str) -> str:
    return "".join(c for c in text if not ABSENT & set(c.encode()))


# --- fixtures and peers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def meta(llama3_tokenizer_path) -> MetaTokenizer:
    return MetaTokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def smollm(smollm2_path) -> Tokenizer:
    return Tokenizer(smollm2_path)


@pytest.fixture(scope="module", params=["llama3", "smollm"])
def either(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


class LlamaCpp:
    """llama.cpp's tokenizer, behind the server that its Python package runs in this process."""

    def __init__(self, path: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, 0
        self.server = xllamacpp.Server(params)
        self.connection = http.client.HTTPConnection(urlparse(self.server.listening_address).netloc)

    def encode(self, text: str, special: bool = False) -> List[int]:
        return self._post("/tokenize", content=text, parse_special=special)["tokens"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._post("/detokenize", tokens=list(ids))["content"]

    def _post(self, url: str, **body) -> dict:
        self.connection.request("POST", url, json.dumps(body))
        return json.loads(self.connection.getresponse().read())


@pytest.fixture(scope="module")
def llama_cpp(smollm2_path) -> LlamaCpp:
    return LlamaCpp(smollm2_path)


def write_gguf(
    path: Path,
    tokens: Optional[Sequence[str]] = None,
    merges: Optional[Sequence[str]] = None,
    *,
    pre: Optional[str] = "gpt-2",
    kind: Optional[str] = "gpt2",
    types: Optional[Sequence[int]] = None,
    eos: Optional[int] = 0,
    bos: Optional[int] = None,
    weights: bool = True,
) -> Path:
    """A vocabulary, and the smallest Llama around it, without which llama.cpp doesn't open it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    if kind is not None:
        writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if tokens is not None:
        writer.add_token_list(tokens)
        writer.add_token_types(types or [NORMAL] * len(tokens))
    if merges is not None:
        writer.add_token_merges(merges)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if weights and tokens is not None:
        writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float16))
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class SmallBPE:
    """A byte-level BPE vocabulary trained by `tokenizers` on the strings of this file."""

    def __init__(self):
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=sorted(alphabet), show_progress=False
        )
        trained.train_from_iterator(random_texts(0, 400), trainer)
        self.model = json.loads(trained.to_str())["model"]
        self.tokens = sorted(self.model["vocab"], key=self.model["vocab"].get)
        self.merges = [" ".join(pair) for pair in self.model["merges"]]

    def peer(self, pre: str) -> tokenizers.Tokenizer:
        merges = [tuple(merge.split(" ")) for merge in self.merges]
        whole, gpt2 = pre == "llama-bpe", pre == "gpt-2"
        peer = tokenizers.Tokenizer(models.BPE(self.model["vocab"], merges, ignore_merges=whole))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
        cut = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pre]), "isolated")
        peer.pre_tokenizer = byte_level if gpt2 else pre_tokenizers.Sequence([cut, byte_level])
        peer.decoder = decoders.ByteLevel()
        return peer


@pytest.fixture(scope="module")
def small() -> SmallBPE:
    return SmallBPE()


def bytes_to_stand_ins() -> Dict[int, str]:
    """GPT-2's alphabet, derived here from what `tokenizers` does with each byte."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    found: Dict[int, str] = {}
    for c in map(chr, [*range(0x80), *range(0x80, 0x800, 0x20), *range(0x80, 0xC0)]):
        found.update(zip(c.encode(), split(c)[0][0], strict=True))
    for c in map(chr, [*range(0x800, 0x10000, 0x800), *range(0x10000, 0x110000, 0x8000)]):
        if not 0xD800 <= ord(c) < 0xE000:
            found.update(zip(c.encode(), split(c)[0][0], strict=True))
    # Bytes that UTF-8 never has, in the order in which GPT-2 lists the printable ones.
    found.update({b: chr(b) for b in (0xC0, 0xC1, *range(0xF5, 0x100))})
    return found


@pytest.fixture(scope="module")
def llama3_gguf(llama3_tokenizer_path, tmp_path_factory) -> Path:
    """Meta's tokenizer.model as converters write it into a .gguf file, with every merge."""
    path = tmp_path_factory.mktemp("llama3") / "llama3.gguf"
    stand_ins = bytes_to_stand_ins()
    assert sorted(stand_ins) == list(range(256))
    ranks = {}
    for line in llama3_tokenizer_path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    name = {token: "".join(map(stand_ins.__getitem__, token)) for token in ranks}
    merges = []
    for token in ranks:  # in the order of their ranks
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [(a, b) for a, b in splits if a in ranks and b in ranks]
        splits.sort(key=lambda split: (ranks[split[0]], ranks[split[1]]))
        merges += [f"{name[a]} {name[b]}" for a, b in splits]
    special = MetaTokenizer(llama3_tokenizer_path).special_tokens
    return write_gguf(
        path,
        [name[token] for token in ranks] + list(special),
        merges,
        pre="llama-bpe",
        types=[NORMAL] * len(ranks) + [CONTROL] * len(special),
        eos=special["<|end_of_text|>"],
        bos=special["<|begin_of_text|>"],
    )


def assert_same_ids(ours, theirs, texts: Sequence[str]) -> None:
    wrong = [(text, a, b) for text in texts if (a := ours(text)) != (b := theirs(text))]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, first {wrong[0]!r}"


def plain(tokenizer: Tokenizer):
    return lambda text: tokenizer.encode(text, bos=False, eos=False)


# --- recorded ids --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_recorded_ids_of_both_vocabularies_and_back(case, llama3, smollm):
    assert plain(llama3)(case["text"]) == case["llama3"]
    assert llama3.decode(case["llama3"]) == case["text"]
    assert plain(smollm)(case["text"]) == case["smollm2"]
    assert smollm.decode(case["smollm2"]) == case["text"]


def test_golden_ids_of_metas_own_test(llama3):
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert llama3.encode("This is a test sentence.", bos=True, eos=True) == ids
    assert llama3.decode(ids) == "<|begin_of_text|>This is a test sentence.<|end_of_text|>"


# --- Llama 3 against Meta's tokenizer ------------------------------------------------------------


def test_attributes_are_metas(llama3, meta):
    assert llama3.n_words == meta.n_words == 128256
    assert llama3.bos_id == meta.bos_id == 128000
    assert llama3.eos_id == meta.eos_id == 128001
    assert llama3.pad_id == meta.pad_id == 128004
    assert llama3.stop_tokens == set(meta.stop_tokens) == {128001, 128008, 128009}
    assert llama3.special_tokens == meta.special_tokens
    assert len(llama3.special_tokens) == 256
    assert llama3.add_bos and llama3.chat_template is None


def test_ids_are_metas_on_generated_texts(llama3, meta):
    texts = random_texts(1, 4000) + glued_tokens(2, 1500, llama3)
    assert_same_ids(plain(llama3), lambda s: meta.encode(s, bos=False, eos=False), texts)


def test_lone_surrogates_encode_as_metas_do(llama3, meta):
    for text in ("\ud800", "a\udfffb \ud83d\ude00", "\ud83d"):
        assert plain(llama3)(text) == meta.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("text", ["", "a", "<|eot_id|>"])
def test_bos_and_eos_stand_where_metas_do(llama3, meta, text, bos, eos):
    assert llama3.encode(text, bos=bos, eos=eos) == meta.encode(text, bos=bos, eos=eos)


LONG = {
    **{
        f"{n} {name}": c * n
        for n in (24_999, 25_000, 25_001, 60_000)
        for name, c in {"letters": "a", "spaces": " ", "newlines": "\n", "digits": "7"}.items()
    },
    "letters among words": "so " * 99 + "ab" * 20_000 + " it" * 99,
    "spaces among words": "so " * 99 + " \t" * 20_000 + " it" * 99,
    "alternating long runs": ("x" * 25_001 + " " * 25_001) * 3,
    "runs just short of a cut": ("x" * 24_999 + " " * 24_999) * 3 + "x" * 25_000,
    "Python's spaces that aren't Unicode's": "\x1c" * 30_000 + "a\x1f" * 30_000,
    "Unicode's spaces": "\u3000\u00a0\x85" * 12_000 + "é" * 25_001,
    "400,001 letters": "a" * 400_001,
    "a cut in a special token": "a " * 199_997 + "<|eot_id|>" * 3,
}


@pytest.mark.parametrize("name", LONG)
def test_long_runs_are_cut_where_meta_cuts(llama3, meta, name):
    text = LONG[name]
    for special in (frozenset(), "all"):
        theirs = meta.encode(text, bos=True, eos=True, allowed_special=special)
        assert llama3.encode(text, bos=True, eos=True, allowed_special=special) == theirs


def test_texts_beyond_400_000_characters_are_cut_where_meta_cuts(llama3, meta):
    text = " ".join(random_texts(3, 22_000))
    assert 800_000 < len(text) < 2_000_000
    ids = plain(llama3)(text)
    assert ids == meta.encode(text, bos=False, eos=False)
    assert ids != llama3.model.encode(text, disallowed_special=())  # the cuts do show
    assert llama3.decode(ids) == text


SPECIAL_TEXTS = [
    "<|eot_id|>",
    "a<|eot_id|>b<|begin_of_text|>",
    "<|eot_id|><|eot_id|>",
    "<|eot_id|<|eot_id|>|>",
    "<|reserved_special_token_1|><|reserved_special_token_10|><|reserved_special_token_247|>",
    "<|reserved_special_token_248|><|EOT_ID|>< |eot_id|>",
    "no names at all",
    *random_texts(4, 100),
]


@pytest.mark.parametrize(
    "allowed",
    [None, frozenset(), "all", {"<|eot_id|>"}, {"<|begin_of_text|>", "<|eom_id|>"}, {"no names"}],
    ids=["none", "empty", "all", "one", "two", "unknown"],  # a set's repr has no fixed order
)
def test_names_in_text_become_ids_only_where_allowed(llama3, meta, allowed):
    given_allowed = {} if allowed is None else {"allowed_special": allowed}
    for text in SPECIAL_TEXTS:
        ids = llama3.encode(text, bos=False, eos=False, **given_allowed)
        assert ids == meta.encode(text, bos=False, eos=False, **given_allowed)
        if not allowed:
            assert max(ids) < 128000
    if allowed == "all":
        assert (
            llama3.encode("a<|eot_id|>", bos=False, eos=False, allowed_special="all")[-1]
            == (llama3.special_tokens["<|eot_id|>"])
        )


@pytest.mark.parametrize("disallowed", ["all", {"<|eot_id|>"}, ["<|eot_id|>"], ()], ids=repr)
@pytest.mark.parametrize("allowed", [frozenset(), "all", {"<|eot_id|>"}], ids=repr)
def test_disallowed_names_raise_where_metas_do(llama3, meta, allowed, disallowed):
    def outcome(tokenizer, text):
        try:
            return tokenizer.encode(
                text,
                bos=False,
                eos=False,
                allowed_special=allowed,
                disallowed_special=disallowed,
            )
        except ValueError:
            return "refused"

    outcomes = [outcome(llama3, text) for text in SPECIAL_TEXTS[:8]]
    assert outcomes == [outcome(meta, text) for text in SPECIAL_TEXTS[:8]]
    assert ("refused" in outcomes) == (
        (disallowed == "all" and allowed != "all") or (disallowed not in ("all", ()))
    )


# --- GGUF against llama.cpp ----------------------------------------------------------------------


def test_ids_are_llama_cpps_on_generated_texts(smollm, llama_cpp):
    texts = random_texts(5, 3000) + glued_tokens(6, 1500, smollm)
    assert_same_ids(plain(smollm), llama_cpp.encode, texts)


def test_special_names_are_found_where_llama_cpp_finds_them(smollm, llama_cpp):
    names = list(smollm.special_tokens)
    rng = random.Random(7)
    texts = [
        "".join(rng.choice([*names, "a", " ", "<", "|>"]) for _ in range(6)) for _ in range(300)
    ]
    assert_same_ids(
        lambda s: smollm.encode(s, bos=False, eos=False, allowed_special="all"),
        lambda s: llama_cpp.encode(s, special=True),
        texts,
    )
    assert_same_ids(plain(smollm), llama_cpp.encode, texts)


def test_every_single_token_encodes_as_in_llama_cpp(smollm, llama_cpp):
    texts = [smollm.decode([i]) for i in range(0, smollm.n_words, 5)]
    assert_same_ids(
        plain(smollm), llama_cpp.encode, [text for text in texts if "\ufffd" not in text]
    )


def test_characters_whose_bytes_have_no_token_are_dropped_as_llama_cpp_drops_them(
    smollm, llama_cpp
):
    missing = [chr(i) for i in range(0x80) if not plain(smollm)(chr(i))]
    assert {ord(c) for c in missing} == {b for b in ABSENT if b < 0x80}
    texts = [f"a{chr(i)}b {chr(i)} {chr(i)}{chr(i)}" for i in range(1, 0x80)]
    texts += [f"x{chr(i)}y" for i in (0x40000, 0x4FFFF, 0x80000, 0xBFFFF, 0xC0000, 0x10FFFF)]
    assert_same_ids(plain(smollm), llama_cpp.encode, texts)
    assert smollm.decode(plain(smollm)("a\x04b")) == "ab"


def test_decode_is_llama_cpps(smollm, llama_cpp):
    rng = random.Random(8)
    special = set(smollm.special_tokens.values())
    for _ in range(300):
        ids = plain(smollm)("".join(rng.choices(random_texts(rng.randrange(9999), 3), k=2)))
        ids = [i for i in ids if i not in special]
        assert smollm.decode(ids) == llama_cpp.decode(ids)


def test_llama3_in_a_gguf_file_is_the_same_vocabulary(llama3, llama3_gguf):
    ours = Tokenizer(llama3_gguf)
    for name in ("n_words", "bos_id", "eos_id", "stop_tokens", "special_tokens", "add_bos"):
        assert getattr(ours, name) == getattr(llama3, name)
    texts = random_texts(9, 1500) + glued_tokens(10, 500, llama3) + [c["text"] for c in CASES]
    assert_same_ids(plain(ours), plain(llama3), texts)
    # It isn't cut as Meta's file is, but it is cut before tiktoken's patterns give up.
    for text in (" " * 399_999 + "a", " " * 1_000_000, "\n" * 500_000, ("a" * 600_000) + " b"):
        assert ours.decode(plain(ours)(text)) == text
    theirs = LlamaCpp(llama3_gguf)
    assert_same_ids(plain(ours), theirs.encode, texts)


# --- small vocabularies --------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "llama4"])
def test_small_vocabularies_encode_as_in_tokenizers(small, tmp_path, pre):
    ours = Tokenizer(write_gguf(tmp_path / "v.gguf", small.tokens, small.merges, pre=pre))
    peer = small.peer(pre)
    texts = random_texts(11, 1500) + glued_tokens(12, 500, ours)
    assert_same_ids(plain(ours), lambda s: peer.encode(s).ids, texts)
    assert all(ours.decode(plain(ours)(text)) == text for text in texts)


@pytest.mark.parametrize("pre", sorted(PATTERNS.keys() - {"llama4"}))
def test_small_vocabularies_encode_as_in_llama_cpp(small, tmp_path, pre):
    """With every type of token: only user-defined ones are ever matched in ordinary text. Llama 4's
    classes of upper and lower case are not in llama.cpp, which takes A-Z and a-z for them."""
    extra = {
        "<ctl>": CONTROL, "<|im_end|>": CONTROL, "<use>": USER_DEFINED, "<use> x": USER_DEFINED,
        "   ": USER_DEFINED, "the end": USER_DEFINED, "<pad>": UNUSED, "ĠunreachableĠword": NORMAL,
    }  # fmt: skip
    if pre == "llama-bpe":
        del extra["ĠunreachableĠword"]
    tokens = small.tokens + list(extra)
    path = write_gguf(
        tmp_path / "v.gguf",
        tokens,
        small.merges,
        pre=pre,
        types=[NORMAL] * len(small.tokens) + list(extra.values()),
    )
    ours, theirs = Tokenizer(path), LlamaCpp(path)
    rng = random.Random(13)
    pieces = [*extra, " ", "x", "<use", ">", "  ", " unreachable word", *random_texts(14, 40)]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 7))) for _ in range(700)]
    assert_same_ids(plain(ours), theirs.encode, random_texts(15, 700) + texts)
    assert_same_ids(
        lambda s: ours.encode(s, bos=False, eos=False, allowed_special="all"),
        lambda s: theirs.encode(s, special=True),
        texts,
    )


@pytest.fixture
def typed(small, tmp_path) -> Tokenizer:
    extra = {"<ctl>": CONTROL, "<use>": USER_DEFINED, "<pad>": UNUSED, "Ġnever": NORMAL}
    return Tokenizer(
        write_gguf(
            tmp_path / "v.gguf",
            small.tokens + list(extra) + [small.tokens[-1]],
            small.merges,
            types=[NORMAL] * len(small.tokens) + [*extra.values(), NORMAL],
            weights=False,
        )
    )


def test_user_defined_tokens_are_matched_in_text_and_control_tokens_are_not(typed):
    n = typed.n_words - 5
    assert plain(typed)("<use><use>") == [n + 1, n + 1]
    assert n + 1 in plain(typed)("a <use>b")
    assert n not in plain(typed)("a <ctl>b <ctl>")
    ids = typed.encode("<ctl><use>", bos=False, eos=False, allowed_special={"<ctl>"})
    assert ids == [n, n + 1]
    with pytest.raises(ValueError, match="<ctl>"):
        typed.encode("<ctl>", bos=False, eos=False, disallowed_special="all")


def test_tokens_that_nothing_encodes_to_still_decode(typed):
    n = typed.n_words - 5
    assert typed.decode([n + 3]) == " never"
    assert typed.decode([n, n + 1, n + 2]) == "<ctl><use><pad>"
    assert n + 3 not in typed.encode("a never", bos=False, eos=False, allowed_special="all")
    assert n + 3 not in typed.encode("aĠnever", bos=False, eos=False, allowed_special="all")
    assert set(typed.special_tokens) == {"<ctl>", "<use>"}


def test_a_token_listed_twice_decodes_under_both_ids(typed, small):
    once, again = len(small.tokens) - 1, typed.n_words - 1
    assert typed.decode([once]) == typed.decode([again]) != ""


def test_text_cannot_be_merged_into_a_control_token(small, tmp_path):
    tokens = [*small.tokens, "<<", "<<>>", ">>"]
    merges = [*small.merges, "< <", "> >", "<< >>"]
    types = [NORMAL] * len(small.tokens) + [NORMAL, CONTROL, NORMAL]
    path = write_gguf(tmp_path / "v.gguf", tokens, merges, types=types, weights=False)
    ours = Tokenizer(path)
    control = ours.special_tokens["<<>>"]
    assert control not in plain(ours)("<<>> <<>>")
    assert ours.decode(plain(ours)("<<>>")) == "<<>>"


# --- time ----------------------------------------------------------------------------------------

REPEATED = {
    "letters": "a", "spaces": " ", "newlines": "\n", "digits": "7", "letter after space": " a",
    "digit after space": " 7", "punctuation": ".", "two-byte letters": "é", "emoji": "😀",
    "runs short of Meta's cut": "a" * 24_999 + " ",
    "spaces short of Meta's cut": " " * 24_999 + "a",
}  # fmt: skip


def seconds(tokenizer: Tokenizer, text: str) -> float:
    """Of the processor's time, which other work on the machine doesn't stretch."""
    start = time.thread_time()
    ids = plain(tokenizer)(text)
    taken = time.thread_time() - start
    assert tokenizer.decode(ids) == text
    return taken


@pytest.mark.parametrize("name", REPEATED)
def test_time_to_encode_grows_linearly(either, name):
    unit = REPEATED[name]
    text = (unit * (1_000_000 // len(unit) + 1))[:1_000_000]
    slow, fast = seconds(either, text), seconds(either, text[:100_000])
    assert slow <= 20 * fast + 0.5, (
        f"{fast:.3f} s for 100,000 characters, {slow:.3f} s for 1,000,000"
    )


def test_a_run_short_of_the_cut_takes_no_longer_than_words(either):
    """A run is looked at once, not once from each of its characters."""
    words = "b " * 250_000
    assert seconds(either, "a" * 200_000 + words) <= 10 * seconds(either, words) + 1


# --- there and back ------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.text())
def test_llama3_gives_any_text_back(llama3, text):
    assert llama3.decode(plain(llama3)(text)) == text


@settings(max_examples=300)
@given(st.text().map(without_absent))
def test_smollm2_gives_any_text_back_whose_bytes_it_has(smollm, text):
    assert smollm.decode(plain(smollm)(text)) == text


@settings(max_examples=200)
@given(data=st.data())
def test_decoding_in_pieces_gives_the_bytes_of_the_whole(either, data):
    ids = data.draw(st.lists(st.integers(0, either.n_words - 1), max_size=20))
    cut = data.draw(st.integers(0, len(ids)))
    whole = either.decode_bytes(ids)
    assert whole == either.decode_bytes(ids[:cut]) + either.decode_bytes(ids[cut:])
    assert either.decode(ids) == whole.decode("utf-8", errors="replace")


def test_decode_is_tiktokens_for_every_id(llama3, meta):
    for i in range(llama3.n_words):
        assert llama3.decode_bytes([i]) == meta.model.decode_single_token_bytes(i)


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, "n_words", 10**9, 2**31, 2**32, 10**30])
def test_ids_outside_of_the_vocabulary_are_named(either, wrong):
    wrong = either.n_words if wrong == "n_words" else wrong
    with pytest.raises(ValueError, match=rf"{wrong}\b.* {either.n_words - 1}$"):
        either.decode([5, wrong, 6])
    assert either.decode([either.n_words - 1])


@pytest.mark.parametrize("wrong", [None, b"bytes", 5, ["a"]], ids=repr)
def test_encode_takes_only_strings(either, wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        either.encode(wrong, bos=False, eos=False)


def test_bos_without_a_bos_token_is_refused(small, tmp_path):
    ours = Tokenizer(write_gguf(tmp_path / "v.gguf", small.tokens, small.merges, weights=False))
    assert ours.bos_id is None and not ours.add_bos
    with pytest.raises(ValueError, match="bos"):
        ours.encode("a", bos=True, eos=False)
    assert ours.encode("", bos=False, eos=True) == [ours.eos_id]


# --- wrong files ---------------------------------------------------------------------------------


def cut_in_a_line(data: bytes) -> bytes:
    return data[: data.index(b"\n", 600_000) + 5]


def cut_in_a_rank(data: bytes) -> bytes:
    return data[: data.index(b"\n", 600_000) - 2]


WRONG_FILES = {
    "SentencePiece": lambda _: b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>" * 9,
    "JSON": lambda _: b'{"version": "1.0", "truncation": null}',
    "JSON list": lambda _: b'[\n "a"\n]',
    "web page": lambda _: b"<!DOCTYPE html><html><body>Access denied</body></html>",
    "web page after a newline": lambda _: b"\n\n<html>\n<body>Access denied</body></html>",
    "Git LFS pointer": lambda _: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n"
    ),
    "empty": lambda _: b"",
    "newlines": lambda _: b"\n\n\n",
    "zip": lambda _: b"PK\x03\x04" + bytes(500),
    "random bytes": lambda _: random.Random(16).randbytes(5000),
    "cut in a line": cut_in_a_line,
    "cut in a rank": cut_in_a_rank,
    "cut at an early line": lambda data: b"".join(data.splitlines(True)[:200]),
    "without its first lines": lambda data: b"".join(data.splitlines(True)[1:]),
    "without a line in the middle": lambda data: data[:9000] + data[data.index(b"\n", 9000) + 1 :],
    "a token twice": lambda data: data + data.split()[0] + b" 128000\n",
    "ranks too high": lambda data: re.sub(rb"127999", b"128999", data),
    "gguf cut off": lambda _: b"GGUF\x03\x00\x00\x00" + b"\xff" * 9,
    "gguf without anything": lambda _: b"GGUF\x03\x00\x00\x00" + bytes(16),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_refused_by_name(tmp_path, llama3_tokenizer_path, name):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(WRONG_FILES[name](llama3_tokenizer_path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        Tokenizer(path)
    assert len(str(caught.value)) < 400 + len(str(path))
    if name in ("SentencePiece", "JSON", "Git LFS pointer"):
        assert name in str(caught.value)


def test_missing_files_and_directories_are_refused_by_name(tmp_path):
    for path in (tmp_path, tmp_path / "none.model"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            Tokenizer(path)
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            Tokenizer(str(path))


WRONG_GGUFS = {
    "kind rwkv": ({"kind": "rwkv"}, "'rwkv'"),
    "kind llama without scores": ({"kind": "llama"}, "scores isn't a list"),
    "kind missing": ({"kind": None}, r"tokenizer\.ggml\.model"),
    "rule unknown": ({"pre": "qwen2"}, "'qwen2'"),
    "rule missing": ({"pre": None}, "none"),
    "tokens missing": ({"tokens": None}, r"tokenizer\.ggml\.tokens"),
    "merges missing": ({"merges": None}, r"tokenizer\.ggml\.merges"),
    "eos missing": ({"eos": None}, r"eos_token_id"),
    "eos out of range": ({"eos": 5000}, "5000"),
    "bos out of range": ({"bos": 5000}, "5000"),
    "too few types": ({"types": [1] * 300}, "type"),
    "tokens that are numbers": ({"tokens": list(range(900))}, r"tokenizer\.ggml\.tokens"),
    "merges that are numbers": ({"merges": list(range(900))}, r"tokenizer\.ggml\.merges"),
    "a merge without its token": ({"merges": ["a b", "ab c"] * 2 + ["q zq"]}, "merge"),
}


@pytest.mark.parametrize("name", WRONG_GGUFS)
def test_vocabularies_that_are_not_read_are_refused_by_name(small, tmp_path, monkeypatch, name):
    changes, message = WRONG_GGUFS[name]
    for method, key in (("add_token_list", "tokens"), ("add_token_merges", "merges")):
        monkeypatch.setattr(  # the package's own method, without its conversion to strings
            gguf.GGUFWriter,
            method,
            lambda self, values, key=key: self.add_array(f"tokenizer.ggml.{key}", values),
        )
    fields = {"tokens": small.tokens, "merges": small.merges, "weights": False} | changes
    path = write_gguf(tmp_path / "v.gguf", **fields)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)


def test_merges_in_another_order_than_ids_are_refused(small, tmp_path):
    """tiktoken would take them in the order of ids and give other tokens without a word."""
    merges = small.merges[:100] + small.merges[:99:-1]
    path = write_gguf(tmp_path / "v.gguf", small.tokens, merges, weights=False)
    with pytest.raises(ValueError, match="order") as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)


def test_reading_a_vocabulary_prints_nothing(smollm2_path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        Tokenizer(smollm2_path)
    assert not out.getvalue()
