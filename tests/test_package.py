"""The package as it is built and installed: what the archives hold, and that they run anywhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = (
    ".*", "__pycache__", "*.py[co]", "*.egg-info", "build", "checkpoints", "dist", "runs", "site",
)  # fmt: skip


def run(*command, cwd, **environment):
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository, so that nothing is built within it."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


@pytest.fixture(scope="module")
def sdist(source):
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    name = run(sys.executable, "-c", build, cwd=source).split()[-1]
    return source / "dist" / name


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source distribution, which must have all that it takes."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    run(*pip, "--no-build-isolation", "--no-cache-dir", "-w", str(out), str(sdist), cwd=out)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A directory with the installed package alone; for PYTHONPATH."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    run(*pip, "--quiet", "--target", str(target), str(wheel), cwd=target)
    return target


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_the_source_distribution_is_complete(source, sdist):
    with tarfile.open(sdist) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    there = {
        name for name in files(source) if not name.startswith(("dist/", "llama_reference.egg"))
    }
    assert there - held == set()
    generated = {name for name in held - there if ".egg-info/" not in name}
    assert generated == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_and_nothing_else(source, wheel):
    version = (source / "llama" / "_version.py").read_text().split('"')[1]
    assert wheel.name == f"llama_reference-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"llama_reference-{version}.dist-info/METADATA").decode()
        licence = archive.read(f"llama_reference-{version}.dist-info/licenses/LICENSE").decode()
    assert held == {f"llama/{name}" for name in files(source / "llama")}
    assert {"llama/py.typed", "llama/backends/cpu/kernels.cpp"} <= held
    assert "License-Expression: MIT\n" in metadata and licence.startswith("MIT License")
    assert f"Version: {version}\n" in metadata
    for extra in ("server", "ray", "train", "jax", "eval", "docs", "all"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_wheel_runs_outside_of_a_checkout(installed, tmp_path):
    """In an empty directory, with nothing of the repository on the path."""
    where = "import llama, pathlib; print(pathlib.Path(llama.__file__).resolve())"
    found = run(sys.executable, "-P", "-c", where, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(found.strip()).is_relative_to(installed.resolve())
    version = run(
        sys.executable, "-P", "-m", "llama", "--version", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert version.split()[-1] == run(
        sys.executable, "-P", "-c", "import llama; print(llama.__version__)",
        cwd=tmp_path, PYTHONPATH=str(installed),
    ).strip()  # fmt: skip


def test_the_installed_command_answers(installed, smollm2_path, tmp_path):
    """The kernels' sources are in the wheel too: --compile builds them."""
    said = run(
        sys.executable, "-P", "-m", "llama", "complete", str(smollm2_path.parent), "--compile",
        "--prompt", "The capital of France is", "--max-gen-len", "4",
        cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    assert "Paris" in said


@pytest.mark.slow
def test_its_types_are_seen_by_its_users(installed, tmp_path):
    """mypy reads the annotations of the installed package, as py.typed allows it to.

    pyright (from npm, which the tests don't need) was run over the same program by hand.
    """
    shutil.copy(ROOT / "tests" / "typed_user.py", tmp_path)
    (tmp_path / "wrong.py").write_text("from llama import Llama\n\nLlama.build(3)\n")
    # Third parties' types are no part of this, and would be read from 3,000 files.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nfollow_imports = skip\ncache_dir = /dev/null\n"
        "[mypy-llama.*]\nfollow_imports = silent\n"
        "[mypy-numpy.*,jaxlib.*,cryptography.*]\nfollow_imports_for_stubs = true\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "typed_user.py", "wrong.py"], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.stdout.startswith('wrong.py:3: error: Argument 1 to "build" of "Llama"'), done
    assert "Found 1 error in 1 file (checked 2 source files)" in done.stdout


def test_images_of_containers_hold_no_more_than_git_does():
    """podman and docker read .dockerignore: no environment, checkpoint or history is copied."""
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    left_out = {pattern.removeprefix("**/") for pattern in patterns if pattern[0] != "#"}
    assert left_out == {".git", *(pattern.rstrip("/") for pattern in ignored)}


def test_the_notebooks_extra_brings_what_they_import():
    texts = [path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb")]
    imported = {name for text in texts for name in re.findall(r'"(?:from|import) (\w+)', text)}
    brought = {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["notebook"]}
    names = {re.split("[^a-z_-]", requirement)[0] for requirement in brought}
    names |= {"PIL", "llama", "pydantic"}  # pillow, the repository, and with openai
    assert imported - sys.stdlib_module_names - names == set()
    assert "llama-reference[server]" in brought  # server.ipynb starts one


def test_each_extra_that_a_message_names_exists():
    """`pip install 'llama-reference[x]'` or '.[x]' in the code, the docs and the notebooks."""
    sources = [*(ROOT / "llama").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = {
        name
        for path in sources
        for names in re.findall(r"(?:llama-reference|\.)\[([a-z,]+)\]", path.read_text())
        for name in names.split(",")
    }
    assert named <= set(PROJECT["optional-dependencies"]), named
