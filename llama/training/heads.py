"""What models with a head in place of the output layer share: their files."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch

from llama.checkpoint import Checkpoint, Shape
from llama.checkpoint.opening import format_at
from llama.families.registry import family_of
from llama.model import Transformer
from llama.text.files import read_object
from llama.training import lora

SCORE = "score.weight"


class Body:
    """A checkpoint without its head, which is the output layer for a text model.

    Its shape says that the embeddings are tied, whatever the files do: so no output layer is asked
    for, nor held.
    """

    def __init__(self, source: Checkpoint, head: Sequence[str]):
        self._source, self._head = source, head
        self.path, self.tokenizer_path = source.path, source.tokenizer_path
        self.args = replace(source.args, tied_embeddings=True)

    def shapes(self) -> Dict[str, Shape]:
        shapes = self._source.shapes()
        return {name: shape for name, shape in shapes.items() if name not in self._head}

    def stored_as(self, name: str) -> str:
        return self._source.stored_as(name)

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self._source.read(name, axis, start, stop)


def config_with_head(path: Path, architecture: str) -> Dict[str, Any]:
    """config.json of such an architecture; empty for other checkpoints."""
    if format_at(path) != "hf":
        return {}
    config = read_object(path / "config.json")
    return config if config.get("architectures") == [architecture] else {}


def check_labels(labels: Sequence[str]) -> None:
    """Check the names of classes.

    Raises:
        ValueError: none, or one twice; one text, whose letters would be taken for names.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels={labels!r:.60} is one text: pass a list of names")
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"labels={list(labels)[:20]}: at least one name, and none twice")


def check_writable(model: Transformer, architecture: str) -> None:
    """Check that a model's weights are all of it, and transformers' class computes its shape.

    Raises:
        ValueError: adapters are attached; it is of another model_type, of whose differences the
            class knows nothing.
    """
    if names := lora.names(model):
        raise ValueError(
            f"adapter {', '.join(names)} is beside the weights, which alone are written: lora.merge"
            " it first, or lora.detach it; write_classifier_adapter writes a SequenceClassifier's"
        )
    args = model.params
    kind = family_of(args).write_config(args).get("model_type", "llama")
    if kind != "llama":
        raise ValueError(
            f"model_type={kind!r}: {architecture} would compute such a model as a Llama, and give "
            "other numbers. Keep what was learned with torch.save(classifier.state_dict(), FILE)"
        )


def default_labels(n: int) -> List[str]:
    if n < 1:
        raise ValueError(f"num_labels={n} must be at least 1")
    return [f"LABEL_{i}" for i in range(n)]


def read_head(
    source: Checkpoint, path: Path, config: Dict[str, Any]
) -> Tuple[List[str], torch.Tensor]:
    """The labels by config.json at `path`, and the weight of the head.

    Raises:
        ValueError: no such weight, or one of another shape; labels that aren't named 0, 1, ...
    """
    shape = source.shapes().get(SCORE)
    if shape is None:
        raise ValueError(f"{source.path} lacks {SCORE}, the head of a classifier: fetch it again")
    names, back, n = (config.get(key) for key in ("id2label", "label2id", "num_labels"))
    if names is None:
        n = 2 if n is None else n  # transformers writes neither where there are 2
    elif not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(names))}:
        raise ValueError(f"{path}: id2label={str(names)[:80]} isn't a name for each of 0, 1, ...")
    elif n not in (None, len(names)):
        raise ValueError(f"{path}: num_labels={str(n)[:80]} contradicts id2label, of {len(names)}")
    else:
        n = len(names)
    expected = (n, source.args.dim)
    if type(n) is not int or shape != expected:
        raise ValueError(
            f"{source.path}: {SCORE} has the shape {shape}, and its configuration asks for "
            f"({str(n)[:80]}, {source.args.dim})"
        )
    labels = default_labels(n) if names is None else [names[str(i)] for i in range(n)]
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: id2label={str(names)[:80]} isn't a name for each of 0, 1, ...")
    indices = {label: i for i, label in enumerate(labels)}
    if back is not None and back != indices:
        raise ValueError(f"{path}: label2id={str(back)[:80]} contradicts the labels {labels[:20]}")
    return labels, source.read(SCORE, 0, 0, n)
