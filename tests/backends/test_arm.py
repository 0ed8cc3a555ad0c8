"""The CPU kernels' products on ARM, computed by qemu on another processor.

Debian's packages `g++-aarch64-linux-gnu` and `qemu-user` are needed: CONTRIBUTING.md.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_native import stored_as

from llama.backends.cpu import kernels
from llama.backends.cpu.workspace import FLOATS
from llama.backends.quantized import Blocks

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason="needs Debian's packages g++-aarch64-linux-gnu and qemu-user",
    ),
]


@pytest.fixture(scope="module", params=["armv8.2-a+dotprod", "armv8-a"])
def program(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("arm") / request.param
    source = Path(__file__).with_name("other_processor.cpp")
    flags = ["-std=c++17", "-O1", f"-march={request.param}", "-fopenmp", "-static"]
    subprocess.run([COMPILER, *flags, source, "-o", path], check=True, timeout=300)
    return path


def test_a_product_is_the_exact_one(program):
    """Of every block type, with rows that aren't whole groups of 16, and 1 to 9 tokens."""
    torch.manual_seed(0)
    rows, cols = 37, 512
    for kind in kernels.KINDS:
        stored, dense = stored_as(torch.randn(rows, cols), kind)
        raw = stored.data if isinstance(stored, Blocks) else stored.contiguous().view(torch.uint8)
        for tokens in (1, 9):
            x = torch.randn(tokens, cols)
            given = [kernels.KINDS.index(kind), rows, cols, tokens, raw.numel()]
            done = subprocess.run(
                [EMULATOR, program, *map(str, given)],
                input=raw.numpy().tobytes() + x.numpy().tobytes(), capture_output=True, timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr.decode()
            out = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(tokens, rows)
            exact = F.linear(x.double(), dense)
            if kind in FLOATS:
                size = F.linear(x.double().abs(), dense.abs())
                assert ((out - exact).abs() <= 1e-6 * size).all(), (kind, tokens)
            else:
                size = F.linear(x.double().square(), dense.square())
                error = ((out - exact).square().mean() / size.mean()).sqrt()
                assert error < 6e-5, (kind, tokens, error)  # as in test_native, of few outputs
