"""SentencePiece and other vocabularies, against the packages that they were made for."""

import io
import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import List

import gguf
import pytest
import sentencepiece
import tokenizers
from conftest import ROOT, TINY, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import LlamaCpp, assert_same_ids, glued_tokens, plain, random_texts
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llama import Llama, Tokenizer, checkpoint
from llama.checkpoint import InMemory, meta
from llama.checkpoint.convert import convert
from llama.model import ModelArgs
from llama.text.llama2 import Llama2Format
from llama.text.templates import chat_format
from llama.text.vocabulary import writing
from llama.text.vocabulary.spm import metaspace

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
ODD = [
    "",
    " ",
    "  ",
    "▁",
    " ▁ ",
    "<s>",
    "</s>x<unk>",
    "<0x41>",
    "\n",
    " a",
    "a ",
    "a  b",
    "\x00",
    "⁇",
]


def train(**options) -> bytes:
    """A SentencePiece model as Meta trained Llama 2's: BPE, bytes for what it has no piece for."""
    texts, model = (
        [*(ROOT / "README.md").read_text().splitlines(), *random_texts(0, 600)],
        io.BytesIO(),
    )
    settings = dict(
        vocab_size=1200, model_type="bpe", byte_fallback=True, split_digits=True,
        allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**settings, **options}
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def spm_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(train())
    return path


@pytest.fixture(scope="module")
def spm(spm_path) -> Tokenizer:
    return Tokenizer(spm_path)


@pytest.fixture(scope="module")
def theirs(spm_path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(spm_path))


@pytest.fixture(scope="module")
def texts(spm) -> List[str]:
    return ODD + random_texts(1, 2000) + glued_tokens(2, 800, spm)


def write_gguf(tokenizer: Tokenizer, path: Path, vocab_size: int) -> Path:
    """The vocabulary in a file that llama.cpp opens, by way of our converter."""
    args = ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=vocab_size, hidden_dim=32)
    return checkpoint.gguf.write(InMemory(args, random_weights(args)), path, tokenizer=tokenizer)


# --- SentencePiece -------------------------------------------------------------------------------


def test_ids_and_texts_are_sentencepieces(spm, theirs, texts):
    assert spm.vocabulary.kind == "spm" and spm.n_words == theirs.get_piece_size()
    assert (spm.bos_id, spm.eos_id, spm.stop_tokens) == (1, 2, {2}) and spm.add_bos
    assert_same_ids(plain(spm), theirs.encode, texts)
    for text in texts:
        assert spm.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text)), text
    assert spm.encode("Hello", bos=True, eos=True) == [1, *theirs.encode("Hello"), 2]


def test_any_ids_decode_as_in_sentencepiece(spm, theirs):
    rng = random.Random(3)
    for _ in range(3000):
        ids = [rng.randrange(spm.n_words) for _ in range(rng.randint(0, 6))]
        expected = theirs.decode(ids)
        if "\ufffd" not in expected:  # how many of these stand for broken bytes is a convention
            assert spm.decode(ids) == expected, ids


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["<|im_start|>", "<tool>"]},
        {"control_symbols": ["<|end|>"], "pad_id": 3},
        {"byte_fallback": False},
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
    ],
    ids=str,
)
def test_models_of_other_kinds_are_sentencepieces_too(tmp_path, options):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(vocab_size=900, **options))
    ours = Tokenizer(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = ODD + random_texts(4, 300)
    texts += [f"a {name}{name} b" for name in ("<|im_start|>", "<tool>", "<|end|>")]
    assert_same_ids(plain(ours), theirs.encode, texts)
    if "remove_extra_whitespaces" not in options and options.get("model_type") != "unigram":
        for text in texts:
            assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text)), text
    if options.keys() & {"model_type", "normalization_rule_name"}:
        with pytest.raises(ValueError, match="isn't BPE or normalizes"):
            write_gguf(ours, tmp_path / "v.gguf", ours.n_words)
    else:
        again = Tokenizer(write_gguf(ours, tmp_path / "v.gguf", ours.n_words))
        assert_same_ids(plain(again), theirs.encode, texts)


