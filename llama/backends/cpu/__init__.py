"""CPU kernels in C++, and the layers that call them (`swap`)."""

from llama.backends.cpu.networks import check, check_shape
from llama.backends.cpu.vision import swap

__all__ = ["check", "check_shape", "swap"]
