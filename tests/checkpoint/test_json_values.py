"""Any value under any key of the JSON files beside weights: one clear error, or it runs.

It used to be an AttributeError, for example, when `chat_template` was a number.
"""

import json
from pathlib import Path

import pytest
import tokenizers
from conftest import TINY, random_weights, write_byte_tokenizer
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers
from vision import ARGS as VISION
from vision import TINY_LLAMA4

from llama import Tokenizer, checkpoint
from llama.checkpoint import InMemory, huggingface, meta
from llama.checkpoint.adapter import IGNORED, REQUIRED, Adapter, Pair, read_adapter, write_adapter
from llama.text.templates import chat_format

# Of values that are fine, but don't go with what other files hold.
OF_BOTH = (
    "its configuration asks for", "lacks layers.", "lacks vision_", "has no place for",
    "the checkpoint's chat template", "vision_width=32 isn't a multiple of",
)  # fmt: skip
VALUES = [None, -1, 1e308, "x", [], {}, [1, 2], True]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CONFIG = {  # beside what a tiny config.json has
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": None, "model_type": "llama",
    "attention_multiplier": None, "quantization_config": None, "layer_types": None,
    "partial_rotary_factor": 1.0, "id2label": {}, "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip


def edit(file: Path, **keys) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | keys))


def byte_level(path: Path) -> None:
    """What tiktoken encodes with, as `huggingface.write` leaves it."""


def left_to_tokenizers(path: Path) -> None:
    """A tokenizer.json that isn't byte-level BPE."""
    letters = {chr(i): i for i in range(33, 127)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **letters}
    peer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True))
    peer.normalizer = normalizers.Replace(" ", "▁")
    peer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    peer.add_special_tokens(["<unk>", "<s>", "</s>"])
    peer.save(str(path / "tokenizer.json"))
    for name in ("generation_config.json", "config.json"):
        edit(path / name, eos_token_id=[2])
    edit(path / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def sentencepiece(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    model = sentencepiece_model_pb2.ModelProto()
    for i, (piece, kind) in enumerate([("<unk>", 2), ("<s>", 3), ("</s>", 3), ("▁", 1), ("a", 1)]):
        model.pieces.add(piece=piece, score=-i, type=kind)
    model.trainer_spec.model_type = 2
    (path / "tokenizer.model").write_bytes(model.SerializeToString())
    for name in ("generation_config.json", "config.json"):
        edit(path / name, eos_token_id=[2])
    edit(path / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def open_all(path: Path) -> None:
    """What `Llama.build` and a chat do before weights are read."""
    source = checkpoint.open(path)
    checkpoint.check_shapes(source)
    tokenizer = Tokenizer(source.tokenizer_path)
    ids = tokenizer.encode("a b", bos=tokenizer.bos_id is not None, eos=True)
    assert isinstance(tokenizer.decode(ids), str)
    formatter = chat_format(tokenizer, source.args.use_scaled_rope)
    if formatter is not None:
        formatter.encode_dialog_prompt([{"role": "user", "content": "hi"}])


def places(value, most=15, depth=3, at=()):
    """The paths of keys in an object, those of objects in it with fewer than `most` included."""
    for key, inner in value.items():
        yield (*at, key)
        if isinstance(inner, dict) and depth > 1 and len(inner) < most:
            yield from places(inner, most, depth - 1, (*at, key))


def complaints(file: Path, act, most=15) -> int:
    """Put each value at each place; returns how many were refused, each by file and key."""
    whole, refused, wrong = file.read_text(), 0, []
    for place in [*places(json.loads(whole), most)]:
        for value in VALUES:
            changed = target = json.loads(whole)
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
            file.write_text(json.dumps(changed))
            try:
                act()
            except ValueError as error:
                refused += 1
                named = file.name in str(error) and any(key in str(error) for key in place)
                if not named and not any(text in str(error) for text in OF_BOTH):
                    wrong.append((place, value, error))
            except Exception as error:  # an AttributeError, say
                wrong.append((place, value, error))
    file.write_text(whole)
    assert not wrong, "\n".join(map(repr, wrong))
    return refused


@pytest.mark.parametrize("vocabulary", [byte_level, left_to_tokenizers, sentencepiece])
def test_values_of_hugging_faces_files(tmp_path, vocabulary):
    path = tmp_path / "hf"
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path / "tokenizer.model"))
    source = InMemory(TINY, random_weights(TINY))
    huggingface.write(source, path, tokenizer=tokenizer, max_shard_bytes=200_000)
    vocabulary(path)
    token = {"content": "<added>", "special": True}
    edit(
        path / "tokenizer_config.json", chat_template=TEMPLATE, added_tokens_decoder={"300": token}
    )
    edit(path / "config.json", **CONFIG)
    edit(path / "special_tokens_map.json", bos_token="<s>")
    edit(path / "added_tokens.json", older=301)
    open_all(path)
    refused = {}
    for file in sorted(path.glob("*.json")):
        first = vocabulary is byte_level  # what a vocabulary has nothing to do with, once
        if first or file.name not in ("config.json", "model.safetensors.index.json"):
            refused[file.name] = complaints(file, lambda: open_all(path))
    assert refused["tokenizer_config.json"] > 20 and refused["generation_config.json"] >= 5
    assert "tokenizer.json" not in refused or refused["tokenizer.json"] > 10
    assert vocabulary is not byte_level or refused["config.json"] > 100


def test_values_of_params_json(tmp_path):
    path = meta.write(InMemory(TINY, random_weights(TINY)), tmp_path / "meta")
    write_byte_tokenizer(path / "tokenizer.model")
    edit(
        path / "params.json", vocab_size=512, ffn_dim_multiplier=1.5, use_scaled_rope=False,
        rope_theta=10000.0, max_seq_len=8, head_dim=8, hidden_dim=96, tied_embeddings=False,
        rope_scaling_factor=8.0,
    )  # fmt: skip
    assert complaints(path / "params.json", lambda: open_all(path)) > 60


@pytest.mark.parametrize("args", [TINY_LLAMA4, VISION], ids=["llama 4", "llama 3.2 vision"])
@pytest.mark.parametrize("write, name", [(huggingface, "config.json"), (meta, "params.json")])
def test_values_of_families_that_see(tmp_path, args, write, name):
    """What a text model's files don't have: images, experts, attention in chunks."""
    path = write.write(InMemory(args, random_weights(args)), tmp_path / "model")
    assert complaints(path / name, lambda: checkpoint.check_shapes(checkpoint.open(path)), 50) > 90


def test_values_of_adapter_config_json(tmp_path):
    A = random_weights(TINY)["layers.0.attention.wq.weight"][:4]
    pairs = {"layers.0.attention.wq.weight": Pair(A, A.T.contiguous(), 2.0)}
    path = write_adapter(Adapter(pairs), tmp_path / "adapter", TINY)
    config = path / "adapter_config.json"
    known = dict.fromkeys(IGNORED | REQUIRED.keys()) | json.loads(config.read_text())
    edit(config, **known | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}})
    read_adapter(path, TINY)
    assert complaints(config, lambda: read_adapter(path, TINY)) > 50


@pytest.mark.parametrize(
    "kind, other", [("IA3", {"feedforward_modules": ["down_proj"]}), ("LOHA", {"alpha": 8})]
)
def test_adapters_of_other_kinds_are_refused_by_their_kind(tmp_path, kind, other):
    config = {**other, "peft_type": kind, "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"adapter_config.json: peft_type='{kind}'"):
        read_adapter(tmp_path, TINY)
