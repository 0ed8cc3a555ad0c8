"""Every command in the README and the docs is run, and their Python too; the site builds.

What takes long, converting the demo model and compiling it with XLA, gets two of its layers, or all
in `make soak`.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, forked_python, llama_command, torchrun, write_checkpoint
from served import serve
from vision import TINY_VISION

import llama
from llama.apps.cli import COMMANDS as COMMANDS_OF_LLAMA

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
BIN = Path(sys.executable).parent
OPTION = re.compile(r"(?<= --)[a-z_-]+")


def code(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], flags=re.DOTALL)


def spelled(command: str) -> str:
    """With - in options' names, so that what two pages show is run once."""
    return OPTION.sub(lambda option: option[0].replace("_", "-"), command)


COMMANDS: dict[str, str] = {}  # as they are shown, by one spelling
FIRST: dict[str, str] = {}  # the pages that show them first
for _page in TEXTS:
    for _block in code(_page, "bash"):
        for _line in _block.splitlines():
            if _line.split("#")[0].strip():
                _command = _line.split("  #")[0].strip()
                COMMANDS[spelled(_command)] = _command
                FIRST.setdefault(spelled(_command), _page)

SHELL = "writes into the user's shell configuration: test_cli.py"
LICENCE = "takes Meta's licence and its link: tests/apps/test_download.py, on a local server"
NETWORK = "takes the network: tests/apps/test_download.py, on a local server"
EXAMPLES = "test_examples.py, with shorter answers"
SERVER = "waits for requests: tests/server/test_server.py"
MEASURES = "times the machine it runs on: tests/apps/test_plan.py, on a tiny model"
MAKE = "test_make_does_what_the_commands_beneath_it_do"
ELSEWHERE = {
    "make demo": MAKE,
    "make test": "this test run",
    "make bench": "test_benchmarks.py, in part",
    "make check": "what developers run, of these tests",
    "make docs": "test_the_site_builds_without_a_warning",
    "python3 -m venv .venv": MAKE,
    ".venv/bin/pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu "
    "torch": MAKE,
    ".venv/bin/pip install -c constraints.txt -e '.[server]'": MAKE,
    ".venv/bin/pip install -c constraints.txt -e '.[test]'": MAKE,
    ".venv/bin/pip wheel --no-deps -w dist .": "test_package.py",
    ".venv/bin/pip install dist/llama_reference-*.whl": "test_package.py",
    ".venv/bin/python -m pytest": MAKE,
    ".venv/bin/llama download smollm2": MAKE,
    ".venv/bin/llama download smollm2 tokenizer": MAKE,
    ".venv/bin/llama download --meta": LICENCE,
    "./download.sh": LICENCE,
    ".venv/bin/llama download meta-llama/Llama-3.2-1B-Instruct": NETWORK,
    ".venv/bin/llama download meta-llama/Llama-3.2-11B-Vision-Instruct": NETWORK,
    ".venv/bin/llama chat hf://HuggingFaceTB/SmolLM2-135M-Instruct": NETWORK,
    ".venv/bin/torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir "
    "checkpoints/Meta-Llama-3-8B-Instruct --max_seq_len 512": "the same on the demo model",
    ".venv/bin/torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir "
    "checkpoints/Llama-3.2-1B-Instruct --max_seq_len 512": "the same on the demo model",
    ".venv/bin/llama eval checkpoints/SmolLM2-135M-Instruct --tasks arc_easy,hellaswag --limit 100 "
    "--json": "the harness downloads these tasks' data; evaluation.md's own task is run",
    ".venv/bin/llama chat checkpoints/SmolLM2-135M-Instruct": "the same with a message in a pipe",
    ".venv/bin/llama plan checkpoints/SmolLM2-135M-Instruct --measure here.json": MEASURES,
    ".venv/bin/llama plan checkpoints/SmolLM2-135M-Instruct --machine here.json --rate 2 "
    "--prompt 200 --answer 40 --max-seq-len 2048": MEASURES,
    ".venv/bin/llama plan 8b --machine h100 --tensor 1 --replicas 1000 --per-day 10000000": (
        "tests/apps/test_plan.py, with fewer requests"
    ),
    ".venv/bin/llama --install-completion": SHELL,
    ".venv/bin/llama serve checkpoints/SmolLM2-135M-Instruct": SERVER,
    ".venv/bin/llama serve checkpoints/SmolLM2-135M-Instruct --ray local --replicas 2": (
        "waits for requests: tests/server/test_replicas.py"
    ),
    ".venv/bin/torchrun --nproc_per_node 3 -m llama serve checkpoints/SmolLM2-135M-Instruct": (
        SERVER
    ),
    ".venv/bin/torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir "
    "checkpoints/SmolLM2-135M-Instruct": EXAMPLES,
    ".venv/bin/torchrun --nproc_per_node 1 example_chat_completion.py --temperature 0.6 "
    "--max_seq_len 512": EXAMPLES,
    ".venv/bin/torchrun --nproc_per_node 3 example_text_completion.py": EXAMPLES,
    ".venv/bin/python example_text_completion.py --temperature 0 --max_gen_len 16": EXAMPLES,
}
DEMO = "checkpoints/SmolLM2-135M-Instruct"
VISION = "checkpoints/Llama-3.2-11B-Vision-Instruct"
SEEN = [command for command in COMMANDS.values() if VISION in command]
ELSEWHERE |= dict.fromkeys(SEEN, "test_vision, on a tiny model")
TUNED = [command for command in COMMANDS.values() if "runs/lighthouse" in command]
ELSEWHERE |= dict.fromkeys(TUNED, "test_finetuning, for a step")
ELSEWHERE = {spelled(command): how for command, how in ELSEWHERE.items()}
QUIET = (" > checkpoints/", " --output ", " plot ")  # what these print goes into a file


