"""What a checkpoint is to the rest of the package: weights by Meta's names, read slice by slice."""

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Mapping, NamedTuple, Optional, Protocol, Tuple

import torch

from llama.checkpoint.mapped import read_slice
from llama.model import ModelArgs

Shape = Tuple[int, ...]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What else the tensors of quantized weights consist of.
CODES = {
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """The short name that safetensors and GGUF have for a dtype."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype)[6:])


class Stored(NamedTuple):
    """A tensor in a file, row-major."""

    file: Path
    offset: int  # of its first byte
    shape: Shape
    dtype: torch.dtype

    def read(self, axis: int, start: int, stop: int) -> torch.Tensor:
        """[start, stop) along an axis; see `mapped.read_slice`."""
        return read_slice(*self, axis, start, stop)


@dataclass(frozen=True)
class Converted:
    """A weight that is made from a tensor in a file."""

    stored: Stored

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype


@dataclass(frozen=True)
class Derived(Converted):
    """One that is computed from the whole tensor."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    shape: Shape

    def read(self, axis: int, start: int, stop: int) -> torch.Tensor:
        whole = self.compute(self.stored.read(0, 0, self.stored.shape[0]))
        return whole.narrow(axis, start, stop - start)


class Checkpoint(Protocol):
    """What a reader offers. Names are Meta's; shapes are those of whole, unsharded weights."""

    path: Path
    args: ModelArgs
    tokenizer_path: Optional[Path]  # a tokenizer that comes with the weights

    def shapes(self) -> Dict[str, Shape]:
        """Every weight in the files."""

    def stored_as(self, name: str) -> str:
        """The dtype or quantization type in the file: BF16, Q4_0, ..."""

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """[start, stop) of a weight along an axis, in the file's dtype (dequantized: fp32).

        The result may be a view of the mapped file, copied on write.
        """


@dataclass
class InMemory:
    """Weights that are already in memory, by Meta's names, whole: a checkpoint to read or write."""

    args: ModelArgs
    weights: Mapping[str, torch.Tensor]
    path: Path = Path("(memory)")
    tokenizer_path: Optional[Path] = None

    def shapes(self) -> Dict[str, Shape]:
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def stored_as(self, name: str) -> str:
        return dtype_name(self.weights[name].dtype)

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self.weights[name].detach().narrow(axis, start, stop - start)


def find_tokenizer(directory: Path) -> Optional[Path]:
    """The tokenizer file beside weights: tokenizer.json, which says most, else tokenizer.model."""
    places = (directory / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((path for path in places if path.exists()), None)
