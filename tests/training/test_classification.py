"""Classifiers against transformers: logits, losses, gradients, and directories both ways."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, random_weights, run_ranks, write_checkpoint
from safetensors.torch import load_file, save_file
from test_model import gap, to_hugging_face
from transformers import AutoTokenizer, LlamaForSequenceClassification

from llama import Llama, Tokenizer, checkpoint
from llama.checkpoint import InMemory, gguf, huggingface
from llama.checkpoint.safetensors import interleave
from llama.families.names import HF
from llama.layers.ids import padded
from llama.training.classification import SequenceClassifier

ARGS = replace(TINY, head_dim=TINY.head_dim)
PAD = 511
ROWS = [[1, 2, 3], list(range(40, 59)), [7], [200, 100] * 6]
LENGTHS = torch.tensor([len(row) for row in ROWS])
TEXTS = ["a", "The quick brown fox", "jumps!", "over the lazy dog " * 5, "ö"]

MULTI = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [0.5, 1, 0]])
PROBLEMS = {  # number of labels, problem_type in the config, labels, what they are taken for
    "one value": (1, "regression", torch.tensor([0.5, -1.0, 2.0, 0.0]), "regression"),
    "values": (3, "regression", torch.arange(12.0).view(4, 3) / 6, "regression"),
    "single": (3, "single_label_classification", torch.tensor([2, 0, 1, 1]), None),
    "multi": (3, "multi_label_classification", MULTI, None),
    "one of multi": (1, "multi_label_classification", MULTI[:, :1], None),
    "inferred value": (1, None, torch.tensor([[0.5], [-1.0], [2.0], [0.0]]), "regression"),
    "inferred single": (3, None, torch.tensor([2, 0, 1, 1]), "single_label_classification"),
    "inferred single, int32": (
        2, None, torch.tensor([1, 0, 1, 1], dtype=torch.int32), "single_label_classification",
    ),
    "inferred multi": (3, None, MULTI, "multi_label_classification"),
}  # fmt: skip


def peer(num_labels=3, args=ARGS, **config) -> LlamaForSequenceClassification:
    """transformers' classifier with random weights that tell tokens apart clearly."""
    causal = to_hugging_face(args, random_weights(args))
    settings = {"num_labels": num_labels, "pad_token_id": PAD, **config}
    for key, value in settings.items():
        setattr(causal.config, key, value)
    model = LlamaForSequenceClassification(causal.config).float().eval()
    model.model.load_state_dict(causal.model.state_dict())
    score = torch.randn(num_labels, args.dim, generator=torch.Generator().manual_seed(5))
    model.score.weight.data = score / args.dim**0.5
    return model


def build(path, **options) -> SequenceClassifier:
    return SequenceClassifier.build(path, device="cpu", dtype="fp32", **options)


def ours_of(tokens_of=ROWS):
    return padded(tokens_of, torch.device("cpu")), torch.tensor([len(row) for row in tokens_of])


