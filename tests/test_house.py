"""The house rules that a reader relies on: imports point one way, no side effects, no CUDA."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "llama").rglob("*.py"))

# Each may import those named for it and whatever they may import.
LAYERS = {
    "gguf_header": set(),
    "cache": set(),
    "sampling": set(),
    "stopping": set(),
    "context": {"chat", "tools"},
    "beam": {"model", "prefill"},
    "prefill": {"cache", "model"},
    "embeddings": {"model", "prefill", "tokenizer"},
    "trace": {"cache", "model", "parallel"},
    "classification": {"checkpoint", "json_files", "model", "parallel", "prefill", "prepare"}
    | {"remote", "tokenizer"},
    "flax_model": {"checkpoint", "model", "parallel"},
    "flax_generation": {"flax_model", "model"},
    "lora": {"checkpoint", "model", "parallel"},
    "training": {"chat", "checkpoint", "json_files", "lora", "model", "parallel", "prefill"}
    | {"tokenizer"},
    "prefixes": {"cache", "checkpoint", "model", "parallel", "prefill"},
    "structured": {"tokenizer", "tools"},
    "rows": {"model", "predictions", "sampling", "stopping", "structured", "tokenizer"},
    "speculative": {"model", "parallel", "prefill", "rows", "sampling"},
    "loop": {
        "model",
        "parallel",
        "predictions",
        "prefill",
        "prefixes",
        "rows",
        "sampling",
        "speculative",
        "structured",
    }
    | {"tokenizer"},
    "parallel": set(),
    "vocabulary": {"gguf_header", "json_files"},
    "tools": set(),
    "chat": {"tools"},
    "templates": {"chat", "tools"},
    "predictions": {"chat"},
    "tokenizer": {"chat", "vocabulary"},
    "model": {"cache", "parallel"},
    "checkpoint": {"gguf_header", "json_files", "model", "parallel", "tokenizer", "vocabulary"},
    "memory": {"checkpoint", "model", "parallel", "prefill", "quantize"},
    "offload": {"cache", "checkpoint", "memory", "model", "parallel"},
    "quantize": {"checkpoint", "model", "parallel"},
    "native": {"cache", "model", "parallel", "quantize"},
    "compiled": {"cache", "model", "parallel", "quantize"},
    "prepare": {"cache", "checkpoint", "compiled", "memory", "model", "native", "offload"}
    | {"parallel", "prefixes", "quantize", "remote", "tokenizer"},
    "generation": {
        "prepare",
        "beam",
        "chat",
        "context",
        "embeddings",
        "loop",
        "model",
        "parallel",
        "prefixes",
        "rows",
        "speculative",
        "structured",
    }
    | {"predictions", "sampling", "scoring", "templates", "tokenizer", "tools"},
    "terminal": set(),
    "repl": {"chat", "generation", "parallel", "predictions", "sampling", "terminal"},
    "json_files": set(),
    "few_shot": {"json_files"},
    "complete": {"few_shot", "generation", "json_files", "parallel", "remote"} | {"sampling"},
    "scoring": {"model", "tokenizer"},
    "measure": {"evaluation", "generation", "parallel", "scoring"},
    "evaluation": {"generation", "scoring"},
    "cli": {"checkpoint", "memory", "parallel", "prepare", "remote"},
    "remote": set(),
    "__init__": {"cache", "generation", "model", "sampling", "tokenizer", "tools"},
}


def own_imports(path: Path):
    tree = ast.parse(path.read_text())
    for block in [node for node in tree.body if isinstance(node, ast.If)]:
        if ast.unparse(block.test) == "TYPE_CHECKING":  # never run: names for annotations
            tree.body.remove(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "llama":
                yield from [parts[1]] if len(parts) > 1 else [name.name for name in node.names]
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("llama."):
                    yield name.name.split(".")[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT / "llama").with_suffix("").parts
    assert set(own_imports(path)) - {parts[0]} <= LAYERS[parts[0]]


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
        "assert not {'transformers', 'pytest', 'matplotlib'} & set(sys.modules)\n"
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