def test_a_gguf_file_holds_the_same_vocabulary(spm, theirs, texts, tmp_path):
    path = write_gguf(spm, tmp_path / "v.gguf", spm.n_words + 3)
    ours = Tokenizer(path)
    assert_same_ids(plain(ours), theirs.encode, texts)
    assert ours.n_words == spm.n_words + 3 and ours.bos_id == 1 and ours.stop_tokens == {2}
    llama_cpp = LlamaCpp(path)
    assert_same_ids(plain(ours), llama_cpp.encode, [text for text in texts if "\x00" not in text])
    for text in random_texts(5, 200):
        assert ours.decode(plain(ours)(text)) == text
    names = ["<s>", "</s>", "<unk>"]
    rng = random.Random(6)
    special = ["".join(rng.choices([*names, "a", " b", "<"], k=5)) for _ in range(200)]
    for text in special:
        found = ours.encode(text, bos=False, eos=False, allowed_special="all")
        assert found == llama_cpp.encode(text, special=True), text


def test_names_in_text_become_ids_only_where_allowed(spm, theirs):
    def encode(text, **options):
        return spm.encode(text, bos=False, eos=False, **options)

    assert not {0, 1, 2} & set(encode("<s>hi</s><unk>"))
    assert encode("<s>hi</s>", allowed_special="all") == [1, *theirs.encode("hi"), 2]
    assert encode("<s>hi</s>", allowed_special={"</s>"})[-1] == 2
    assert 1 not in encode("<s>hi</s>", allowed_special={"</s>"})
    with pytest.raises(ValueError, match="'</s>'"):
        encode("hi</s>", disallowed_special="all")
    assert encode("hi", disallowed_special="all") == theirs.encode("hi")


@pytest.mark.parametrize("name", ["bytes", "cut off", "no pieces"])
def test_broken_models_are_refused(tmp_path, spm_path, name):
    data = {"bytes": b"\n" + bytes(range(256)), "no pieces": b"\n\x00",
            "cut off": spm_path.read_bytes()[:5000]}[name]  # fmt: skip
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="SentencePiece model"):
        Tokenizer(path)


def test_every_damaged_model_is_refused_or_encodes(tmp_path, spm_path):
    data, path, rng = spm_path.read_bytes(), tmp_path / "tokenizer.model", random.Random(7)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.choice([rng.randrange(1, 60), rng.randrange(1, len(data))])] = (
                rng.randrange(256)
            )
        path.write_bytes(damaged)
        try:
            tokenizer = Tokenizer(path)
            tokenizer.decode(tokenizer.encode("Hello 1", bos=False, eos=False))
        except ValueError:
            refused += 1
    assert 0 < refused < 300