def theirs_of(model, rows=ROWS, pad=PAD) -> torch.Tensor:
    """Their logits of a padded batch."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return model(tokens, attention_mask=mask).logits


def edit(file, drop=(), **keys) -> None:
    value = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


@pytest.fixture
def saved(tmp_path):
    """A directory that transformers wrote, with three labels."""
    peer().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_logits_losses_and_gradients_equal_transformers(tmp_path, problem):
    num_labels, problem_type, labels, taken_for = problem
    theirs = peer(num_labels, problem_type=problem_type)
    theirs.save_pretrained(tmp_path)
    ours = build(tmp_path)
    assert ours.problem_type == problem_type
    expected = theirs_of(theirs)
    logits = ours(*ours_of())
    assert logits.dtype == torch.float32
    assert gap(logits, expected) < 1e-5 < gap(expected[:1], expected[1:2])

    integers = not labels.is_floating_point()
    their_loss = theirs.loss_function(
        logits=None,
        labels=labels.long() if integers else labels,
        pooled_logits=expected,
        config=theirs.config,
    )
    our_loss = ours.loss(logits, labels)
    assert gap(our_loss, their_loss) < 1e-5 and our_loss > 0.05
    assert ours.problem_type == theirs.config.problem_type == (taken_for or problem_type)

    their_loss.backward()
    our_loss.backward()
    found = dict(ours.model.named_parameters()) | {"score.weight": ours.score.weight}
    for name, weight in theirs.named_parameters():
        name, expected = HF.meta(name), weight.grad
        if name.endswith((".wq.weight", ".wk.weight")):
            expected = interleave(expected, ARGS.head_dim)
        assert gap(found.pop(name).grad, expected) < 1e-4
        assert expected.abs().max() > 1e-3, name
    assert not found


def test_what_stands_behind_a_row_changes_nothing(saved):
    ours = build(saved)
    tokens, lengths = ours_of()
    behind = torch.arange(tokens.shape[1]) >= lengths[:, None]
    with torch.no_grad():
        expected = ours(tokens, lengths)
        assert torch.equal(ours(tokens.masked_fill(behind, 300), lengths), expected)
        alone = torch.cat([ours(torch.tensor([row]), torch.tensor([len(row)])) for row in ROWS])
        assert gap(alone, expected) < 1e-5
        assert gap(ours(tokens, torch.ones(4, dtype=torch.int64)), expected) > 0.1


def test_two_ranks_compute_what_one_does(saved, tmp_path):
    labels = [2, 0, 1, 1]
    report = run_ranks(2, "classified", tmp_path / "out", ckpt=str(saved), rows=ROWS, labels=labels)
    ours = build(saved)
    logits = ours(*ours_of())
    ours.loss(logits, torch.tensor(labels)).backward()
    expected = logits, ours.score.weight.grad, ours.model.layers[0].attention_norm.weight.grad
    for found in report["all_ranks"]:
        for theirs, one in zip(found, expected, strict=True):
            assert gap(torch.tensor(theirs), one) < 1e-5 < one.abs().max()
    again = build(saved.parent / "theirs-again")  # written by two ranks
    assert torch.equal(again(*ours_of()), logits)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 100_000])
def test_what_is_written_is_what_transformers_loads(tmp_path, tied, max_shard_bytes):
    names = {0: "cold", 1: "mild", 2: "hot"}
    settings = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    settings |= {"problem_type": "multi_label_classification", "tie_word_embeddings": tied}
    theirs = peer(**settings)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    ours = build(tmp_path / "theirs")
    assert ours.model.output.weight is ours.model.tok_embeddings.weight  # and costs nothing
    path = ours.write(tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    again, report = LlamaForSequenceClassification.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    with torch.no_grad():
        assert torch.equal(theirs_of(again), theirs_of(theirs))
    for key, value in (settings | {"pad_token_id": PAD, "num_labels": 3}).items():
        assert getattr(again.config, key) == value, key

    config, back = json.loads((path / "config.json").read_text()), build(path)
    assert config["tie_word_embeddings"] is tied
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert back.labels == ["cold", "mild", "hot"] and back.pad_id == PAD and back.tied is tied
    files = {file.name: set(load_file(file)) for file in path.glob("*.safetensors")}
    assert (len(files) > 2) == (max_shard_bytes == 100_000)
    if len(files) > 1:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, held in files.items() for name in held}
        total = sum(weight.nbytes for weight in theirs.state_dict().values())
        assert index["metadata"]["total_size"] == total
    assert not any("lm_head.weight" in held for held in files.values())


@pytest.mark.parametrize("kind", ["meta", "hf", "hf tied", "gguf"])
def test_a_new_head_on_any_checkpoint(tmp_path, kind):
    args = replace(ARGS, tied_embeddings=kind == "hf tied")
    path = write_checkpoint(tmp_path / "meta", ARGS)
    source, tokenizer = InMemory(args, random_weights(args)), Tokenizer(path / "tokenizer.model")
    if kind == "gguf":
        path = gguf.write(source, tmp_path / "a.gguf", "f32")
    elif kind != "meta":
        path = huggingface.write(source, tmp_path / "hf", tokenizer=tokenizer)
    options = {"tokenizer_path": tmp_path / "meta" / "tokenizer.model"} if kind == "gguf" else {}
    ours = build(path, labels=["no", "yes"], problem_type="multi_label_classification", **options)
    assert len(list(ours.parameters())) == 1 + 2 + 9 * 2
    assert ours.score.weight.shape == (2, 64) and 0.01 < ours.score.weight.std() < 0.03
    options["num_labels"] = 2
    assert torch.equal(ours.score.weight, build(path, **options).score.weight)
    assert not torch.equal(ours.score.weight, build(path, **options, seed=2).score.weight)

    ours.score.weight.data *= 50
    written = ours.write(tmp_path / "classifier")
    theirs = LlamaForSequenceClassification.from_pretrained(written)
    assert theirs.config.tie_word_embeddings is args.tied_embeddings
    their_tokenizer = AutoTokenizer.from_pretrained(written)
    batch = their_tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt")
    assert not batch.attention_mask.all()
    with torch.no_grad():
        expected = theirs(**batch).logits
    assert (
        gap(ours.predict(TEXTS, batch_size=2), expected) < 1e-5 < gap(expected[:1], expected[1:2])
    )
    assert gap(build(written).predict(TEXTS), expected) < 1e-5


def test_a_classifier_around_a_model_that_is_there(tiny, tmp_path):
    classifier = SequenceClassifier(tiny.model, ["a", "b"], tokenizer=tiny.tokenizer)
    path = classifier.write(tmp_path / "bf16", torch.bfloat16)
    weights = load_file(path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert gap(build(path).predict(TEXTS), classifier.predict(TEXTS)) < 0.05
    quantized = random_model(TINY)
    quantized.layers[0].feed_forward.w1 = torch.nn.Identity()
    with pytest.raises(ValueError, match="layers.0.feed_forward.w1.weight isn't there"):
        SequenceClassifier(quantized, ["a", "b"]).write(tmp_path / "x")


def test_the_id_that_rows_are_filled_with(tmp_path):
    """The config's; the tokenizer that is written pads with it too, if it is a special token."""
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "meta", ARGS) / "tokenizer.model")
    end, fill = tokenizer.special_tokens["<|eot_id|>"], tokenizer.pad_id
    assert end != fill
    first = build(tmp_path / "meta", num_labels=2)
    first.score.weight.data *= 50
    assert first.pad_id == fill
    path = first.write(tmp_path / "a")
    for configured, taken, filled in (
        (end, end, end), (97, 97, fill), (-1, None, fill), (None, None, fill)
    ):  # fmt: skip
        edit(path / "config.json", pad_token_id=configured)
        ours = build(path)
        assert (ours.pad_id, ours.tokenizer.pad_id) == (taken, filled)
        if taken is None:  # so nothing at the end is taken for padding
            theirs = LlamaForSequenceClassification.from_pretrained(path)
            with torch.no_grad():
                expected = theirs(torch.tensor([[*ROWS[0], fill]])).logits
            assert gap(ours.predict([[*ROWS[0], fill]]), expected) < 1e-5
    edit(path / "config.json", pad_token_id=end)
    ours, again = build(path), build(path).write(tmp_path / "b")
    theirs = LlamaForSequenceClassification.from_pretrained(again)
    assert AutoTokenizer.from_pretrained(again).pad_token_id == theirs.config.pad_token_id == end
    rows = [[*row, end] for row in ROWS]
    with torch.no_grad():
        expected = theirs_of(theirs, rows, end)
        assert gap(expected, theirs_of(theirs, ROWS, end)) < 1e-5  # the end isn't told from padding
    assert gap(ours.predict(rows), expected) < 1e-5
    assert gap(first.predict(rows), expected) > 0.1

    for file in path.glob("tokenizer*"):
        file.unlink()
    assert build(path).pad_id == end
    with pytest.raises(ValueError, match="no tokenizer: build with tokenizer_path"):
        build(path).predict(["a"])
    edit(path / "config.json", pad_token_id=-1)
    assert build(path).pad_id is None


