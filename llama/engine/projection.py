"""Hidden states projected to the vocabulary, a few positions at a time."""

from typing import Tuple

import torch

from llama.model import Transformer

PROJECTED = 128  # positions at a time: 65 MB of fp32 for Llama 3's vocabulary


def logprobs_of(
    model: Transformer, h: torch.Tensor, ids: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """What the model says of the ids (N,) that follow positions with the hidden states h (N, dim).

    Without gradients: those would need the logits of all positions (`training.losses`).

    Returns:
        The natural log-probability of each id, (N,) fp32, and whether it is the most probable one.
    """
    logprobs = torch.empty(len(ids), device=h.device)
    greedy = torch.empty(len(ids), dtype=torch.bool, device=h.device)
    for begin in range(0, len(ids), PROJECTED):
        here = slice(begin, begin + PROJECTED)
        predicted = model.logits(h[here]).log_softmax(-1)
        logprobs[here] = predicted.gather(-1, ids[here, None])[:, 0]
        greedy[here] = predicted.argmax(-1) == ids[here]
    return logprobs, greedy
