"""Adapters of classifiers, with their heads, against peft: read, trained, written.

It is imported where it is used: with torch's compiler, that takes seconds.
"""

import json

import pytest
import torch
from conftest import TINY, random_model
from test_classification import PAD, ROWS, build, ours_of, peer
from test_model import TOLERANCE, gap

from llama.checkpoint.adapter import read_adapter
from llama.training import lora
from llama.training.classification import SequenceClassifier
from llama.training.classifier_adapter import attach_classifier_adapter, write_classifier_adapter
from llama.training.token_classification import TokenClassifier

LABELS = torch.tensor([2, 0, 1, 1])
PADDED = torch.nn.utils.rnn.pad_sequence(
    [torch.tensor(row) for row in ROWS], batch_first=True, padding_value=PAD
)


def theirs(**settings):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(peer(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def their_logits(model):
    with torch.no_grad():
        return model(PADDED).logits


@pytest.fixture
def base(tmp_path):
    peer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_pefts_classifier_gives_its_logits(base, tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    ours = build(base)
    before = ours(*ours_of())
    attach_classifier_adapter(ours, tmp_path / "theirs")
    assert gap(ours(*ours_of()), their_logits(model)) < TOLERANCE < 0.05 < gap(
        before, their_logits(model)
    )  # fmt: skip


def test_what_is_trained_here_is_pefts_and_trains_as_there(base, tmp_path):
    """The same steps from the same adapter; then the files, read by peft and by ourselves."""
    from peft import PeftModel

    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    ours = build(base)
    ours.requires_grad_(False).score.requires_grad_(True)
    attach_classifier_adapter(ours, tmp_path / "theirs")
    tokens, lengths = ours_of()
    sides = {
        "ours": ([p for p in ours.parameters() if p.requires_grad],
                 lambda: ours.loss(ours(tokens, lengths), LABELS)),
        "theirs": ([p for p in model.parameters() if p.requires_grad],
                   lambda: model(PADDED, labels=LABELS).loss),
    }  # fmt: skip
    losses = {}
    for side, (parameters, loss_of) in sides.items():
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        losses[side] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            losses[side].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], abs=1e-4)
    assert losses["ours"][-1] < losses["ours"][0] - 0.05

    path = write_classifier_adapter(ours, tmp_path / "ours", "a base")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "score" in config["modules_to_save"]
    expected = ours(tokens, lengths).detach()
    assert gap(their_logits(PeftModel.from_pretrained(peer(), path).eval()), expected) < TOLERANCE
    again = build(base)
    attach_classifier_adapter(again, path)
    assert torch.equal(again(tokens, lengths), expected)
    with pytest.raises(FileExistsError, match="exists"):
        write_classifier_adapter(ours, path)

    with pytest.raises(ValueError, match="adapter default is beside the weights"):
        ours.write(tmp_path / "merged")
    lora.merge(ours.model, "default")
    merged = ours.write(tmp_path / "merged")
    again = type(peer()).from_pretrained(merged).eval()
    assert gap(their_logits(again), expected) < TOLERANCE


def test_another_head_and_a_text_model_are_refused(base, tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    two = SequenceClassifier(random_model(TINY), ["no", "yes"])
    with pytest.raises(ValueError, match=r"a head of shape \(3, 64\), and the classifier one of"):
        attach_classifier_adapter(two, tmp_path / "theirs")
    assert lora.names(two.model) == ()
    with pytest.raises(ValueError, match="modules_to_save"):
        read_adapter(tmp_path / "theirs", TINY)


def test_a_token_classifier_is_refused(tmp_path):
    """Its head has a bias, for which these files have no place; nor does it write an adapter."""
    tagger = TokenClassifier(random_model(TINY), ["no", "yes"])
    lora.attach(tagger.model, lora.fresh(tagger.model, rank=4, alpha=8))
    for function in (attach_classifier_adapter, write_classifier_adapter):
        with pytest.raises(ValueError, match="TokenClassifier: .* SequenceClassifier"):
            function(tagger, tmp_path / "a")
    with pytest.raises(ValueError, match="adapter default is beside the weights"):
        tagger.write(tmp_path / "a")
    assert not (tmp_path / "a").exists()
