"""Counts changes of a model's weights, so that caches of what the old ones gave are dropped."""

from torch import nn


def revision(model: nn.Module) -> int:
    """How often `changed` was called for a model; 0 as it was loaded."""
    return getattr(model, "_revision", 0)


def changed(model: nn.Module) -> None:
    """To be called by what changes weights in place or adds layers, such as training and LoRA."""
    model._revision = revision(model) + 1  # type: ignore[assignment]
