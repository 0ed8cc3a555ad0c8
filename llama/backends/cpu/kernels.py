"""The CPU kernels: C++ compiled on first use for this machine, called through ctypes.

They exist because a decoding step on a CPU should take no longer than reading the weights, and the
libraries measured take about twice that or more. The products of each block type are a library of
their own, since a model has one to three of the types, and to compile all takes a minute.
"""

import ctypes
import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Iterable, List, Sequence

import torch

from llama.checkpoint.shapes import MATRICES
from llama.text.cache_dir import cache_dir

SOURCE = Path(__file__).with_name("kernels.cpp")
PRODUCTS = SOURCE.with_name("products.cpp")  # of one block type
HEADERS = sorted(SOURCE.parent.glob("*.h"))

Pointer = ctypes.c_void_p
Int = ctypes.c_int32
KINDS = (  # enum Kind
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "I4_32", "I4_64", "I4_128", "I8_32", "I8_128", "FP8",
    "NF4", "FP4", "E2M1",
)  # fmt: skip


class Weight(ctypes.Structure):
    _fields_ = [("data", Pointer), ("kind", Int), ("rows", Int), ("cols", Int)]


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, Int) for name in ("dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim")),
        ("eps", ctypes.c_float), ("residual", ctypes.c_float),
    ]  # fmt: skip


class Attending(ctypes.Structure):
    _fields_ = [(name, Int) for name in ("no_rope", "qk_norm", "chunk", "window")] + [
        (name, ctypes.c_float) for name in ("floor_scale", "attn_scale")
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", Pointer), ("ffn_norm", Pointer),
        *((name, Weight) for name in MATRICES),
        ("biases", Pointer * len(MATRICES)), ("attending", Attending), ("experts", Pointer),
    ]  # fmt: skip


class Experts(ctypes.Structure):
    _fields_ = [("n", Int), ("top_k", Int), ("router", Pointer), ("matrices", Pointer)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("rows", Int),
        ("few", Int),
        ("tokens", Int),
        ("begins", Pointer),
        ("owners", Pointer),
        ("positions", Pointer),
        ("freqs_cis", Pointer),
        ("k", Pointer),
        ("v", Pointer),
        ("k_scale", Pointer),
        ("v_scale", Pointer),
        ("per_layer", ctypes.c_int64),
        ("per_block", ctypes.c_int64),
        ("per_head", ctypes.c_int64),
        ("blocks", Pointer),
        ("width", Int),
    ]


class Inputs(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("floats", "halves", "fixed")] + [
        (name, Int) for name in ("cols", "height")
    ]


class All(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("q", "k", "v", "times", "out")] + [
        (name, Int) for name in ("queries", "keys", "heads", "head_dim")
    ]


class Scratch(ctypes.Structure):
    _fields_ = [
        (name, Pointer) for name in ("q", "k", "v", "gate", "up", "sum", "partial", "rotated")
    ] + [(name, Inputs) for name in ("x", "heads", "y")] + [
        (name, Pointer)
        for name in ("normalized", "expert", "scores", "begins", "tokens", "weights", "chosen")
    ]  # fmt: skip


class LowRank(ctypes.Structure):
    _fields_ = [
        ("A", Pointer), ("B", Pointer), ("is_bf16", Int), ("rank", Int), ("scale", ctypes.c_float)
    ]  # fmt: skip


class Adapters(ctypes.Structure):
    _fields_ = [
        ("all", Pointer), ("runs", Pointer), ("n_runs", Int), ("n_layers", Int), ("most", Int),
        ("partial", Pointer),
    ]  # fmt: skip


ATTENTION, FEED_FORWARD, ADD = 1, 2, 4  # parts of a step


def _compiler() -> List[str]:
    """The command of the compiler: CXX's, which may have arguments, or the first that there is."""
    own = os.environ.get("CXX", "")
    if words := shlex.split(own):
        if not shutil.which(words[0]):
            raise ValueError(
                f"CXX={own!r}: there is no {words[0]}: name a C++ compiler that is installed"
            )
        return words
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise ValueError(
        "the CPU kernels need a C++ compiler, and there is none: install GCC 12 or newer, or clang "
        "with OpenMP (on macOS, Homebrew's llvm and libomp), or name one in the environment "
        "variable CXX"
    )


