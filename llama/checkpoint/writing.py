"""What the writers of all formats share: tensors written a few rows at a time."""

from typing import BinaryIO, Callable, Iterator, Optional

import torch

from llama.checkpoint.shapes import chunks, weight_shapes
from llama.checkpoint.source import Checkpoint

# Called with the number of bytes written since the last call.
Progress = Callable[[int], object]


def no_progress(_: int) -> None:
    pass


def rows(
    source: Checkpoint, name: str, dtype: Optional[torch.dtype] = None
) -> Iterator[torch.Tensor]:
    """A whole weight, a few rows (whole heads of q, k and v) at a time, in order."""
    shape = weight_shapes(source.args)[name]
    for start, stop in chunks(shape, 0, 0, shape[0], source.args.head_dim):
        part = source.read(name, 0, start, stop)
        yield part if dtype is None else part.to(dtype)


def read_whole(source: Checkpoint, name: str) -> torch.Tensor:
    """A whole weight."""
    return source.read(name, 0, 0, weight_shapes(source.args)[name][0])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensor(file: BinaryIO, tensor: torch.Tensor, progress: Progress = no_progress) -> None:
    """Write a tensor at the file's position."""
    progress(file.write(bytes_of(tensor)))


def dtype_of(source: Checkpoint, name: str) -> torch.dtype:
    """The dtype in which a weight is read: the file's own, fp32 where it is quantized."""
    return source.read(name, 0, 0, 1).dtype
