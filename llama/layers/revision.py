"""Counts changes to a model's weights, so that caches computed with earlier ones are cleared."""

from torch import nn


def revision(model: nn.Module) -> int:
    """How often `changed` was called for a model; 0 after loading."""
    return getattr(model, "_revision", 0)


def changed(model: nn.Module) -> None:
    """Call it after changing weights in place or adding layers, as training and LoRA do."""
    model._revision = revision(model) + 1  # type: ignore[assignment]
