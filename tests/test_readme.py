"""Every command in the README is run, and its Python too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [
    line.split("#")[0].strip()
    for block in code("bash")
    for line in block.splitlines()
    if line.split("#")[0].strip()
]

# Run by what is named here: they install, need a licence, or are what runs the tests.
ELSEWHERE = {
    "make demo": "test_make_does_what_the_commands_beneath_it_do",
    "make test": "this test run",
    "python3 -m venv .venv": "make",
    ".venv/bin/pip install -c constraints.txt -e .": "make",
    ".venv/bin/pip install -c constraints.txt -e '.[test]'": "make",
    ".venv/bin/pip install -c constraints.txt -e '.[structured]'": "the tests' extras have it",
    "./download.sh smollm2": "make",
    "./download.sh smollm2 tokenizer": "make",
    ".venv/bin/python -m pytest": "make",
    "./download.sh": "test_download.py, against a local server",
    ".venv/bin/torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir "
    "checkpoints/Meta-Llama-3-8B-Instruct --max_seq_len 512": "the same on the demo model",
    "make bench": "test_benchmarks.py, in part",
}
TUNED = [command for command in COMMANDS if "runs/lighthouse" in command]
ELSEWHERE |= dict.fromkeys(TUNED, "test_finetuning, for two steps")


def run(command: str) -> subprocess.CompletedProcess:
    command = command.replace(".venv/bin/", f"{BIN}/")
    return subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE])
def test_command(smollm2_path, command):
    done = run(command)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout


def test_finetuning(smollm2_path, tmp_path):
    """The commands shown, on some of the dialogs."""
    learn, *ask = TUNED
    data = "datasets/lighthouse.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / data).read_text().splitlines(keepends=True)[:10]))
    learn = learn.replace("runs/lighthouse", str(tmp_path)).replace(data, str(few))
    done = run(learn + " --held_out 2 --epochs 1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 examples to learn from, 2 held out, 2 steps" in done.stderr
    for command in ask:
        done = run(command.replace("runs/lighthouse", str(tmp_path)))
        assert done.returncode == 0 and done.stdout, done.stderr[-3000:]


def test_make_does_what_the_commands_beneath_it_do():
    made = "".join(
        subprocess.run(
            ["make", "--always-make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        ).stdout
        for target in ("demo", "test")
    )
    for command in [c for c, how in ELSEWHERE.items() if how == "make"]:
        shown = command.removeprefix(".venv/bin/").replace("pip install", "python -m pip install")
        assert shown in made.replace(".venv/bin/", ""), command


def test_python(smollm2_path):
    program = "\n".join(code("python"))  # one goes on where the last one ended
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_files_that_it_names_exist():
    for name in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / name).exists(), name
    layout = README[README.index("How the house is laid out") :]
    for name in re.findall(r"^  (\w+\.py) ", layout, flags=re.MULTILINE):
        assert (ROOT / "llama" / name).exists(), name
    for package, files in re.findall(r"^  (\w+)/ .*\n((?:    .*\n)+)", layout, flags=re.MULTILINE):
        for name in re.findall(r"^    (\w+\.py) ", files, flags=re.MULTILINE):
            assert (ROOT / "llama" / package / name).exists(), name
    listed = set(re.findall(r"(\w+\.py)", layout))
    for path in (ROOT / "llama").rglob("*.py"):
        assert path.name in listed, path
