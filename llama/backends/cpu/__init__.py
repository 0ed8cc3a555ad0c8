"""CPU kernels in C++, and the layers that call them (`swap`)."""

from llama.backends.cpu.layers import check
from llama.backends.cpu.vision import swap

__all__ = ["check", "swap"]
