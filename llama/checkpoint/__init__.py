"""Checkpoints in Meta's, Hugging Face's and GGUF's formats: opened, loaded, converted.

    source = checkpoint.open("checkpoints/Llama-3.2-1B")
    model = checkpoint.load(source, Transformer(source.args, device="meta"))

A format's reader says what its files hold (`args`, `shapes`) and reads a range of a weight along
one axis, by Meta's names. Which ranges a rank needs, strictness, dtype and padding are the same
for all formats.
"""

from llama.checkpoint.loading import fingerprint, gather, load, read_shard
from llama.checkpoint.opening import open
from llama.checkpoint.shapes import check_shapes, local_shape, weight_shapes
from llama.checkpoint.source import DTYPES, Checkpoint, InMemory, Shape, dtype_name

__all__ = [
    "DTYPES",
    "Checkpoint",
    "InMemory",
    "Shape",
    "check_shapes",
    "dtype_name",
    "fingerprint",
    "gather",
    "load",
    "local_shape",
    "open",
    "read_shard",
    "weight_shapes",
]