def test_conversion_carries_a_sentencepiece_vocabulary(spm_path, tmp_path, theirs, texts):
    """From Meta's directory to Hugging Face's, to GGUF and back, with a template on the way."""
    args = ModelArgs(
        dim=32, n_layers=1, n_heads=2, vocab_size=theirs.get_piece_size(), hidden_dim=32
    )
    source = InMemory(args, random_weights(args))
    meta = convert(source, tmp_path / "meta", "meta", tokenizer_path=spm_path, quiet=True)
    assert (meta / "tokenizer.model").read_bytes() == spm_path.read_bytes()
    hf = convert(meta, tmp_path / "hf", "hf", quiet=True)
    config = json.loads((hf / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (hf / "tokenizer_config.json").write_text(json.dumps(config))
    file = convert(hf, tmp_path / "m.gguf", "gguf", quiet=True)
    back = convert(file, tmp_path / "back", "meta", quiet=True)
    for path in (hf, file, back):
        found = Tokenizer(checkpoint.open(path).tokenizer_path)
        assert found.chat_template == TEMPLATE and found.stop_tokens == {2} and found.add_bos
        assert_same_ids(plain(found), theirs.encode, texts[:600])
    peer = AutoTokenizer.from_pretrained(hf)
    words = [text for text in texts[:600] if "<" not in text and "\u2581" not in text]
    assert_same_ids(lambda s: peer(s, add_special_tokens=False).input_ids, theirs.encode, words)


# --- tokenizer.json ------------------------------------------------------------------------------


def like_llama_2(theirs: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """A SentencePiece BPE as a tokenizer.json, as fine-tunes of Llama 2 have it."""
    vocab = {theirs.id_to_piece(i): i for i in range(theirs.get_piece_size())}
    merges = []
    for piece, i in vocab.items():
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        merges += [(i, a, b) for a, b in splits if a in vocab and b in vocab and i > 258]
    peer = tokenizers.Tokenizer(
        models.BPE(vocab, [(a, b) for _, a, b in sorted(merges)], unk_token="<unk>",
                   fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    peer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    peer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    peer.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    peer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    return peer


def metaspace_unigram(texts: List[str]) -> tokenizers.Tokenizer:
    peer = tokenizers.Tokenizer(models.Unigram())
    peer.pre_tokenizer = pre_tokenizers.Metaspace()
    peer.decoder = decoders.Metaspace()
    peer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=3000, unk_token="<unk>", show_progress=False,
                                       special_tokens=["<unk>", "<s>", "</s>", "<|im_end|>"])
    )  # fmt: skip
    return peer


def odd_byte_level(texts: List[str]) -> tokenizers.Tokenizer:
    """Byte-level, but cut into words by a rule that isn't known here."""
    peer = tokenizers.Tokenizer(models.BPE())
    peer.normalizer = normalizers.NFC()
    peer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    peer.decoder = decoders.ByteLevel()
    peer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                   special_tokens=["<s>", "</s>", "<|im_end|>"])
    )  # fmt: skip
    return peer


@pytest.fixture(scope="module", params=["like Llama 2", "Unigram", "odd byte-level"])
def packaged(request, theirs, texts, tmp_path_factory):
    """A Tokenizer of the kind that is left to `tokenizers`, and the peer itself."""
    make = {
        "like Llama 2": lambda: like_llama_2(theirs),
        "Unigram": lambda: metaspace_unigram(texts),
        "odd byte-level": lambda: odd_byte_level(texts),
    }
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    peer = make[request.param]()
    peer.save(str(path))
    peer = tokenizers.Tokenizer.from_file(str(path))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(path)
    assert ours.vocabulary.kind == "json"
    peer.encode_special_tokens = True
    return ours, peer


def test_what_tiktoken_cannot_do_is_left_to_tokenizers(packaged, texts):
    ours, peer = packaged
    assert ours.n_words == peer.get_vocab_size() and ours.chat_template == TEMPLATE
    assert ours.stop_tokens == {ours.special_tokens["</s>"], ours.special_tokens["<|im_end|>"]}
    harmless = [text for text in texts if "<" not in text]
    assert len(harmless) > 1500
    assert_same_ids(plain(ours), lambda s: peer.encode(s, add_special_tokens=False).ids, harmless)
    for text in harmless:
        ids = plain(ours)(text)
        if (
            (expected := peer.decode(ids))
            and "\ufffd" not in expected
            and "<unk>" not in ours.decode(ids)
        ):
            assert ours.decode(ids) == expected, text


def test_typed_names_are_no_control_tokens_of_tokenizers(packaged):
    ours, _ = packaged
    control = set(ours.special_tokens.values()) - {ours.special_tokens.get("<unk>")}
    rng = random.Random(8)
    parts = [*ours.special_tokens, "a", " ", "<", "|", "im_end", ">", "<s", "▁", "</"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=6))
        assert control.isdisjoint(plain(ours)(text)), text
    named = ours.encode("<s>hi<|im_end|>", bos=False, eos=False, allowed_special="all")
    assert named == [ours.bos_id, *plain(ours)("hi"), ours.special_tokens["<|im_end|>"]]


def test_a_sentencepiece_model_beside_tokenizer_json_is_taken(spm_path, theirs, tmp_path, texts):
    like_llama_2(theirs).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(spm_path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<|im_end|>", "bos_token": "<s>"}'
    )
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert ours.vocabulary.kind == "spm" and ours.n_words == theirs.get_piece_size() + 1
    assert ours.eos_id == theirs.get_piece_size() == ours.special_tokens["<|im_end|>"]
    assert ours.stop_tokens == {2, ours.eos_id}
    assert_same_ids(plain(ours), theirs.encode, texts[:600])
    assert plain(ours)("<|im_end|>") == theirs.encode("<|im_end|>")
    path = write_gguf(ours, tmp_path / "v.gguf", ours.n_words)
    again = Tokenizer(path)
    assert again.special_tokens == ours.special_tokens and again.stop_tokens == ours.stop_tokens


