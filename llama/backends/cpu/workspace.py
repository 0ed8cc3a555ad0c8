"""Temporary buffers of the CPU kernels."""

import threading
from typing import Dict, List, Tuple

import torch

from llama.backends.cpu import kernels

FLOATS = {"F32", "F16", "BF16", "FP8", "NF4", "FP4"}  # block types whose products are of floats


class Workspace:
    """Temporary buffers that all layers share.

    Args:
        dtype: of the model.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: Dict[str, torch.Tensor] = {}
        self.lock = threading.Lock()  # threads may share a model, but not the buffers

    def take(self, name: str, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """n values, uninitialized."""
        found = self._buffers.get(name)
        if found is None or found.numel() < n or found.dtype != dtype:
            self._buffers[name] = found = torch.empty(n, dtype=dtype)
        return found[:n]

    def inputs(
        self, name: str, tokens: int, cols: int, kinds: set[str], floats: bool = False
    ) -> Tuple[kernels.Inputs, List[torch.Tensor]]:
        """Buffers for the inputs of products with weights of these block types, as the kernels take
        them, and their tensors: who keeps the first keeps these, too, since a later call may
        replace a buffer by a larger one. floats: as fp32, too."""
        pairs = self.dtype == torch.bfloat16 and bool(kernels.library().multiplies_bf16())
        dense = kinds & FLOATS
        height = kernels.library().group_height(tokens)
        n, found = -(-tokens // height) * height * cols, kernels.Inputs(cols=cols, height=height)
        kept: List[torch.Tensor] = []
        if floats or dense - ({"BF16"} if pairs else set()):
            kept.append(self.take(f"{name} floats", n))
            found.floats = kept[-1].data_ptr()
        if pairs and "BF16" in kinds:
            kept.append(self.take(f"{name} halves", n, torch.bfloat16))
            found.halves = kept[-1].data_ptr()
        if kinds - dense:
            words = n // 32 * 20  # struct Fixed, of 32 values
            kept.append(self.take(f"{name} fixed", words, torch.int32))
            found.fixed = kept[-1].data_ptr()
        return found, kept
