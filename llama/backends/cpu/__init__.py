"""CPU kernels in C++, and the layers that call them (`swap`)."""

from llama.backends.cpu.layers import swap
from llama.backends.cpu.limits import check

__all__ = ["check", "swap"]
