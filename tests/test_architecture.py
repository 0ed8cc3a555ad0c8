"""The layers of the package: imports point down, in no circle, and none is hidden in a function."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "llama").rglob("*.py"))

LAYERS = [  # each may import what stands below it, and nothing beside or above it
    {"__init__", "__main__"},
    {"apps"},
    {"ray"},
    {"server"},
    {"generation", "training"},
    {"engine", "backends"},
    {"checkpoint"},
    {"families"},
    {"model", "tokenizer"},
    {"text", "vision", "layers", "_version"},
]
HEIGHT = {name: -i for i, names in enumerate(LAYERS) for name in names}


def layer(parts) -> str:
    """Where a module stands, given as parts of its dotted name without `llama`."""
    return parts[0]


def imported(path: Path):
    """What a file imports of this package, as parts of the dotted name, wherever it says so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llama":
            parts = node.module.split(".")[1:]
            yield from [parts] if parts else [[name.name] for name in node.names]
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1:] for n in node.names if n.name.startswith("llama."))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = layer(path.relative_to(ROOT / "llama").with_suffix("").parts)
    for module in map(layer, imported(path)):
        assert module == here or HEIGHT[module] < HEIGHT[here], (path, module)


def test_no_process_wide_state_is_set():
    banned = re.compile(
        r"set_default_(tensor_type|dtype|device)|sys\.stdout\s*=|\.cuda\(\)|manual_seed\((?!seed)"
        r"|os\.environ\[[^]]+\]\s*="
    )
    for path in [*SOURCES, *ROOT.glob("*.py")]:
        assert not banned.search(path.read_text()), path


def test_importing_has_no_effects():
    """No process group, no output, no changed defaults, no seeds drawn, no test packages."""
    code = (
        "import torch; s = torch.get_rng_state(); d = torch.get_default_dtype()\n"
        "import llama, sys, torch.distributed as dist\n"
        "assert not dist.is_initialized() and torch.equal(s, torch.get_rng_state())\n"
        "assert d == torch.get_default_dtype()\n"
        "assert not {'transformers', 'pytest', 'matplotlib', 'ray'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_stay_readable():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 470, path


def test_model_has_no_branch_for_device_quantization_or_compilation():
    text = (ROOT / "llama" / "model.py").read_text()
    assert not re.search(r"is_cuda|device\.type|quantiz|compile", text)
