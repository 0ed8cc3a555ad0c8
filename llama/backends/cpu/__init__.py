"""CPU kernels in C++, and the layers that call them (`swap`)."""

from llama.backends.cpu.layers import check, check_shape, swap

__all__ = ["check", "check_shape", "swap"]
