"""What the writers of all formats share: all or nothing, and one block of one tensor at a time."""

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, Optional, Tuple

import torch

from llama.checkpoint import Checkpoint, blocks, weight_shapes

# Called with the number of bytes written since the last call.
Progress = Callable[[int], object]


def no_progress(_: int) -> None:
    pass


@contextmanager
def beside(path: str | Path, force: bool = False) -> Iterator[Path]:
    """A path to write to, renamed to `path` once the block ends; removed if it doesn't end well.

    So whatever interrupts the writing, nothing half-written ever has the final name, and with
    `force` the old file or directory stays until the new one is complete.

    Raises:
        FileExistsError: `path` exists and not `force`; or it has directories in it, so that it's no
            checkpoint but perhaps the place of all of them.
    """
    path = recovered(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists: choose another name, or overwrite it with force")
    check_plain(path)
    partial, old = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        if path.exists():
            _remove(old)
            path.rename(old)
        partial.rename(path)
        _remove(old)
    finally:
        _remove(partial)
        if old.exists() and not path.exists():  # stopped between the two renames
            old.rename(path)


def check_plain(path: Path) -> None:
    """Raises FileExistsError for a directory with directories in it."""
    if path.is_dir() and any(inner.is_dir() for inner in path.iterdir()):
        raise FileExistsError(f"{path} has directories in it: not overwritten, even with force")


def recovered(path: str | Path) -> Path:
    """The path; what it held is back there if a process was killed as it was being replaced."""
    path = Path(path)
    old = _beside(path)[1]
    if old.exists() and not path.exists():
        old.rename(path)
    return path


def _beside(path: Path) -> Tuple[Path, Path]:
    """Where the new is written, and where the old is put."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rows(
    source: Checkpoint, name: str, dtype: Optional[torch.dtype] = None
) -> Iterator[torch.Tensor]:
    """A whole weight, as consecutive blocks of its rows (whole heads of q, k and v)."""
    shape = weight_shapes(source.args)[name]
    for start, stop in blocks(shape, 0, 0, shape[0], source.args.head_dim):
        block = source.read(name, 0, start, stop)
        yield block if dtype is None else block.to(dtype)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensor(file: BinaryIO, tensor: torch.Tensor, progress: Progress = no_progress) -> None:
    """Write a tensor at the file's position."""
    progress(file.write(bytes_of(tensor)))


def dtype_of(source: Checkpoint, name: str) -> torch.dtype:
    """The dtype in which a weight is read: the file's own, fp32 where it is quantized."""
    return source.read(name, 0, 0, 1).dtype
