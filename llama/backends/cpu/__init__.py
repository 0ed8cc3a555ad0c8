"""CPU kernels in C++, and the layers that call them (`swap`)."""

from llama.backends.cpu.layers import check, swap

__all__ = ["check", "swap"]
