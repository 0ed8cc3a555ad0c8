"""The .gguf header against the `gguf` package's reader, and against damaged files."""

import contextlib
import random
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any, Dict

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Type

from llama.text.gguf_header import Header, is_gguf, read_header

ARRAYS = {
    "uint8": (Type.UINT8, [0, 255]),
    "int8": (Type.INT8, [-128, 127]),
    "uint16": (Type.UINT16, [0, 65535]),
    "int16": (Type.INT16, [-32768, 32767]),
    "uint32": (Type.UINT32, [0, 2**32 - 1]),
    "int32": (Type.INT32, [-(2**31), 2**31 - 1]),
    "float32": (Type.FLOAT32, [0.5, -1e30, float("inf")]),
    "bool": (Type.BOOL, [True, False]),
    "string": (Type.STRING, ["", "a", "é 😀\n", "\x00"]),
    "uint64": (Type.UINT64, [0, 2**64 - 1]),
    "int64": (Type.INT64, [-(2**63), 2**63 - 1]),
    "float64": (Type.FLOAT64, [0.1, -1e300]),
}  # fmt: skip


def write(path: Path, alignment: int = 32, tensors: bool = True) -> Dict[str, Any]:
    """A file with values of every type; returns what was put in."""
    writer = gguf.GGUFWriter(path, "llama")
    expected: Dict[str, Any] = {"general.architecture": "llama"}
    if alignment != 32:
        writer.add_custom_alignment(alignment)
        expected["general.alignment"] = alignment
    for name, (kind, values) in ARRAYS.items():
        for i, value in enumerate(values):
            writer.add_key_value(f"one.{name}.{i}", value, kind)
            expected[f"one.{name}.{i}"] = value
        writer.add_key_value(f"many.{name}", values, Type.ARRAY, sub_type=kind)
        expected[f"many.{name}"] = values
    nested = [[1, 2, 3], [4], [5, 6]]
    writer.add_key_value("nested", nested, Type.ARRAY)
    writer.add_key_value("nested.strings", [["a", ""], ["é"]], Type.ARRAY)
    expected |= {"nested": nested, "nested.strings": [["a", ""], ["é"]]}
    if tensors:
        rng = np.random.default_rng(0)
        writer.add_tensor("vector", rng.random(7, np.float32))
        writer.add_tensor("matrix", rng.random((3, 5), np.float32).astype(np.float16))
        writer.add_tensor("cube", rng.random((2, 3, 4), np.float32))
        writer.add_tensor("integers", np.arange(6, dtype=np.int32).reshape(2, 3))
        blocks = gguf.quants.quantize(
            rng.random((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def assert_same_as_the_packages_reader(path: Path) -> Header:
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {name: f for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        if field.types[:2] != [Type.ARRAY, Type.ARRAY]:  # which that package doesn't put together
            assert ours.metadata[name] == field.contents(), name
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert list(info.shape) == tensor.shape.tolist()[::-1]
        assert info.type == tensor.tensor_type
        assert info.offset == tensor.data_offset
    return ours


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    write(path)
    return path


# --- good files ----------------------------------------------------------------------------------


def test_demo_models_header_is_what_the_gguf_package_reads(smollm2_path):
    header = assert_same_as_the_packages_reader(smollm2_path)
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(header.tensors) == 272


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
@pytest.mark.parametrize("tensors", [True, False])
def test_every_type_of_value_is_read_as_it_was_written(tmp_path, alignment, tensors):
    path = tmp_path / "all.gguf"
    expected = write(path, alignment, tensors)
    header = assert_same_as_the_packages_reader(path)
    assert set(header.metadata) == set(expected)
    for name, value in expected.items():
        got = header.metadata[name]
        if "float32" in name:
            assert np.array_equal(np.float32(got), np.float32(value))
        else:
            assert got == value, name
            assert type(got) is type(value), name
    assert all(info.offset % alignment == 0 for info in header.tensors.values())
    assert len(header.tensors) == 5 * tensors


def test_tensor_data_lies_where_the_header_says(tmp_path):
    path = tmp_path / "all.gguf"
    write(path, 64)
    info = read_header(path).tensors["integers"]
    assert info.shape == (2, 3)
    raw = path.read_bytes()[info.offset :][: 6 * 4]
    assert np.array_equal(np.frombuffer(raw, np.int32), np.arange(6))


def test_a_path_may_be_a_string_and_version_2_is_read_like_3(sample, tmp_path):
    assert read_header(str(sample)) == read_header(sample)
    path = tmp_path / "v2.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 2) + sample.read_bytes()[8:])
    assert read_header(path) == read_header(sample)


def test_is_gguf_looks_at_the_first_four_bytes(tmp_path):
    path = tmp_path / "x"
    for data, answer in ((b"GGUF", True), (b"GGUF\x03", True), (b"GGU", False), (b"", False)):
        path.write_bytes(data)
        assert is_gguf(path) is answer


# --- files that are refused ----------------------------------------------------------------------


def header_bytes(version: int = 3, tensors: int = 0, values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def value(kind: int, data: bytes, name: bytes = b"k") -> bytes:
    return header_bytes(values=1) + string(name) + struct.pack("<I", kind) + data


def tensor(name: bytes = b"t", shape=(4,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


HUGE = 2**64 - 1
WRONG = {
    "empty": (b"", "GGUF"),
    "another format": (b"PK\x03\x04" + bytes(50), "GGUF"),
    "nothing but the magic": (b"GGUF", "cut off"),
    "version 1": (header_bytes(1), "version 1 "),
    "version 4": (header_bytes(4), "version 4 "),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless values": (header_bytes(values=HUGE), "cut off"),
    "endless tensors": (header_bytes(tensors=HUGE), "cut off"),
    "an endless string": (value(8, struct.pack("<Q", HUGE)), "cut off"),
    "an endless key": (header_bytes(values=1) + struct.pack("<Q", 2**63), "cut off"),
    "an endless array": (value(9, struct.pack("<IQ", 0, HUGE)), "cut off"),
    "an endless array of strings": (value(9, struct.pack("<IQ", 8, HUGE)), "cut off"),
    "an endless array of arrays": (value(9, struct.pack("<IQ", 9, 2**62)), "cut off"),
    "an array of one too many": (value(9, struct.pack("<IQ", 4, 3) + bytes(8)), "cut off"),
    "arrays in arrays without end": (value(9, struct.pack("<IQ", 9, 1) * 50_000), "damaged"),
    "an unknown type": (value(13, bytes(50)), "damaged"),
    "an unknown type in an array": (value(9, struct.pack("<IQ", 99, 3) + bytes(50)), "damaged"),
    "a key that isn't UTF-8": (value(4, bytes(4), b"\xff\xfe"), "damaged"),
    "a long string that isn't UTF-8": (value(8, string(b"\xff" * 1_000_000)), "damaged"),
    "endless dimensions": (
        header_bytes(tensors=1) + string(b"t") + struct.pack("<I", 2**32 - 1) + bytes(50),
        "cut off",
    ),
    "a key twice": (
        header_bytes(values=2) + (string(b"k") + struct.pack("<II", 4, 0)) * 2,
        "key k twice",
    ),
    "a tensor twice": (header_bytes(tensors=2) + tensor() + tensor(), "twice"),
    "an alignment of 0": (value(4, bytes(4), b"general.alignment"), "alignment of 0"),
    "a negative alignment": (
        value(5, struct.pack("<i", -32), b"general.alignment"),
        "alignment of -32",
    ),
    "an alignment in words": (value(8, string(b"32"), b"general.alignment"), "alignment of '32'"),
    "a list as alignment": (value(9, struct.pack("<IQ", 4, 0), b"general.alignment"), "alignment"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_not_read_are_refused_by_name_at_once(tmp_path, name):
    data, message = WRONG[name]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(data)
    start = time.thread_time()
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert time.thread_time() - start < 60
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@contextlib.contextmanager
def at_most(mebibytes: float):
    """Fails if more memory than that is taken at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < mebibytes * 2**20, f"{peak / 2**20:.0f} MiB"


def read_or_refuse(path: Path) -> bool:
    """Whether a header could be read; anything but a ValueError passes through."""
    start = time.thread_time()
    try:
        read_header(path)
        return True
    except ValueError as error:
        assert re.search(re.escape(str(path)), str(error))
        return False
    finally:
        assert time.thread_time() - start < 60


def test_cut_off_files_are_refused_unless_only_tensor_data_is_missing(sample, tmp_path):
    data = sample.read_bytes()
    end = min(info.offset for info in read_header(sample).tensors.values())
    path = tmp_path / "cut.gguf"
    rng = random.Random(1)
    # The last bytes of the header may be padding before the data.
    for cut in [*rng.sample(range(end - 32), 200), 0, 1, 3, 4, 7, 8, 23, 24]:
        path.write_bytes(data[:cut])
        assert not read_or_refuse(path), cut
    for cut in [end, *rng.sample(range(end, len(data)), 20)]:
        path.write_bytes(data[:cut])
        assert read_header(path) == read_header(sample)


def test_the_demo_model_cut_off_anywhere_is_refused_or_read(smollm2_path, tmp_path):
    end = min(info.offset for info in read_header(smollm2_path).tensors.values())
    with smollm2_path.open("rb") as file:
        data = file.read(end + 1000)
    path = tmp_path / "cut.gguf"
    for cut in random.Random(2).sample(range(end - 32), 15):
        path.write_bytes(data[:cut])
        assert not read_or_refuse(path), cut
    path.write_bytes(data)
    assert len(read_header(path).tensors) == 272


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_are_refused_or_read_and_nothing_else(sample, tmp_path, seed):
    data = sample.read_bytes()
    end = min(info.offset for info in read_header(sample).tensors.values())
    path = tmp_path / "damaged.gguf"
    rng = random.Random(seed)
    outcomes = []
    with at_most(10):
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(rng.choice([1, 1, 1, 2, 8])):
                at = rng.randrange(4, end)
                byte = rng.choice([damaged[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)])
                damaged[at] = byte
            path.write_bytes(damaged)
            outcomes.append(read_or_refuse(path))
    assert 10 < sum(outcomes) < 140  # the damage is neither harmless nor all at the beginning


def sparse(path: Path, data: bytes) -> Path:
    """A file of 64 GiB, all zeros but for its beginning, that takes up no room."""
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(2**36)
    return path


def test_reading_a_header_takes_no_memory_for_the_tensors(tmp_path):
    path = sparse(tmp_path / "large.gguf", header_bytes(tensors=1) + tensor(b"t", (2**33,), 1))
    start = time.thread_time()
    with at_most(1):
        assert read_header(path).tensors["t"].shape == (2**33,)
    assert time.thread_time() - start < 60


DAMAGED_LENGTHS = {
    "string": value(8, struct.pack("<Q", 2**28)),
    "array of bytes": value(9, struct.pack("<IQ", 0, 2**28)),
    "array of strings": value(9, struct.pack("<IQ", 8, 2**28)),
    "array of arrays": value(9, struct.pack("<IQ", 9, 2**28)),
    "metadata": header_bytes(values=2**60),
    "tensors": header_bytes(tensors=2**60),
    "dimensions": header_bytes(tensors=1) + string(b"t") + struct.pack("<I", 2**28),
}


@pytest.mark.parametrize("name", DAMAGED_LENGTHS)
def test_a_damaged_length_is_refused_even_where_the_file_is_that_long(tmp_path, name):
    """One bit mustn't have gigabytes of weights read as if they were the header."""
    path = sparse(tmp_path / "large.gguf", DAMAGED_LENGTHS[name])
    with at_most(10):
        assert not read_or_refuse(path)
