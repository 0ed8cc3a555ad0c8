"""The CPU's own kernels, and the layers that compute through them (`swap`)."""

from llama.native.layers import swap

__all__ = ["swap"]
