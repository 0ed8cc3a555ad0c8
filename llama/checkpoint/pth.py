""".pth files, torch.save's archives: where their tensors lie, and their checksums.

Also what Hugging Face's pytorch_model*.bin are.
"""

import io
import struct
import zipfile
from pathlib import Path
from typing import Dict

import torch

from llama.checkpoint.source import CODES, DTYPES, Stored
from llama.families.names import unwrapped

IGNORED_WEIGHTS = {"rope.freqs"}  # Llama 1 and 2 stored what follows from rope_theta


def index_pth(path: Path, *, codes: bool = False) -> Dict[str, Stored]:
    """Where each tensor of a .pth file lies, without reading one.

    Args:
        codes: it may hold more than floats, see `source.CODES`.

    The pickle is read with weights_only=True, which builds tensors and runs no code.
    """
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # state beside weights: "_extra_state"
            tensors = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damaged bytes lead an unpickler anywhere
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise ValueError(f"{path} isn't a readable checkpoint shard: {reason}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not weights by name")
    stored = {}
    for name, tensor in tensors.items():
        if name in IGNORED_WEIGHTS or str(name).endswith("._extra_state"):
            continue
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}, not a named tensor")
        if tensor.dtype not in (*DTYPES.values(), *(CODES.values() if codes else ())):
            raise ValueError(
                f"{path}: {name} has the dtype {tensor.dtype}: not a float; unsupported"
            )
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not tensor.is_contiguous():
            raise ValueError(
                f"{path}: {name} isn't stored as one contiguous block, as in files of torch before "
                "1.6: load it with torch, and save contiguous tensors anew"
            )
        offset = start + tensor.storage_offset() * tensor.dtype.itemsize
        stored[name] = Stored(path, offset, tuple(tensor.shape), tensor.dtype)
    return unwrapped(stored)


def mend_checksums(path: Path, checksums: Dict[int, int]) -> None:
    """Enter CRC-32s, by the offset of the data, where torch.save has put those of empty room.

    torch.load doesn't look at them; whatever else reads a .zip does. Format: APPNOTE.TXT, 4.3.
    """
    with zipfile.ZipFile(path) as archive:
        entries, at = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for entry in entries:
            file.seek(entry.header_offset + 26)
            begin = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if begin in checksums:
                crc = struct.pack("<I", checksums[begin])
                file.seek(at + 16)
                file.write(crc)
                descriptor = begin + entry.compress_size  # follows the data if flag 3 says so
                file.seek(descriptor)
                if entry.flag_bits & 8 and file.read(4) == b"PK\x07\x08":
                    file.seek(descriptor + 4)
                    file.write(crc)
            file.seek(at + 28)
            at += 46 + sum(struct.unpack("<HHH", file.read(6)))
