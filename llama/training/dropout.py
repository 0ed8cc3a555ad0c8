"""Dropout before an adapter's matrices, as in PEFT: lora_dropout.

What is dropped is a function of the seed, the step, the example and the matrix: the same in any
pass, in packed rows, when a block is recomputed, and on any number of ranks.
"""

import hashlib
from typing import List, NamedTuple

import torch

from llama.layers import parallel
from llama.training.packing import Span


class Dropout(NamedTuple):
    """Of one forward pass."""

    p: float
    spans: List[Span]  # of its examples
    seeds: List[int]  # one for each example

    def __call__(self, x: torch.Tensor, matrix: str, whole: bool) -> torch.Tensor:
        """x (B, T, in), each value 0 with probability p, else divided by 1 - p; padding is 0.

        Args:
            whole: x has all inputs of the matrix, or else this rank's part of them.
        """
        ranks, rank = (1, 0) if whole else (parallel.world_size(), parallel.rank())
        width, kept = x.shape[-1], torch.zeros_like(x)
        generator = torch.Generator(x.device)
        for (row, begin, end), example in zip(self.spans, self.seeds, strict=True):
            seed = number(example, matrix)
            generator.manual_seed(seed)
            drawn = x.new_empty(end - begin, ranks * width)
            drawn.bernoulli_(1 - self.p, generator=generator)
            kept[row, begin:end] = drawn.narrow(1, rank * width, width)
        return x * kept.div_(1 - self.p)


def number(*of: int | str) -> int:
    """A seed that depends on all of these."""
    digest = hashlib.sha256(repr(of).encode()).digest()
    return int.from_bytes(digest[:7], "big")