@pytest.mark.parametrize(
    "name, kept",
    [("LlamaTokenizer", kept) for kept in ("tokenizer.model", "tokenizer.json", "both")]
    # Of a tokenizer.model alone this class makes one that leaves the space out altogether.
    + [("PreTrainedTokenizerFast", kept) for kept in ("tokenizer.json", "both")],
)
@pytest.mark.parametrize("once", [False, True])
def test_a_space_comes_before_the_sections_that_transformers_puts_it_before(
    spm_path, theirs, tmp_path, name, kept, once
):
    """Before a text alone, or after each special token, too: by the class, or by tokenizer.json."""
    config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>",
              "legacy": not once, "chat_template": TEMPLATE + "{{ eos_token }}x"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if kept != "tokenizer.json":
        (tmp_path / "tokenizer.model").write_bytes(spm_path.read_bytes())
    if kept != "tokenizer.model":
        data = json.loads(like_llama_2(theirs).to_str())
        if once and name != "LlamaTokenizer":  # which has a rule of its own
            data |= {"normalizer": None, "pre_tokenizer": metaspace("first")}
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    file = tmp_path / ("tokenizer.model" if kept == "tokenizer.model" else "tokenizer.json")
    ours, peer = Tokenizer(file), AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Hi", "Hi</s>Hi", "</s>Hi", "Hi</s>\nHi", "<s>Hi</s></s>Hi <unk>Hi"]
    texts += [" Hi", "  Hi</s> Hi"] if once else []  # SentencePiece itself has one more

    def assert_alike(ours, peer):
        for text in texts:
            ids = ours.encode(text, bos=False, eos=False, allowed_special="all")
            assert ids == peer.encode(text, add_special_tokens=False), text
        dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hi"}]
        expected = peer.apply_chat_template(dialog, tokenize=True, return_dict=False)
        assert chat_format(ours).encode_dialog_prompt(dialog) == expected

    assert_alike(ours, peer)
    again = tmp_path / "again"
    again.mkdir()
    writing.write_for_hugging_face(ours.vocabulary, again)
    assert_alike(Tokenizer(again / "tokenizer.json"), AutoTokenizer.from_pretrained(again))


CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def assert_chats_alike(ours: Tokenizer, peer) -> None:
    """The same ids as transformers' of a text and of a dialog, by a checkpoint's own template."""
    assert (ours.eos_id, ours.n_words) == (peer.eos_token_id, len(peer))
    dialog = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "x"}]
    expected = peer.apply_chat_template(dialog, tokenize=True, return_dict=False)
    assert chat_format(ours).encode_dialog_prompt(dialog) == expected


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("make", [like_llama_2, odd_byte_level])
def test_tokens_that_only_the_configuration_declares_are_added(
    theirs, texts, tmp_path, make, added
):
    """In added_tokens_decoder; or as bos and eos, which are in model.vocab alone."""
    data = json.loads(make(theirs if make is like_llama_2 else texts).to_str())
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ bos_token }}x</s>"}
    if added:
        names = ["<|im_start|>", "<|turn|>"]
        template = CHATML.replace("<|im_end|>", "<|turn|>")
        first = len({*data["model"]["vocab"], *(t["content"] for t in data["added_tokens"])})
        decoder = {i: {"content": name, "special": True} for i, name in enumerate(names, first)}
        config |= {"eos_token": names[1], "added_tokens_decoder": decoder}
        config["chat_template"] = template
    else:
        data["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert_chats_alike(ours, AutoTokenizer.from_pretrained(tmp_path))


def test_added_tokens_of_older_files_are_read(spm_path, theirs, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(spm_path.read_bytes())
    n = theirs.get_piece_size()
    added = tmp_path / "added_tokens.json"
    added.write_text(json.dumps({"<|im_end|>": n, "<|im_start|>": n + 1}))
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>",
              "chat_template": CHATML}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(tmp_path / "tokenizer.model")
    assert ours.vocabulary.user_defined == {"<|im_start|>"} and ours.stop_tokens == {2, n}
    assert_chats_alike(ours, AutoTokenizer.from_pretrained(tmp_path))
    added.write_text('{"<|im_end|>": "2"}')
    with pytest.raises(ValueError, match=r"added_tokens\.json.*isn't ids by name"):
        Tokenizer(tmp_path / "tokenizer.model")
    added.unlink()
    with pytest.raises(ValueError, match=r"eos_token='<\|im_end\|>' isn't one of"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("make", [like_llama_2, odd_byte_level, "smollm2", "spm"])
def test_tokens_take_white_space_with_them_as_in_tokenizers(
    spm_path, theirs, texts, smollm2_path, tmp_path, make, special
):
    """Tokens with lstrip and rstrip, in texts, dialogs, and after conversion."""
    if make == "smollm2":
        writing.write_for_hugging_face(Tokenizer(smollm2_path).vocabulary, tmp_path)
        peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    else:
        peer = odd_byte_level(texts) if make is odd_byte_level else like_llama_2(theirs)
    if make == "spm":
        (tmp_path / "tokenizer.model").write_bytes(spm_path.read_bytes())
    names = {"<|user|>": {"rstrip": True}, "<|sep|>": {"lstrip": True, "rstrip": True}}
    added = [AddedToken(n, normalized=False, special=special, **on) for n, on in names.items()]
    (peer.add_special_tokens if special else peer.add_tokens)(added)
    peer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}<|user|>\n{{ m.content }} <|sep|>\n{% endfor %}"
    eos = "<|im_end|>" if make == "smollm2" else "</s>"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": eos, "chat_template": template})
    )
    ours = Tokenizer(tmp_path / "tokenizer.json")
    again = tmp_path / "again"
    again.mkdir()
    writing.write_for_hugging_face(ours.vocabulary, again)
    dialog = [{"role": "user", "content": text} for text in ("Hi", "  Hi", "Hi\n")]
    for path in (tmp_path, again):
        ours, peer = Tokenizer(path / "tokenizer.json"), AutoTokenizer.from_pretrained(path)
        for text in ("<|user|> \n Hi", "Hi <|sep|> Hi", "<|sep|><|user|> \t<|sep|>  ", " <|user|>"):
            ids = ours.encode(text, bos=False, eos=False, allowed_special="all")
            assert ids == peer.encode(text, add_special_tokens=False), text
        expected = peer.apply_chat_template(dialog, tokenize=True, return_dict=False)
        assert chat_format(ours).encode_dialog_prompt(dialog) == expected


def test_unigram_models_are_written_as_such(tmp_path, texts):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(vocab_size=900, model_type="unigram"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    written = tmp_path / "written"
    written.mkdir()
    writing.write_for_hugging_face(Tokenizer(path).vocabulary, written)
    peer = AutoTokenizer.from_pretrained(written)
    # Not runs of spaces, which may be cut in several ways of the same score.
    words = [re.sub(r"\s\s+", " ", text) for text in texts[:600]]
    words = [text for text in words if "<" not in text and "\u2581" not in text]
    assert_same_ids(lambda s: peer(s, add_special_tokens=False).input_ids, theirs.encode, words)
    assert_same_ids(plain(Tokenizer(written / "tokenizer.json")), theirs.encode, texts[:600])


def test_unigram_models_that_transformers_would_take_for_bpe_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(vocab_size=900, model_type="unigram", remove_extra_whitespaces=True))
    ours = Tokenizer(path)
    written = tmp_path / "written"
    written.mkdir()
    with pytest.raises(ValueError, match="transformers would take it for BPE"):
        writing.write_for_hugging_face(ours.vocabulary, written)
    assert not [*written.iterdir()]
    again = Tokenizer(writing.write_tokenizer(ours.vocabulary, written))  # for ourselves
    assert plain(again)("a  b") == plain(ours)("a  b")


