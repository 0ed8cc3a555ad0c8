"""One slice of one tensor, out of a file: the bottom of every reader."""

from pathlib import Path

import numpy as np
import torch


def map_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """A view of nbytes of a file, mapped for as long as the result lives.

    Each call makes a mapping of its own, so what was read leaves this process's memory with the
    tensor that it was copied into: a file mapped as a whole would stay resident beside the model.

    Raises:
        ValueError: the file ends before that.
    """
    size = path.stat().st_size
    if offset < 0 or offset + nbytes > size:
        raise ValueError(
            f"{path} is cut off: it has {size} bytes and a tensor ends at {offset + nbytes}; "
            "fetch it again"
        )
    if nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    # "c" maps copy-on-write: the file can't be changed, and torch gets the writable array it wants.
    return np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=(nbytes,))


def read_slice(
    path: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    axis: int,
    start: int,
    stop: int,
) -> torch.Tensor:
    """[start, stop) along an axis of a row-major tensor that begins at a byte of a file."""
    if axis == 0:
        row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        offset, shape, start, stop = (
            offset + start * row,
            (stop - start, *shape[1:]),
            0,
            stop - start,
        )
    raw = map_bytes(path, offset, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
    return torch.from_numpy(raw).view(dtype).view(shape).narrow(axis, start, stop - start)
