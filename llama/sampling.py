"""From logits to a token: pure functions, in fp32."""

from typing import Optional

import torch


def sample_top_p(
    probs: torch.Tensor, p: float, generator: Optional[torch.Generator] = None
) -> torch.Tensor:
    """Draw from the smallest set of most probable tokens that together reach p.

    Nucleus sampling, arXiv 1904.09751. A token is out when those more probable than it already
    exceed p, so the most probable one is always in.

    Args:
        probs: (..., vocab_size), summing to 1.

    Returns:
        Ids of shape (..., 1).
    """
    ordered, ids = torch.sort(probs, dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before > p, 0.0)  # multinomial doesn't ask for a sum of 1
    drawn = torch.multinomial(ordered, num_samples=1, generator=generator)
    return ids.gather(-1, drawn)


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    generator: Optional[torch.Generator] = None,
) -> torch.Tensor:
    """One token id per row: (B, vocab_size) -> (B,). Temperature 0 takes the most probable one."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    return sample_top_p(probs, top_p, generator).squeeze(-1)
