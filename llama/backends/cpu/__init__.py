"""The CPU's own kernels, and the layers that compute through them (`swap`)."""

from llama.backends.cpu.layers import check, swap

__all__ = ["check", "swap"]