def test_pieces_may_be_renamed_in_tokenizer_json(tmp_path):
    model = train(vocab_size=900, control_symbols=["[8]", "[9]"])
    (tmp_path / "tokenizer.model").write_bytes(model)
    whole = writing._pieces_json(Tokenizer(tmp_path / "tokenizer.model").vocabulary)
    names = {"[8]": "<|im_start|>", "[9]": "<|im_end|>"}
    text = json.dumps(whole)
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    (tmp_path / "tokenizer.json").write_text(text)
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert ours.vocabulary.kind == "json"
    assert_chats_alike(ours, AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_gguf_files_template_for_tools_is_taken_with_tools(spm, smollm2_path, tmp_path, kind):
    vocabulary = spm.vocabulary if kind == "llama" else Tokenizer(smollm2_path).vocabulary
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writing.write_gguf(vocabulary._replace(chat_template=None), writer, vocabulary.n_words)
    writer.add_chat_template([{"name": "default", "template": "Hello"},
                              {"name": "tool_use", "template": "{{ tools }}"}])  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = Tokenizer(tmp_path / "v.gguf")
    assert ours.chat_template == "{% if tools +%}{{ tools }}{%+ else +%}Hello{%+ endif %}"


def test_a_vocabulary_that_gguf_has_no_kind_for_is_refused(packaged, tmp_path):
    ours, _ = packaged
    with pytest.raises(ValueError, match="GGUF knows no other kind"):
        write_gguf(ours, tmp_path / "v.gguf", ours.n_words)
    assert list(tmp_path.iterdir()) == []
    path = writing.write_for_hugging_face(ours.vocabulary, tmp_path)
    assert Tokenizer(path).encode("a b <s>", bos=True, eos=True) == ours.encode(
        "a b <s>", bos=True, eos=True
    )


def test_stop_tokens_of_any_name_are_kept(smollm2_path, tmp_path):
    writing.write_for_hugging_face(Tokenizer(smollm2_path).vocabulary, tmp_path)
    file = tmp_path / "generation_config.json"
    said = json.loads(file.read_text())
    said["eos_token_id"] += [5, 9]
    file.write_text(json.dumps(said))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert ours.stop_tokens == {0, 2, 5, 9}
    assert Tokenizer(write_gguf(ours, tmp_path / "v.gguf", ours.n_words)).stop_tokens == {
        0,
        2,
        5,
        9,
    }
    said["eos_token_id"].append(7)
    file.write_text(json.dumps(said))
    with pytest.warns(UserWarning, match=r"no place for the stop tokens \[9\]"):
        write_gguf(Tokenizer(tmp_path / "tokenizer.json"), tmp_path / "w.gguf", ours.n_words)


@pytest.mark.parametrize(
    "pre, same, types", [("refact", "smollm", True), ("smaug-bpe", "llama-bpe", False)]
)
def test_gguf_files_of_others(smollm2_path, tmp_path, pre, same, types):
    """Other names of rules; padding with an ordinary token; no types of tokens."""
    vocabulary = Tokenizer(smollm2_path).vocabulary
    tokens, special = writing.tokens_of(vocabulary), {*vocabulary.special_tokens.values()}
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if types:
        writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in writing.merges_of(vocabulary)])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(500)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = Tokenizer(tmp_path / "v.gguf")
    assert ours.vocabulary.pre == same and not ours.add_bos
    again = Tokenizer(writing.write_for_hugging_face(ours.vocabulary, tmp_path))
    assert plain(again)("Hello 123 <|im_end|>") == plain(ours)("Hello 123 <|im_end|>")
    assert again.eos_id == 2


@pytest.mark.parametrize("which", ["smollm2_path", "llama3_tokenizer_path"])
def test_converted_vocabularies_are_tokenizers_own(request, tmp_path, which):
    """tokenizer.json as written by us: the same ids from `tokenizers`, and tiktoken reads it."""
    original = Tokenizer(request.getfixturevalue(which))
    path = writing.write_for_hugging_face(original.vocabulary, tmp_path)
    ours, peer = Tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert ours.vocabulary.kind == "byte-level"
    peer.encode_special_tokens = True
    texts = random_texts(9, 4000) + glued_tokens(10, 1500, original)
    assert_same_ids(plain(ours), lambda s: peer.encode(s, add_special_tokens=False).ids, texts)
    peer.encode_special_tokens = False
    assert_same_ids(
        lambda s: ours.encode(s, bos=False, eos=False, allowed_special="all"),
        lambda s: peer.encode(s, add_special_tokens=False).ids,
        texts[:500] + [f"a{name} b{name}" for name in original.special_tokens],
    )