def test_nothing_half_written_is_left(saved, tmp_path, monkeypatch):
    ours, path = build(saved), tmp_path / "new"
    with pytest.raises(FileExistsError, match="exists"):
        ours.write(saved)

    def fail(*_):
        raise OSError("full")

    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    monkeypatch.setattr(huggingface, "write_json", fail)
    for target in (path, saved):
        with pytest.raises(OSError, match="full"):
            ours.write(target, force=True)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


# --- labels --------------------------------------------------------------------------------------


def test_answers_by_label(tiny):
    score = torch.randn(3, TINY.dim, generator=torch.Generator().manual_seed(1)) / 8
    kinds = {
        None: torch.nn.Softmax(-1),
        "single_label_classification": torch.nn.Softmax(-1),
        "multi_label_classification": torch.nn.Sigmoid(),
        "regression": torch.nn.Identity(),
    }
    for kind, function in kinds.items():
        ours = SequenceClassifier(
            tiny.model, ["a", "b", "c"], score, problem_type=kind, tokenizer=tiny.tokenizer
        )
        logits = ours.predict(TEXTS, batch_size=2)
        alone = torch.cat([ours.predict([text]) for text in TEXTS])
        assert gap(logits, alone) < 1e-5 < gap(logits[:1], logits[1:2])
        found = ours.classify(TEXTS)
        assert [list(answer) for answer in found] == [["a", "b", "c"]] * 5
        values = torch.tensor([list(answer.values()) for answer in found])
        assert gap(values, function(logits)) < 1e-5
    assert ours.predict([]).shape == (0, 3) and ours.classify([]) == []
    one = SequenceClassifier(tiny.model, ["reward"], score[:1], tokenizer=tiny.tokenizer)
    assert gap(torch.tensor([one.classify(["a"])[0]["reward"]]), logits[:1, 0]) < 1e-5