ADDRESS = "http://127.0.0.1:8000"  # where the pages say that a server listens


@pytest.fixture(scope="module")
def address(smollm2_path):
    with serve("checkpoints/SmolLM2-135M-Instruct") as server:
        yield server.url


def run(command: str) -> subprocess.CompletedProcess:
    """A command, whose programs needn't import torch first."""
    at_once = {"llama": llama_command(), "torchrun": torchrun()}
    command = re.sub(
        r"\.venv/bin/(\w+)",
        lambda name: shlex.join(at_once.get(name[1], [str(BIN / name[1])])),
        command,
    )
    return subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def commands_of(page: str) -> list[str]:
    """A page's commands that are run here, in order; what several pages show, with the first."""
    return [
        command for key, command in COMMANDS.items() if key not in ELSEWHERE and FIRST[key] == page
    ]


@pytest.mark.parametrize("page", [page for page in TEXTS if commands_of(page)])
def test_commands(smollm2_path, shallow, tmp_path, page, request):
    """In order, since some use what those before have written."""
    for command in commands_of(page):
        if " convert " in command:
            command = command.replace(DEMO, str(shallow))
            command = command.replace("checkpoints/smollm2", f"{tmp_path}/smollm2")
        if ADDRESS in command:
            command = command.replace(ADDRESS, request.getfixturevalue("address"))
        done = run(command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        assert done.stdout or any(part in command for part in QUIET), command


def test_nothing_is_left_out_that_is_not_shown():
    assert set(ELSEWHERE) - set(COMMANDS) == set()


def test_finetuning(smollm2_path, tmp_path):
    """The commands shown, on some of the dialogs."""
    learn, *then = TUNED
    data = "datasets/lighthouse.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / data).read_text().splitlines(keepends=True)[:5]))
    learn = learn.replace("runs/lighthouse", str(tmp_path)).replace(data, str(few))
    done = run(learn + " --held_out 1 --epochs 1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 examples to learn from, 1 held out, 1 steps" in done.stderr
    assert then
    for command in then:
        done = run(command.replace("runs/lighthouse", str(tmp_path)))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout or any(part in command for part in QUIET)


@pytest.fixture(scope="module")
def tiny_vision(tmp_path_factory) -> str:
    """A checkpoint for what the pages do with Llama 3.2 Vision."""
    return str(write_checkpoint(tmp_path_factory.mktemp("docs") / "vision", TINY_VISION))


def test_vision(tiny_vision):
    for command in SEEN:
        command = command.replace(VISION, tiny_vision)
        if " serve " in command:
            with serve(tiny_vision) as server:
                assert server.client.get("/health").status_code == 200
            continue
        done = run(f"{command} --max_gen_len 8 --max_seq_len 512")
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        assert done.stdout, command


def test_make_does_what_the_commands_beneath_it_do():
    made = "".join(
        subprocess.run(
            ["make", "--always-make", "--dry-run", target, f"TORCH={torch}"],
            cwd=ROOT, capture_output=True, text=True,
        ).stdout
        for target in ("demo", "test")
        for torch in ("", "cpu")
    )  # fmt: skip
    for command in [c for c, how in ELSEWHERE.items() if how == MAKE and not c.startswith("make")]:
        shown = command.removeprefix(".venv/bin/").replace("pip install", "python -m pip install")
        assert shown in re.sub(r"\.venv[a-z-]*/bin/", "", made), command


def test_python(smollm2_path, tmp_path, address, tiny_vision, shallow):
    """Each page is a program, of which one block goes on where the last one ended."""
    pages = {page: "\n".join(code(page, "python")) for page in TEXTS}
    pages = {page: text.replace('"runs/', f'"{tmp_path}/') for page, text in pages.items() if text}
    for shown, there in ((ADDRESS, address), (VISION, tiny_vision)):
        pages = {page: text.replace(shown, there) for page, text in pages.items()}
    pages["docs/jax.md"] = pages["docs/jax.md"].replace(DEMO, str(shallow))
    programs = tmp_path / "programs.py"
    programs.write_text(
        f"for page, text in {pages!r}.items():\n"
        "    print('#', page, flush=True)\n"
        "    exec(compile(text, page, 'exec'), {'__name__': page})\n"
    )
    done = subprocess.run(
        [*forked_python(), str(programs)], cwd=ROOT, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    printed = dict(
        zip(pages, re.split(r"^# .*\n", done.stdout, flags=re.MULTILINE)[1:], strict=True)
    )
    for page, expected in (
        ("README.md", "The capital of France is Paris. stop"),
        ("docs/python.md", "Paris"),
        ("docs/server.md", "The capital of France is Paris."),
        ("docs/chat.md", "'city': 'Paris'"),
        ("docs/structured-outputs.md", '{"name": "Anna", "age": 30}'),
        ("docs/faster-inference.md", "'accepted': 10"),
        ("docs/fine-tuning.md", "'calm'"),
        ("docs/recipes.md", "The sun rises in the east."),
    ):
        assert expected in printed[page], (page, printed[page])
    losses = re.findall(r"^\d+ (\d\.\d+)$", printed["docs/fine-tuning.md"], flags=re.MULTILINE)
    assert float(losses[-1]) < float(losses[0]) / 2  # the classifier learns


def test_files_that_they_name_exist():
    for page, text in TEXTS.items():
        for name in re.findall(r"\]\(([^)h#][^)#]*)(?:#[^)]*)?\)", text):
            assert ((ROOT / page).parent / name).exists(), (page, name)


def test_the_index_leads_to_every_page():
    pages = {path.removeprefix("docs/") for path in TEXTS if path.startswith("docs/")}
    linked = set(re.findall(r"\]\(([^)]+)\)", TEXTS["docs/index.md"]))
    assert pages - linked == {"index.md"}


def test_the_layout_lists_every_file():
    """README.md names each package, CONTRIBUTING.md each file."""
    readme = TEXTS["README.md"]
    layout = readme[readme.index("## Repository layout") :]
    for path in (ROOT / "llama").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"\n  {path.name}/ " in layout, path
    text = TEXTS["CONTRIBUTING.md"]
    layout = text[text.index("## Repository layout") :]
    layout = layout[: layout.index("\n## ", 3)]
    listed = set(re.findall(r"^ +([\w/]+\.(?:py|cpp|h|html|css|js))\b", layout, flags=re.MULTILINE))
    files = {
        path.relative_to(ROOT / "llama").as_posix()
        for kind in ("*.py", "*.cpp", "*.h", "*.html", "*.css", "*.js")
        for path in (ROOT / "llama").rglob(kind)
    }
    assert listed - files == set()
    assert {
        name for name in files - listed if not name.endswith(("__init__.py", "_version.py"))
    } == set()


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """As `make docs` does; the API reference is from docstrings, the commands' from their help."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    site = tmp_path / "site"
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()
    api = (site / "reference" / "api.html").read_text()
    for name in {*llama.__all__} - {"__version__"}:
        assert f'id="llama.{name}"' in api, name
    commands = (site / "reference" / "cli.html").read_text()
    for name in COMMANDS_OF_LLAMA:
        assert f"Usage: llama {name} " in commands, name
