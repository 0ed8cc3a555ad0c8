"""The `llama` command as a user starts it: what it prints, and what it says of mistakes."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, TINY, random_weights, write_byte_tokenizer, write_checkpoint

from llama import checkpoint
from llama.apps import cli

DEMO = "checkpoints/SmolLM2-135M-Instruct"


def llama(*arguments):
    command = [sys.executable, "-m", "llama.apps.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def ok(*arguments) -> str:
    done = llama(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # it's no terminal: no progress bar
    return done.stdout


# --- help ----------------------------------------------------------------------------------------


def test_help_says_what_there_is():
    assert "convert" in (text := ok()) and "inspect" in text
    done = llama("convert", "--help")
    text = done.stdout + done.stderr
    assert done.returncode == 0 and "llama convert SRC DST TO <flags>" in text
    for option in ("--mp", "--dtype", "--quant", "--tokenizer_path", "--force", "--verify"):
        assert option in text
    assert "q8_0, q4_0 or q4_1, for gguf" in text and "meta, hf or gguf" in text


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "no source": ("convert nowhere OUT hf", "no checkpoint at nowhere"),
    "source a number": ("convert 2024 OUT hf", "no checkpoint at 2024"),
    "source like a float": ("convert 1e3 OUT hf", "no checkpoint at 1e3"),
    "source like a tuple": ("convert a,b OUT hf", "no checkpoint at a,b"),
    "source like a comment": ("inspect a#b", "no checkpoint at a#b"),
    "no checkpoint": ("convert tests OUT hf", "tests holds no checkpoint"),
    "destination exists": ("convert SRC README.md gguf", "README.md exists: choose another name"),
    "unknown format": ("convert SRC OUT --to onnx", "format 'onnx': choose one of meta, hf, gguf"),
    "shards of gguf": ("convert SRC OUT --to gguf --mp 3", "model_parallel_size=3 is for Meta's"),
    "too many shards": ("convert SRC OUT meta --mp 5", "model_parallel_size 5 doesn't divide"),
    "shards no number": ("convert SRC OUT meta --mp two", "--mp=two: it's a whole number"),
    "quant": ("convert SRC OUT gguf --quant q5_k", "'q5_k' can't be written; choose one of f32"),
    "quant for hf": ("convert SRC OUT hf --quant q8_0", "quant='q8_0' is for GGUF only"),
    "no quant": ("convert SRC OUT gguf --quant", "--quant needs a value"),
    "dtype": ("convert SRC OUT hf --dtype int8", "dtype 'int8': choose one of bf16"),
    "dtype a number": ("convert SRC OUT hf --dtype 16", "dtype '16': choose one of bf16"),
    "tokenizer": ("convert SRC OUT hf --tokenizer_path nowhere", "no tokenizer file at nowhere"),
    "unknown option": ("convert SRC OUT hf --verfy", "no such option: --verfy"),
    "a value for a switch": ("convert SRC OUT hf --force=no", "--force=no: it's a switch"),
    "nothing to inspect": ("inspect nowhere", "no checkpoint at nowhere"),
    "no checkpoint to inspect": ("inspect LICENSE", "LICENSE isn't a GGUF file"),
    "no tokens": ("inspect SRC --max_seq_len 0", "--max_seq_len=0: it's a number from 1 up"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tiny_dir, tmp_path, monkeypatch, capsys, mistake):
    """In this process, since starting one takes seconds; the next test starts some."""
    text, message = MISTAKES[mistake]
    replaced = {"SRC": str(tiny_dir), "OUT": str(tmp_path / "out")}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["llama", *(replaced.get(w, w) for w in text.split())])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert str(caught.value).startswith("error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_mistakes_end_with_1_and_no_traceback(tiny_dir, tmp_path):
    commands = [
        ("convert", "nowhere", tmp_path / "out", "--to", "hf"),
        ("convert", tiny_dir, ROOT / "README.md", "--to", "gguf"),
        ("convert", tiny_dir, tmp_path / "out", "--to", "gguf", "--quant", "q9"),
    ]
    with ThreadPoolExecutor(2) as threads:
        for done in threads.map(lambda command: llama(*command), commands):
            assert done.returncode == 1 and done.stdout == ""
            assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_a_line(tiny_dir, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.conversion, "convert", interrupted)
    monkeypatch.setattr(sys, "argv", ["llama", "convert", str(tiny_dir), str(tmp_path / "o"), "hf"])
    with pytest.raises(SystemExit, match="^interrupted: nothing was written under the final name$"):
        cli.main()


# --- what it does --------------------------------------------------------------------------------


def test_convert_there_and_back(tiny_dir, tmp_path):
    """From two shards to Hugging Face's format, to GGUF, and to four shards."""
    meta = write_checkpoint(tmp_path / "meta", TINY, mp=2)
    hf, quantized, back = (tmp_path / name for name in ("hf", "q.gguf", "back"))
    text = ok("convert", meta, hf, "--to", "hf", "--verify")
    assert re.fullmatch(r"\S+/hf: 0\.5\d MB, verified\n", text)
    names = {path.name for path in hf.iterdir()}
    assert names == {"config.json", "model.safetensors", "generation_config.json",
                     "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    text = ok("convert", hf, quantized, "--to=gguf", "--quant=q8_0", "--verify")
    assert re.fullmatch(r"\S+q\.gguf: 0\.1\d MB, verified\n", text)
    assert checkpoint.open(quantized).stored_as("output.weight") == "Q8_0"
    ok("convert", hf, back, "meta", "--mp", "4", "--dtype", "bf16")
    assert (back / "tokenizer.model").read_bytes() == (meta / "tokenizer.model").read_bytes()
    assert sorted(path.name for path in back.glob("*.pth"))[-1] == "consolidated.03.pth"
    name, weight = "norm.weight", random_weights(TINY)["norm.weight"]
    assert torch.equal(checkpoint.open(back).read(name, 0, 0, 64), weight.bfloat16())
    assert f"{back}" in ok("convert", hf, back, "--to", "meta", "--force")
    assert torch.equal(checkpoint.open(back).read(name, 0, 0, 64), weight)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_tokenizer_from_elsewhere(tmp_path):
    meta = write_checkpoint(tmp_path / "meta", TINY)
    (meta / "tokenizer.model").rename(tmp_path / "elsewhere")
    hf = tmp_path / "hf"
    ok("convert", meta, hf, "hf", "--tokenizer-path", tmp_path / "elsewhere")
    expected = write_byte_tokenizer(tmp_path / "expected").read_bytes()
    ok("convert", hf, tmp_path / "back", "meta")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == expected


def test_inspect_of_the_demo_model(smollm2_path):
    lines = ok("inspect", DEMO).splitlines()
    assert lines[:3] == [
        f"{DEMO}/{smollm2_path.name}: GGUF, 134,515,008 parameters",
        "stored as: Q8_0 30.08 MB, F32 0.14 MB, Q4_1 66.36 MB",
        f"tokenizer: {DEMO}/{smollm2_path.name}",
    ]
    for field in ("dim = 576", "n_heads = 9", "n_kv_heads = 3", "norm_eps = 1e-05",
                  "rope_theta = 100000.0", "tied_embeddings = True"):  # fmt: skip
        assert f"  {field}" in lines
    table = lines[lines.index("memory per rank with a cache of 8 rows of 2048 tokens:") + 1 :]
    assert [re.match(r" +(\d+) ranks? +(\w+): ", line).groups() for line in table] == [
        (ranks, dtype) for ranks in ("1", "3", "9") for dtype in ("bf16", "fp32")
    ]
    assert table[1] == "    1 rank  fp32: weights 0.54 GB + cache 0.75 GB"


def test_inspect_of_metas_directory(tmp_path):
    path = write_checkpoint(tmp_path / "meta", TINY, mp=4)
    lines = ok("inspect", path, "--max_batch_size", "2", "--max-seq-len=100").splitlines()
    count = sum(weight.numel() for weight in random_weights(TINY).values())
    assert lines[:3] == [
        f"{path}: Meta, {count:,} parameters",
        f"stored as: F32 {4 * count / 1e6:.2f} MB",
        f"tokenizer: {path / 'tokenizer.model'}",
    ]
    cache = 2 * TINY.n_layers * TINY.n_kv_heads * TINY.head_dim * 2 * 100 * 4
    assert "memory per rank with a cache of 2 rows of 100 tokens:" in lines
    assert f"weights {4 * count / 1e6:.2f} MB + cache {cache / 1e6:.2f} MB" in lines[-7]
    assert lines[-1].startswith("    8 ranks fp32: ")


def test_inspect_says_what_is_wrong(tmp_path):
    path = write_checkpoint(tmp_path / "meta", TINY)
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    done = llama("inspect", path)
    assert done.returncode == 1 and "lacks layers.2" in done.stderr
    assert "n_layers = 3" in done.stdout and "Traceback" not in done.stderr


def test_what_is_optional_is_missed_only_where_it_is_used(tiny_dir):
    """Without the extras [chat] and [eval], help and a chat in a pipe work; eval names the way."""
    code = (
        "import sys; sys.modules.update(lm_eval=None, prompt_toolkit=None, rich=None)\n"
        "from llama.apps.cli import main; main()"
    )

    def run(*arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )

    helped = run("--help")
    assert helped.returncode == 0 and "eval" in helped.stdout + helped.stderr
    assert run("chat", tiny_dir, "--device", "cpu").returncode == 0
    done = run("eval", tiny_dir, "--tasks", "x")
    assert done.returncode == 1 and done.stderr.startswith("error: llama eval needs lm_eval")
    assert "pip install -e '.[eval]'" in done.stderr and "Traceback" not in done.stderr
