"""The training loss: cross-entropy of each token given those before it."""

import math
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region
from torch.autograd.function import once_differentiable

from llama.layers import parallel
from llama.layers.ids import check_token_tensor
from llama.model import Transformer

POSITIONS = 256  # projected to the vocabulary at a time
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
    alone = parallel.world_size() == 1
    if not alone and not hasattr(model.output, "weight"):
        raise ValueError("several ranks learn with plain layers: build without quantize, offload")
    if not isinstance(model.output, ColumnParallelLinear):  # quantized, or with an adapter
        return F.cross_entropy(model.logits(h), targets, reduction="sum"), len(targets)
    h = h / getattr(model.params, "logits_scaling", 1.0)  # as `model.logits` does, of Granite
    if alone:
        learns = torch.is_grad_enabled()
        return _Projected.apply(h, model.output.weight, targets, learns), len(targets)
    weight = model.output.weight  # this rank's words
    logits = F.linear(copy_to_model_parallel_region(h), weight).float()
    known = model.vocab_size - parallel.rank() * len(weight)
    if known < len(weight):  # the last rank's part is padded with zeros, which are no tokens
        logits = logits.masked_fill(torch.arange(len(weight), device=h.device) >= known, -math.inf)
    return vocab_parallel_cross_entropy(logits, targets).sum(), len(targets)


class _Projected(torch.autograd.Function):
    """Cross-entropy of hidden states (N, dim) projected by a weight (vocab, dim), summed.

    Some positions at a time, with their gradients: logits of all, of which a plain loss holds three
    or four copies, are often the largest tensors of a step. The products and their number are the
    same. Matrix products are in autocast's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, learns: bool
    ) -> torch.Tensor:
        kind = h.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        of_h, of_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        grad_h = torch.empty_like(h) if of_h else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        total = torch.zeros((), device=h.device)
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(low)
            for begin in range(0, len(h), POSITIONS):
                part = slice(begin, begin + POSITIONS)
                some, wanted = h[part].to(low), targets[part, None]
                logits = F.linear(some, matrix).float()
                logits -= logits.amax(-1, keepdim=True)
                chosen = logits.gather(1, wanted)
                slope = logits.exp_()  # in place, and once: passes over logits are what takes time
                sums = slope.sum(-1, keepdim=True)
                total += (sums.log() - chosen).sum()
                if not (of_h or of_weight):
                    continue
                slope /= sums  # softmax - 1 at the target
                slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0))
                slope = slope.to(low)
                if grad_h is not None:
                    grad_h[part] = slope @ matrix
                if grad_weight is not None:
                    grad_weight += slope.T @ some
        ctx.save_for_backward(grad_h, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        grad_h, grad_weight = ctx.saved_tensors
        return (
            None if grad_h is None else grad_h * scale,
            None if grad_weight is None else (grad_weight * scale).to(ctx.dtype),
            None,
            None,
        )
