"""The header of a .gguf file: its metadata and where its tensors lie.

Format: github.com/ggml-org/ggml, docs/gguf.md. The `gguf` package reads it too, and takes four
seconds to build its view of a 49,152-word vocabulary where this takes a fifth of one; that package
still does the dequantizing. Weights and tokenizers both begin here, so nothing else of this project
is imported.
"""

import mmap
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, Collection, Dict, List, NamedTuple, Tuple

MAGIC = b"GGUF"
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# Characters of a string or values of an array: far more than any vocabulary has. A damaged length
# beyond it may still lie within a large file, whose weights would then be taken for text.
_MAX_LENGTH = 1 << 24
_MAX_DIMS = 4  # GGML_MAX_DIMS


class TensorInfo(NamedTuple):
    shape: Tuple[int, ...]  # outermost first, as torch has it
    type: int  # gguf.GGMLQuantizationType
    offset: int  # in bytes, from the beginning of the file


class Header(NamedTuple):
    metadata: Dict[str, Any]
    tensors: Dict[str, TensorInfo]


def part_names(name: str) -> List[str]:
    """The names of all parts of the file of which this is one, by its name: llama-gguf-split's
    NAME-00001-of-00003.gguf. Of another file the name itself."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", name)
    if not match:
        return [name]
    return [f"{match[1]}-{i:05d}-of-{match[2]}.gguf" for i in range(1, int(match[2]) + 1)]


def are_parts(names: Collection[str]) -> bool:
    """Whether names of .gguf files are those of the parts of one."""
    return len({*map(tuple, map(part_names, names))}) == 1


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a .gguf file does."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_header(path: str | Path) -> Header:
    """Metadata by key and tensors by name.

    Raises:
        ValueError: no GGUF file, of a version other than 2 or 3, or one that is cut off.
    """
    path = Path(path)
    file = path.stat()
    return _read_header(path, file.st_size, file.st_mtime_ns)


@lru_cache(maxsize=1)  # weights and vocabulary are read one after the other
def _read_header(path: Path, size: int, modified: int) -> Header:
    if not is_gguf(path):
        raise ValueError(f"{path} isn't a GGUF file: it doesn't begin with {MAGIC!r}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Parser(data).header()
        except (
            struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError, RecursionError
        ) as error:  # fmt: skip
            raise ValueError(
                f"{path} is cut off or damaged: its header doesn't parse "
                f"({type(error).__name__}: {error})"
            ) from None
        except _Unsupported as error:
            raise ValueError(f"{path}: {error}") from None


class _Unsupported(Exception):
    pass


class _Parser:
    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def scalars(self, layout: str) -> Tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, n: int) -> List[str]:
        """n strings, without a call for each: a vocabulary has a hundred thousand."""
        data, at, size, unpack = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        found = []
        for _ in range(n):
            (length,) = unpack(data, at)
            at += 8
            if length > min(size - at, _MAX_LENGTH):
                raise struct.error(f"a string of {length} bytes at {at}")
            found.append(data[at : at + length])
            at += length
        self.at = at
        return [raw.decode("utf-8") for raw in found]

    def new_name(self, known: Dict[str, Any], what: str = "") -> str:
        name = self.string()
        if name in known:
            raise _Unsupported(f"it holds {what}{name[:80]} twice")
        return name

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalars(_SCALARS[kind])[0]
        kind, length = self.scalars("IQ")
        if length > min(len(self.data) - self.at, _MAX_LENGTH):
            raise struct.error(f"an array of {length} values at {self.at}")
        if kind in _SCALARS:
            return list(self.scalars(f"{length}{_SCALARS[kind]}"))
        if kind == _STRING:
            return self.strings(length)
        return [self.value(kind) for _ in range(length)]

    def header(self) -> Header:
        _, version, n_tensors, n_values = self.scalars("4sIQQ")
        if version not in (2, 3):
            raise _Unsupported(
                f"GGUF version {version} (or big-endian); 2 and 3 are read: convert it anew"
            )
        metadata: Dict[str, Any] = {}
        for _ in range(n_values):
            key = self.new_name(metadata, "the key ")
            (kind,) = self.scalars("I")
            metadata[key] = self.value(kind)
        found: Dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            name = self.new_name(found)
            (n_dims,) = self.scalars("I")
            if n_dims > _MAX_DIMS:
                raise struct.error(f"a tensor of {n_dims} dimensions at {self.at}")
            dims = self.scalars(f"{n_dims}Q")
            kind, offset = self.scalars("IQ")
            found[name] = TensorInfo(dims[::-1], kind, offset)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Unsupported(f"an alignment of {alignment!r} bytes")
        begin = -(-self.at // alignment) * alignment
        tensors = {name: info._replace(offset=begin + info.offset) for name, info in found.items()}
        return Header(metadata, tensors)
