"""Reads a slice of one tensor from a file; every format's reader ends here."""

import mmap
from pathlib import Path

import numpy as np
import torch


def map_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """A view of nbytes of a file, mapped for as long as the result lives.

    Each call makes a mapping of its own, so that a slice which is copied or converted leaves this
    process's memory at once: a file mapped as a whole would stay resident beside the model.

    Raises:
        ValueError: the file ends before that.
    """
    check_length(path, offset + nbytes)
    if nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # Copy-on-write: the file can't be changed, and torch gets the writable array it wants.
        pages = mmap.mmap(
            file.fileno(), offset - begin + nbytes, access=mmap.ACCESS_COPY, offset=begin
        )
    return np.frombuffer(pages, dtype=np.uint8, offset=offset - begin)


def own_memory(rows: int, row: int) -> torch.Tensor:
    """Zeros (rows, row), uint8, which go back to the system when they are freed.

    What malloc gets back it keeps, in holes between other weights.
    """
    if rows * row == 0:
        return torch.zeros(rows, row, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, rows * row), dtype=torch.uint8).view(rows, row)


def read_slice(
    path: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    axis: int,
    start: int,
    stop: int,
) -> torch.Tensor:
    """[start, stop) along an axis of a row-major tensor that begins at a byte of a file.

    Only these bytes are read: rows are mapped in one piece, columns are read from each row.

    Raises:
        ValueError: the file ends before that.
    """
    if axis == 1 and stop - start < shape[1]:
        return _read_columns(path, offset, shape, dtype, start, stop)
    if axis == 0:
        row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        offset, shape = offset + start * row, (stop - start, *shape[1:])
    raw = map_bytes(path, offset, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
    return torch.from_numpy(raw).view(dtype).view(shape)


def _read_columns(
    path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, start: int, stop: int
) -> torch.Tensor:
    width, row = dtype.itemsize * (stop - start), dtype.itemsize * shape[1]
    check_length(path, offset + shape[0] * row)
    out = torch.empty(shape[0], stop - start, dtype=dtype)
    into = memoryview(out.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as file:
        for i in range(shape[0]):
            file.seek(offset + i * row + start * dtype.itemsize)
            if file.readinto(into[i * width : (i + 1) * width]) != width:
                raise ValueError(f"{path} became shorter while it was read")
    return out


def check_length(path: Path, end: int) -> None:
    """Raises ValueError for a file that ends before a tensor of it does, at byte `end`."""
    size = path.stat().st_size
    if end > size:
        raise ValueError(
            f"{path} is cut off: it has {size} bytes and a tensor ends at {end}; fetch it again"
        )
