"""LoRA adapters of classifiers with their heads, in PEFT's layout: task SEQ_CLS.

classifier.requires_grad_(False).score.requires_grad_(True)
lora.attach(classifier.model, lora.fresh(classifier.model, rank=8, alpha=16))
...  # train
write_classifier_adapter(classifier, "adapters/weather")
"""

from dataclasses import replace
from pathlib import Path

import torch

from llama.checkpoint.adapter import read_adapter, write_adapter
from llama.layers import parallel
from llama.training import lora
from llama.training.classification import SequenceClassifier


@torch.no_grad()
def attach_classifier_adapter(
    classifier: SequenceClassifier, path: str | Path, name: str = "default"
) -> None:
    """Add an adapter to a classifier and activate it; its head, if it has one, takes the place of
    the classifier's own.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: no SequenceClassifier; an adapter of another model or number of labels, and what
            `lora.attach` raises.
    """
    _check(classifier)
    adapter, score = read_adapter(path, classifier.model.params, classifier=True), classifier.score
    if adapter.head is not None and adapter.head.shape != score.weight.shape:
        raise ValueError(
            f"{path} has a head of shape {tuple(adapter.head.shape)}, and the classifier one of "
            f"{tuple(score.weight.shape)}: build it with as many labels"
        )
    lora.attach(classifier.model, adapter, name)
    if adapter.head is not None:
        score.weight.copy_(adapter.head)


def write_classifier_adapter(
    classifier: SequenceClassifier,
    path: str | Path,
    base: str = "",
    name: str = "default",
    *,
    force: bool = False,
) -> Path:
    """Write an adapter and the head for `peft.PeftModel.from_pretrained`; called on all ranks.

    Args:
        base: the name of the model that it is for.

    Raises:
        FileExistsError: the directory exists, without `force`.
        ValueError: no SequenceClassifier, or no adapter of this name.
    """
    _check(classifier)
    if Path(path).exists() and not force:  # on all ranks alike
        raise FileExistsError(f"{path} exists: choose another name, or overwrite it with force")
    adapter = replace(lora.adapter_of(classifier.model, name), head=classifier.score.weight)
    if parallel.is_rank_zero():
        write_adapter(adapter, path, classifier.model.params, base, force=force)
    parallel.barrier()
    return Path(path)


def _check(classifier: SequenceClassifier) -> None:
    if not isinstance(classifier, SequenceClassifier):
        raise ValueError(
            f"{type(classifier).__name__}: adapters have a place for the head of a "
            "SequenceClassifier only"
        )