def test_transformers_says_nothing_of_two_labels(tmp_path):
    peer(2).save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert build(tmp_path).labels == ["LABEL_0", "LABEL_1"]
    edit(tmp_path / "config.json", num_labels=2, label2id={"LABEL_0": 0, "LABEL_1": 1})
    assert build(tmp_path, num_labels=2).labels == ["LABEL_0", "LABEL_1"]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, labels, named",
    [
        ("regression", torch.ones(4), r"labels of shape \(4,\) for logits \(4, 3\): regression"),
        ("regression", torch.ones(3, 3), r"takes \(4, 3\)"),
        ("single_label_classification", torch.zeros(4, 3).long(), r"takes \(4,\)"),
        ("single_label_classification", torch.zeros(4), "labels of torch.float32: .* integers"),
        ("single_label_classification", torch.tensor([0, 3, 1, 1]), "label 3 isn't within 0 to 2"),
        ("single_label_classification", torch.tensor([0, -1, 1, 1]), "label -1 isn't within 0"),
        ("multi_label_classification", torch.zeros(4), r"takes \(4, 3\)"),
        ("multi_label_classification", torch.full((4, 3), 1.5), "label 1.5 isn't within 0 to 1"),
        ("multi_label_classification", torch.full((4, 3), torch.nan), "label nan isn't"),
        (None, torch.zeros(4, 3).long(), r"single_label_classification takes \(4,\)"),
    ],
)
def test_labels_that_do_not_fit(tiny, kind, labels, named):
    ours = SequenceClassifier(tiny.model, ["a", "b", "c"], problem_type=kind)
    with pytest.raises(ValueError, match=named):
        ours.loss(torch.zeros(4, 3), labels)
    assert ours.problem_type == kind


@pytest.mark.parametrize(
    "lengths, named",
    [
        ([1, 0], "length 0 isn't one of 1 to 5"),
        ([6, 1], "length 6 isn't one of 1 to 5"),
        ([1], r"lengths of torch.int64 \(1,\): integers, one for each of 2"),
        ([1.0, 2.0], r"lengths of torch.float32 \(2,\): integers"),
    ],
)
def test_lengths_that_do_not_fit(tiny, lengths, named):
    ours = SequenceClassifier(tiny.model, ["a", "b"])
    with pytest.raises(ValueError, match=named):
        ours(torch.ones(2, 5).long(), torch.tensor(lengths))


def test_mistakes_are_named(tiny, tiny_dir):
    for options, named in (
        ({"labels": []}, "labels=\\[\\]: at least one name"),
        ({"labels": ["a", "a"]}, "none twice"),
        ({"labels": "ab"}, "labels='ab' is one text: pass a list of names"),
        ({"labels": ["a"], "problem_type": "ranking"}, "problem_type='ranking': choose one of"),
        ({"labels": ["a"], "problem_type": "single_label_classification"}, "takes 2 labels"),
        ({"labels": ["a"], "score": torch.ones(2, 64)}, r"shape \(2, 64\), .* takes \(1, 64\)"),
    ):
        with pytest.raises(ValueError, match=named):
            SequenceClassifier(tiny.model, **options)
    for options, named in (
        ({}, "no head for classes: pass num_labels or labels"),
        ({"num_labels": 0}, "num_labels=0 must be at least 1"),
        ({"num_labels": 3, "labels": ["a"]}, "num_labels=3 and 1 labels"),
    ):
        with pytest.raises(ValueError, match=named):
            build(tiny_dir, **options)
    ours = SequenceClassifier(tiny.model, ["a"], tokenizer=tiny.tokenizer)
    with pytest.raises(ValueError, match="text 1 has 201 tokens: it takes 1 to max_seq_len, 128"):
        ours.predict(["a", "b" * 200])
    with pytest.raises(ValueError, match="text 0 has 0 tokens"):
        ours.predict([[]])
    for function in (ours.predict, ours.classify):
        with pytest.raises(ValueError, match="texts is one text: pass a list of texts"):
            function("calm")
    for wrong in (-1, 512):
        named = f"has the token id {wrong}: this model knows 0 to 511"
        with pytest.raises(ValueError, match=f"text 1 {named}"):
            ours.classify([[1, 2], [3, wrong, 4]])
        with pytest.raises(ValueError, match=f"row 1 {named}"):  # behind its length, too
            ours(torch.tensor([[1, 2], [3, wrong]]), torch.tensor([2, 1]))


