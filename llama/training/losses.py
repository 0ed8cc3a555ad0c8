"""The training loss: cross-entropy of each token given those before it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region

from llama.layers import parallel
from llama.layers.ids import check_token_tensor
from llama.model import Transformer

IGNORED = -100  # the label of a token without a loss: torch's and transformers' number


def next_token_loss(
    model: Transformer, tokens: torch.Tensor, labels: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The mean of -log p(token | those before it), in nats, over the tokens that aren't IGNORED.

    Only their positions are projected to the vocabulary, and each rank computes the logits of its
    own part of it: no rank ever holds all logits of a position.

    Args:
        tokens: (B, T) ids, padded on the right with any id of the vocabulary (and IGNORED as its
            label), or (B, T, dim) embeddings.
        labels: (B, T), the tokens themselves, or IGNORED. The first of a row never counts: nothing
            comes before it.
        options: `positions` and `mask` of the forward pass.

    Raises:
        ValueError: ids outside of the vocabulary; labels of another shape, outside of the
            vocabulary, or all IGNORED; several ranks of a quantized model.
    """
    total, count = summed_loss(model, tokens, labels, **options)
    if not count:
        raise ValueError("no token has a loss: all labels are ignored")
    return total / count


def summed_loss(
    model: Transformer, tokens: torch.Tensor, labels: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, int]:
    """The sum that `next_token_loss` is the mean of, and the number of its tokens.

    Sums of small batches add up to that of a large one; means don't where lengths differ.
    """
    if labels.shape != tokens.shape[:2]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for tokens {tuple(tokens.shape[:2])}: "
            "one for each token"
        )
    if not tokens.is_floating_point():
        check_token_tensor(tokens, model.vocab_size)
    asked = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][asked]
    if not len(targets):
        return torch.zeros((), device=labels.device), 0
    if not 0 <= targets.min() <= targets.max() < model.vocab_size:
        raise ValueError(
            f"labels from {int(targets.min())} to {int(targets.max())}: they are ids from 0 to "
            f"{model.vocab_size - 1}, or {IGNORED} for a token without a loss"
        )
    h = model.hidden(tokens, **options)[:, :-1][asked]  # (N, dim)
    if parallel.world_size() == 1:
        return F.cross_entropy(model.logits(h), targets, reduction="sum"), len(targets)
    if not hasattr(model.output, "weight"):
        raise ValueError("several ranks learn with plain layers: build without quantize, offload")
    weight: torch.Tensor = model.output.weight  # type: ignore[assignment]  # this rank's words
    logits = F.linear(copy_to_model_parallel_region(h), weight).float()
    known = model.vocab_size - parallel.rank() * len(weight)
    if known < len(weight):  # the last rank's part is padded with zeros, which are no tokens
        logits = logits.masked_fill(torch.arange(len(weight), device=h.device) >= known, -math.inf)
    return vocab_parallel_cross_entropy(logits, targets).sum(), len(targets)
