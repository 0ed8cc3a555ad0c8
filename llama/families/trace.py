"""Records the intermediate values of a forward pass: hidden states, attention, queries and keys.

    with trace(model) as seen:
        model(tokens)
    seen.attentions[0]    # (B, n_heads, T, S)

Within the context, hooks record hidden states, and attention is computed by its formula rather than
a fused kernel, which wouldn't return probabilities. Values are those of transformers'
`output_hidden_states` and `output_attentions`, and gradients flow through them.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Iterator, List

import torch
from torch import nn

from llama.layers import parallel
from llama.model import Attention, Step, Transformer, TransformerBlock


@dataclass
class Trace:
    """Values of the last forward pass, unsharded on every rank. S: number of keys attended to.

    Attributes:
        hidden_states: n_layers + 1 tensors (B, T, dim): the embeddings, and the output of each
            block; the last one after the final norm, as in transformers.
        attentions: attention probabilities (B, n_heads, T, S) of each layer.
        queries: (B, T, n_heads, head_dim) of each layer, after RoPE, in Meta's order of pairs.
        keys: the same of the new tokens, (B, T, n_kv_heads, head_dim). If ranks hold replicas of
            key/value heads, these occur more than once.
        cross_attentions: attention to images, for each layer of cross-attention a list: of each run
            of tokens that see the same images, (n_heads, tokens, S). S are these images' tiles, row
            by row, of each tile its class and then its patches, row by row.
    """

    hidden_states: List[torch.Tensor] = field(default_factory=list)
    attentions: List[torch.Tensor] = field(default_factory=list)
    queries: List[torch.Tensor] = field(default_factory=list)
    keys: List[torch.Tensor] = field(default_factory=list)
    cross_attentions: List[List[torch.Tensor]] = field(default_factory=list)


@contextmanager
def trace(model: Transformer) -> Iterator[Trace]:
    """Record a model's forward passes within the context; each overwrites the one before.

    The attentions take n_layers · B · n_heads · T · S values.

    Raises:
        ValueError: a model with compiled layers.
    """
    blocks = [block for block in model.layers if isinstance(block, TransformerBlock)]
    if len(blocks) < len(model.layers):
        raise ValueError("compiled layers can't be traced: build with compile=False")
    readers = [block.attention for block in getattr(model, "cross_attention_layers", ())]
    reading: List[List[torch.Tensor]] = [[] for _ in readers]  # of this pass
    seen, hooks = Trace(), []

    def begin(module: nn.Module, inputs: Any) -> None:
        for kept in (seen.hidden_states, seen.attentions, seen.queries, seen.keys):
            kept.clear()
        seen.hidden_states.append(inputs[0])

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.hidden_states.append(output)

    def end(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.hidden_states[-1] = output
        seen.cross_attentions = [[*found] for found in reading]
        for found in reading:
            found.clear()

    attentions = [block.attention for block in blocks]
    try:
        hooks.append(blocks[0].register_forward_pre_hook(begin))
        hooks += [block.register_forward_hook(keep) for block in blocks]
        hooks.append(model.norm.register_forward_hook(end))
        for attention in attentions:
            setattr(attention, "attend", partial(_attend, attention, seen))  # noqa: B010
        for reader, found in zip(readers, reading, strict=True):
            setattr(reader, "look", partial(_look, found))  # noqa: B010
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for attention in (*attentions, *readers):
            attention.__dict__.pop("attend", None)
            attention.__dict__.pop("look", None)


def _attend(
    attention: Attention,
    seen: Trace,
    xq: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    step: Step,
) -> torch.Tensor:
    """`Attention.attend`, by the formula: softmax(q kᵀ / sqrt(head_dim)) v."""
    B, T, heads, head_dim = xq.shape
    mask, cache = step.mask, step.cache
    if cache is None:
        keys, values = xk.transpose(1, 2), xv.transpose(1, 2)
    else:
        keys, values = cache.update(attention.layer_id, step.positions, xk, xv)
    group = heads // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(head_dim)  # (B, heads, T, S)
    if mask is not None:
        scores = scores + mask
    elif T > 1:  # from position 0 on
        scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
    probs = scores.softmax(-1, dtype=torch.float32).type_as(xq)
    seen.attentions.append(_whole(probs, 1))
    seen.queries.append(_whole(xq, 2))
    seen.keys.append(_whole(xk, 2))
    return (probs @ values).transpose(1, 2).reshape(B, T, -1)


def _look(
    found: List[torch.Tensor], q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """`CrossAttention.look`, by the formula."""
    group = q.shape[1] // len(keys)
    keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])  # (heads, n, S)
    probs = scores.softmax(-1, dtype=torch.float32).type_as(q)
    found.append(_whole(probs, 0))
    return (probs @ values).transpose(0, 1).reshape(len(q), -1)


def _whole(of_rank: torch.Tensor, axis: int) -> torch.Tensor:
    """The heads of all ranks; only this rank's have gradients."""
    if parallel.world_size() == 1:
        return of_rank
    parts = parallel.all_gather(of_rank.detach())
    parts[parallel.rank()] = of_rank
    return torch.cat(parts, axis)