X86 = platform.machine() in ("x86_64", "AMD64")
# Instruction sets other than this processor's own, by the names that LLAMA_NATIVE takes.
INSTRUCTIONS = (
    {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3", "plain": "-march=x86-64"}
    if X86
    else {"dotprod": "-march=armv8.2-a+dotprod", "plain": "-march=armv8-a"}
)


def _instructions() -> str:
    """The compiler's flag for an instruction set.

    Raises:
        ValueError: an unknown name in LLAMA_NATIVE.
    """
    name = os.environ.get("LLAMA_NATIVE", "")
    if name and name not in INSTRUCTIONS:
        raise ValueError(
            f"LLAMA_NATIVE={name!r}: choose one of {', '.join(INSTRUCTIONS)}, or leave it out for "
            "this processor's own instructions"
        )
    return INSTRUCTIONS.get(name) or ("-march=native" if X86 else "-mcpu=native")


def _processor() -> str:
    """The properties of this processor that compiled code depends on: its name and features."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else platform.processor()
    known = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # x86's, then ARM's
    lines = [line for line in text.splitlines() if line.startswith(known)]
    return platform.machine() + "".join(sorted(set(lines)))


@lru_cache
def _command() -> List[str]:
    """The compiler and its options; CXXFLAGS' last, but for other processors than LLAMA_NATIVE's.

    Conda's -march=nocona, for example, is for programs that are to run anywhere.
    """
    flags = ["-std=c++17", "-O3", _instructions(), "-fopenmp", "-shared", "-fPIC"]
    own = shlex.split(os.environ.get("CXXFLAGS", ""))
    processors = ("-march=", "-mcpu=", "-mtune=")
    return [*_compiler(), *flags, *(word for word in own if not word.startswith(processors))]


@lru_cache
def _key() -> str:
    """What compiled code depends on."""
    command = _command()
    version = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True).stdout
    text = "".join(file.read_text() for file in (SOURCE, PRODUCTS, *HEADERS))
    key = "\n".join([text, version, *command, _processor()])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _library(kind: str) -> Path:
    """The file of a block type's products; of all else, if kind is empty."""
    return cache_dir() / f"kernels-{_key()}{kind and '-' + kind}.so"


@lru_cache
def library() -> ctypes.CDLL:
    """The kernels, without block types (`add_types`). Compiled on first use, once per machine.

    Raises:
        ValueError: no compiler, or one that can't compile them; a cache that can't be written to.
    """
    if not os.path.exists(_library("")):  # False where one may not look
        _compile([""])
    found = _loaded("")
    ptr, f32 = Pointer, ctypes.c_float
    for name, types in {
        "step": [Int, ptr, ptr, Int, Int, ptr, ptr, ptr, ptr, Int, Int],
        "linear": [Int, ptr, ptr, Int, ptr, ptr, Int],
        "norm": [Int, ptr, ptr, ptr, Int, Int, f32, Int],
        "rows": [Int, ptr, ptr, Int, ptr, Int],
        "pack_rows": [Int, ptr, Int, Int, ptr, Int],
        "add_type": [Int, ptr],
        "multiplies_bf16": [],
        "group_height": [Int],
        "look": [Int, ptr, ptr, ptr, ptr, ptr, Int],
        "attends_to_all": [],
        "attend_to_all": [ptr, Int],
    }.items():
        function = getattr(found, name)
        returns = name in ("multiplies_bf16", "group_height", "attends_to_all")
        function.restype, function.argtypes = (Int if returns else None), types
    return found


def add_types(kinds: Iterable[str] = KINDS) -> None:
    """Load the products of these block types. Compiled on first use, side by side.

    Raises:
        ValueError: as `library` does.
    """
    wanted = sorted(set(kinds))
    library()
    missing = [kind for kind in wanted if not os.path.exists(_library(kind))]
    if missing:
        _compile(missing)
    for kind in wanted:
        _add_type(kind)


@lru_cache
def _add_type(kind: str) -> None:
    products = _loaded(kind)
    products.functions.restype = Pointer
    library().add_type(KINDS.index(kind), products.functions())


def _loaded(kind: str, again: bool = True) -> ctypes.CDLL:
    """A compiled library. One that is broken or only another user's is compiled again."""
    try:  # by the whole path: a name without a slash would be searched for elsewhere
        return ctypes.CDLL(str(_library(kind).absolute()))
    except OSError as error:
        # "failed to map segment": nothing in this directory may be executed.
        if not again or "failed to map segment" in str(error):
            raise ValueError(
                f"compiled kernels can't be loaded ({error}): name another directory in the "
                "environment variable LLAMA_CACHE"
            ) from None
    _compile([kind])
    return _loaded(kind, again=False)


def _compile(kinds: Sequence[str]) -> None:
    """Compile libraries side by side.

    In a temporary directory, from which they are moved when they are whole: other processes may be
    compiling too. The compiler gives them the permissions of any new file.
    """
    place = cache_dir()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            what = f" for {', '.join(kinds)}" if any(kinds) else ""
            print(f"compiling the CPU kernels{what} (once)", file=sys.stderr, flush=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_compile_one, kinds, [Path(folder)] * len(kinds)))
    except OSError as error:
        raise ValueError(
            f"compiled kernels can't be kept in {place} ({error.strerror}): name another "
            "directory in the environment variable LLAMA_CACHE"
        ) from None


def _compile_one(kind: str, folder: Path) -> None:
    command = [*_command(), *([f"-DKIND={kind}", str(PRODUCTS)] if kind else [str(SOURCE)])]
    partial = folder / _library(kind).name
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    full = [line for line in done.stderr.splitlines() if "No space left on device" in line]
    if done.returncode and full:
        raise OSError(errno.ENOSPC, full[-1])
    if done.returncode or not partial.exists():
        raise ValueError(
            f"{shlex.join(_compiler())} can't compile {SOURCE}: name GCC 12 or newer, or clang "
            "with OpenMP (on macOS, Homebrew's llvm and libomp), in the environment variable CXX. "
            f"It says:\n{done.stderr[-2000:]}"
        )
    os.replace(partial, _library(kind))


def address(tensor: torch.Tensor) -> Pointer:
    return Pointer(tensor.data_ptr())
