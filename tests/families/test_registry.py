"""Networks of every family, built without memory."""

import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from vision import TINY_LLAMA4, TINY_VISION

from llama.families.registry import build, family_of


class Allocations(TorchDispatchMode):
    """Elements of tensors that are made on the CPU."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and found.device.type == "cpu":
            self.elements += found.numel()
        return found


@pytest.mark.parametrize("args", [TINY, TINY_VISION, TINY_LLAMA4], ids=lambda args: type(args))
def test_networks_on_meta_allocate_nothing(args):
    """fairscale does, in fp32: never written to, but counted against the limits of a process."""
    with Allocations() as made:
        network = build(args, device="meta")
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert made.elements == 0
    with Allocations() as made:  # what is counted above does see them elsewhere
        same = family_of(args).network(args)
    assert made.elements > 0.9 * sum(parameter.numel() for parameter in same.parameters())
    assert [(n, p.shape) for n, p in network.named_parameters()] == [
        (n, p.shape) for n, p in same.named_parameters()
    ]