def test_a_params_json_beside_it_is_no_checkpoint_of_metas(saved):
    (saved / "params.json").write_text("{}")  # as Mistral's have it
    assert build(saved).labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_classifier_is_no_text_model(saved):
    with pytest.raises(
        ValueError, match="LlamaForSequenceClassification.*SequenceClassifier.build"
    ):
        Llama.build(saved, device="cpu")
    with pytest.raises(ValueError, match=r"labels \['LABEL_0', 'LABEL_1', 'LABEL_2'\]: pass these"):
        build(saved, num_labels=2)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        build(saved / "nowhere", num_labels=2)


NAMES = {"0": "a", "1": "b", "2": "c"}


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"problem_type": "ranking"}, "problem_type='ranking'"),
        ({"problem_type": ["regression"]}, "problem_type="),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": None}, r"\(3, 64\), .* asks for \(2, 64\)"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "isn't a name for each of 0, 1"),
        ({"id2label": ["a", "b", "c"]}, "isn't a name for each of 0, 1"),
        ({"id2label": {"0": "a", "1": "b", "2": 5}}, "isn't a name for each of 0, 1"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}, "label2id": None}, "none twice"),
        ({"id2label": NAMES, "label2id": {"b": 0, "a": 1, "c": 2}}, "contradicts the labels"),
        ({"num_labels": 4}, "num_labels=4 contradicts id2label, of 3"),
        ({"id2label": None, "num_labels": 10**12}, r"asks for \(1000000000000, 64\)"),
        ({"id2label": None, "num_labels": "3"}, r"asks for \(3, 64\)"),
        ({"logit_scale": 2.0}, "no meaning for: logit_scale"),
        ({"hidden_size": 128}, r"asks for \(3, 128\)"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_cannot_be_honoured_is_named(saved, keys, named):
    edit(saved / "config.json", **keys)
    with pytest.raises(ValueError, match=named) as caught:
        build(saved)
    assert str(saved) in str(caught.value) and len(str(caught.value)) < 500


def test_weights_that_are_missing_or_too_many(saved):
    file = saved / "model.safetensors"
    weights = load_file(file)
    for change, named in (
        ({"score.weight": None}, "lacks score.weight, the head of a classifier"),
        ({"model.norm.weight": None}, "lacks norm.weight"),
        ({"lm_head.weight": torch.ones(512, 64)}, "no place for: output.weight"),
        ({"score.bias": torch.ones(3)}, "no place for: score.bias"),
        ({"score.weight": torch.ones(3)}, r"score.weight has the shape \(3,\)"),
    ):
        changed = {name: w for name, w in (weights | change).items() if w is not None}
        save_file(changed, file)
        with pytest.raises(ValueError, match=named):
            build(saved)
    save_file(weights, file)
    edit(saved / "config.json", architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    with pytest.raises(ValueError, match="no place for: score.weight"):
        checkpoint.check_shapes(checkpoint.open(saved))


def test_a_loop_learns_to_tell_texts_apart(tiny_dir, tmp_path):
    """The example of the documentation, on a random model: all weights learn, and come back."""
    texts = [f"{word} {i}" for i in range(4) for word in ("calm", "rough")]
    classifier = build(tiny_dir, labels=["calm", "rough"])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    answers, tokenizer = torch.tensor([0, 1] * 4), classifier.tokenizer
    for _ in range(25):
        ids = [tokenizer.encode(text, bos=tokenizer.add_bos, eos=False) for text in texts]
        lengths = torch.tensor([len(row) for row in ids])
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], True)
        loss = classifier.loss(classifier(tokens, lengths), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    path = classifier.write(tmp_path / "calm-or-rough")
    for found in (classifier.classify(["rough 9"]), build(path).classify(["rough 9"])):
        assert found[0]["rough"] > 0.8