# --- streams -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_kinds(spm, llama3_tokenizer_path, smollm2_path, theirs, texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    found = [spm, Tokenizer(llama3_tokenizer_path), Tokenizer(smollm2_path)]
    for i, peer in enumerate((like_llama_2(theirs), metaspace_unigram(texts))):
        (root / str(i)).mkdir()
        peer.save(str(root / str(i) / "tokenizer.json"))
        (root / str(i) / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        found.append(Tokenizer(root / str(i) / "tokenizer.json"))
    return found


@settings(max_examples=200)
@given(data=st.data())
def test_a_stream_adds_up_to_the_whole(all_kinds, data):
    """For any ids, sensible or not; and no piece ever takes back what came before."""
    tokenizer = data.draw(st.sampled_from(all_kinds))
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_words - 1), max_size=30))
    stream = tokenizer.stream()
    assert "".join(map(stream.feed, ids)) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_a_stream_of_a_text_has_no_replacement_characters(all_kinds, text):
    for tokenizer in all_kinds:
        ids = plain(tokenizer)(text)
        stream = tokenizer.stream()
        pieces = [stream.feed(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in tokenizer.decode(ids):
            assert all("\ufffd" not in piece for piece in pieces)


def test_a_sentencepiece_text_comes_back(spm):
    for text in random_texts(11, 500):
        assert spm.decode(plain(spm)(text)) == text
        stream = spm.stream()
        assert "".join(map(stream.feed, plain(spm)(text))) + stream.finish() == text


def test_ids_of_pairs_are_words_with_their_spaces(spm):
    ids = plain(spm)("one two three")
    stream = spm.stream()
    pieces = [stream.feed(i) for i in ids]
    assert "".join(pieces) == "one two three" and not pieces[0].startswith(" ")
    assert all(b"".join([spm.decode_bytes([a]), spm.decode_bytes([b])]) == spm.decode_bytes([a, b])
               for a, b in pairwise(ids))  # fmt: skip


# --- Llama 2, whole ------------------------------------------------------------------------------


def same(one: str, other: str) -> bool:
    """But for the number of replacement characters for bytes that aren't UTF-8."""
    return re.sub("\ufffd+", "\ufffd", one) == re.sub("\ufffd+", "\ufffd", other)


def test_a_llama_2_directory_completes_and_chats(spm_path, theirs, tmp_path):
    """Meta's directory with a SentencePiece model: bos before a text, turns of [INST]."""
    args = replace(TINY, vocab_size=theirs.get_piece_size(), rope_theta=10000.0)
    path = meta.write(InMemory(args, random_weights(args)), tmp_path / "llama-2")
    (path / "tokenizer.model").write_bytes(spm_path.read_bytes())
    llama = Llama.build(path, device="cpu", dtype="fp32", max_seq_len=128)
    assert isinstance(llama.formatter, Llama2Format)
    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi! "},
        {"role": "user", "content": "<s> [in] </s>"},
    ]
    expected = [1, *theirs.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hello [/INST] Hi! "), 2]
    expected += [1, *theirs.encode("[INST] <s> [in] </s> [/INST]")]
    assert llama.formatter.encode_dialog_prompt(dialog) == expected
    (answer,) = llama.chat_completion([dialog], temperature=0, max_gen_len=4)
    ids, _ = llama.generate([expected], 4, temperature=0)
    assert answer["generation"]["role"] == "assistant"
    assert same(answer["generation"]["content"], theirs.decode(ids[0]))
    (text,) = llama.text_completion(["Hello"], temperature=0, max_gen_len=4)
    ids, _ = llama.generate([[1, *theirs.encode("Hello")]], 4, temperature=0)
    assert same(text["generation"], theirs.decode(ids[0]))
