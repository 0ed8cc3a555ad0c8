"""Heads on tokens against transformers: logits, losses, gradients, directories."""

import json
from functools import partial

import pytest
import sentencepiece
import torch
from conftest import TINY, random_weights, write_byte_tokenizer, write_checkpoint
from test_model import gap, to_hugging_face
from transformers import LlamaForQuestionAnswering, LlamaForTokenClassification

from llama import Tokenizer, checkpoint
from llama.checkpoint import huggingface
from llama.layers.ids import padded
from llama.training import token_classification
from llama.training.losses import IGNORED
from llama.training.token_classification import QuestionAnswerer, TokenClassifier

ROWS = [[1, 2, 3], list(range(40, 59)), [7], [200, 100] * 6]
LABELS = ["O", "NAME", "PLACE"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """transformers' two models with random weights, by class, and their directories."""
    found = {}
    for kind in (LlamaForTokenClassification, LlamaForQuestionAnswering):
        causal = to_hugging_face(TINY, random_weights(TINY))
        causal.config.id2label = dict(enumerate(LABELS))
        causal.config.label2id = {label: i for i, label in enumerate(LABELS)}
        model = kind(causal.config).float().eval()
        getattr(model, model.base_model_prefix).load_state_dict(causal.model.state_dict())
        head = model.score if kind is LlamaForTokenClassification else model.qa_outputs
        torch.manual_seed(3)
        torch.nn.init.normal_(head.weight, std=0.3)
        torch.nn.init.normal_(head.bias)
        path = tmp_path_factory.mktemp("heads") / "hf"
        model.save_pretrained(path)
        write_byte_tokenizer(path / "tokenizer.model")
        found[kind] = model, path
    return found


def batch(rows=ROWS):
    return padded(rows, torch.device("cpu"))


def test_classes_of_tokens_are_those_of_transformers(saved):
    theirs, path = saved[LlamaForTokenClassification]
    ours = TokenClassifier.build(path, device="cpu", dtype="fp32")
    assert ours.labels == LABELS
    tokens, labels = batch(), torch.full((4, 19), IGNORED)
    for row, ids in enumerate(ROWS):
        labels[row, : len(ids)] = torch.tensor(ids) % 3
    logits, found = ours(tokens), theirs(tokens, labels=labels)
    for row, ids in enumerate(ROWS):
        assert gap(logits[row, : len(ids)], found.logits[row, : len(ids)]) <= 1e-5
    loss = ours.loss(logits, labels)
    assert gap(loss, found.loss) <= 1e-6
    loss.backward(), found.loss.backward()
    assert gap(ours.score.weight.grad, theirs.score.weight.grad) <= 1e-5
    assert gap(ours.score.bias.grad, theirs.score.bias.grad) <= 1e-5
    norm = ours.model.get_parameter("layers.0.ffn_norm.weight").grad
    assert gap(norm, theirs.model.layers[0].post_attention_layernorm.weight.grad) <= 1e-5
    theirs.zero_grad()


def test_texts_are_labelled_in_any_batch(saved):
    ours = TokenClassifier.build(saved[LlamaForTokenClassification][1], device="cpu", dtype="fp32")
    texts = ["Ada", "The quick brown fox", "in Paris"]
    for text, one in zip(texts, ours.predict(texts, batch_size=2), strict=True):
        alone = ours(torch.tensor([ours._encode(text)]))[0]
        assert gap(one, alone) <= 1e-5
    for text, tagged in zip(texts, ours.classify(texts), strict=True):
        assert "".join(one.text for one in tagged[1:]) == text  # behind BOS
        assert all(one.label in LABELS and 1 / 3 <= one.probability <= 1 for one in tagged)


def test_pieces_add_up_to_the_text(saved, tmp_path):
    """Characters of several tokens, and the spaces that SentencePiece puts before words."""
    ours = TokenClassifier.build(saved[LlamaForTokenClassification][1], device="cpu", dtype="fp32")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Ada wrote the first program", "Zoë reads the program"] * 20),
        model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    for tokenizer in (ours.tokenizer, Tokenizer(tmp_path / "tokenizer.model")):
        ours.tokenizer = tokenizer
        for text in ("Ada wrote the first program", "Zoë, 東京"):
            [tagged] = ours.classify([text])
            assert len(tagged) == len(ours._encode(text))
            assert "".join(one.text for one in tagged[1:]) == text  # behind BOS


def test_labels_of_any_integers(saved):
    ours = TokenClassifier.build(saved[LlamaForTokenClassification][1], device="cpu", dtype="fp32")
    logits, labels = ours(batch()), batch() % 3
    assert torch.equal(ours.loss(logits, labels.int()), ours.loss(logits, labels))
    answerer = QuestionAnswerer.build(saved[LlamaForQuestionAnswering][1], device="cpu")
    logits, labels = answerer(batch()), batch()[:, :2] % 19
    assert torch.equal(answerer.loss(logits, labels.int()), answerer.loss(logits, labels))


def test_what_is_written_is_what_transformers_loads(saved, tmp_path):
    theirs, path = saved[LlamaForTokenClassification]
    ours = TokenClassifier.build(path, device="cpu", dtype="fp32")
    written = ours.write(tmp_path / "again")
    again, report = LlamaForTokenClassification.from_pretrained(written, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert gap(again(batch()).logits, theirs(batch()).logits) <= 1e-5
    assert again.config.id2label == dict(enumerate(LABELS))
    with pytest.raises(FileExistsError, match="force"):
        ours.write(written)


@pytest.mark.parametrize("shard", [None, 200_000])
def test_a_written_answerer_is_what_transformers_loads(saved, tmp_path, monkeypatch, shard):
    if shard is not None:
        cut = partial(huggingface.write, max_shard_bytes=shard)
        monkeypatch.setattr(token_classification, "write", cut)
    theirs, path = saved[LlamaForQuestionAnswering]
    written = QuestionAnswerer.build(path, device="cpu", dtype="fp32").write(tmp_path / "again")
    assert (len([*written.glob("*.safetensors")]) > 1) == (shard is not None)
    again, report = LlamaForQuestionAnswering.from_pretrained(written, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = QuestionAnswerer.build(written, device="cpu", dtype="fp32")
    with torch.no_grad():
        assert gap(again(batch()).start_logits, theirs(batch()).start_logits) <= 1e-5
        assert gap(ours(batch())[..., 1], theirs(batch()).end_logits) <= 1e-5


def test_a_new_head_learns(tmp_path):
    path = write_checkpoint(tmp_path / "tiny", TINY)
    with pytest.raises(ValueError, match="pass labels"):
        TokenClassifier.build(path, device="cpu")
    ours = TokenClassifier.build(path, labels=["even", "odd"], device="cpu", dtype="fp32")
    tokens = torch.randint(200, (8, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(ours.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = ours.loss(ours(tokens), tokens % 2)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_answers_are_those_of_transformers(saved):
    theirs, path = saved[LlamaForQuestionAnswering]
    ours = QuestionAnswerer.build(path, device="cpu", dtype="fp32")
    tokens = torch.tensor([list(range(40, 59)), [200, 100] * 9 + [5]])
    starts, ends = torch.tensor([3, 19]), torch.tensor([8, 2])  # 19: not in this row
    logits = ours(tokens)
    found = theirs(tokens, start_positions=starts, end_positions=ends)
    assert gap(logits[..., 0], found.start_logits) <= 1e-5
    assert gap(logits[..., 1], found.end_logits) <= 1e-5
    assert gap(ours.loss(logits, torch.stack([starts, ends], 1)), found.loss) <= 1e-6


def test_an_answer_is_the_best_span_of_the_context(saved):
    ours = QuestionAnswerer.build(saved[LlamaForQuestionAnswering][1], device="cpu", dtype="fp32")
    question, context = "Who?", "Ada wrote the first program."
    for most in (1, 5, 100):
        answer = ours.answer(question, context, most)
        assert answer.text in context and 1 <= len(answer.text) <= most
        ids = ours._encode(question) + ours._encode(context)
        logits = ours(torch.tensor([ids]))[0]
        begin = len(ours._encode(question)) + 1
        spans = {
            (i, j): (logits[i, 0] + logits[j, 1]).item()
            for i in range(begin, len(ids))
            for j in range(i, min(i + most, len(ids)))
        }
        assert answer.score == pytest.approx(max(spans.values()), abs=1e-5)
        assert spans[answer.first, answer.last] == pytest.approx(answer.score, abs=1e-5)


def test_mistakes_are_named(saved, tmp_path):
    path = saved[LlamaForTokenClassification][1]
    ours = TokenClassifier.build(path, device="cpu", dtype="fp32")
    logits = ours(batch())
    for labels in (torch.full((4, 19), 3), torch.zeros(4, 18, dtype=torch.long)):
        with pytest.raises(ValueError, match="integers 0 to 2, or -100"):
            ours.loss(logits, labels)
    with pytest.raises(ValueError, match="labels of torch.float32: integers are needed"):
        ours.loss(logits, torch.zeros(4, 19))
    for function in (ours.predict, ours.classify):
        with pytest.raises(ValueError, match="texts is one text: pass a list of texts"):
            function("Ada")
    with pytest.raises(ValueError, match="labels='ab' is one text: pass a list of names"):
        TokenClassifier(ours.model, "ab")
    with pytest.raises(ValueError, match="all ignored"):
        ours.loss(logits, torch.full((4, 19), IGNORED))
    with pytest.raises(ValueError, match="pass these or none"):
        TokenClassifier.build(path, labels=["a", "b", "c"], device="cpu")
    with pytest.raises(ValueError, match=r"TokenClassifier\.build"):
        checkpoint.open(path)
    with pytest.raises(ValueError, match=r"QuestionAnswerer\.build"):
        checkpoint.open(saved[LlamaForQuestionAnswering][1])
    answerer = QuestionAnswerer.build(saved[LlamaForQuestionAnswering][1], device="cpu")
    with pytest.raises(ValueError, match="two tokens of 0 to 19"):
        answerer.loss(logits[..., :2], torch.tensor([[0, 20]] * 4))
    with pytest.raises(ValueError, match="labels of torch.float32: integers are needed"):
        answerer.loss(logits[..., :2], torch.zeros(4, 2))
    for labels in ([[19, 19]] * 4, [[19, 2]] * 4):
        with pytest.raises(ValueError, match="no label of where answers begin, .* below 19"):
            answerer.loss(logits[..., :2], torch.tensor(labels))
    with pytest.raises(ValueError, match="the context has no tokens"):
        answerer.answer("who?", "")
    with pytest.raises(ValueError, match="max_tokens=0"):
        answerer.answer("a", "b", 0)
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a"}}))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"score\.weight has the shape"):
        TokenClassifier.build(tmp_path, device="cpu")
