"""Checkpoints and tokenizers that lie elsewhere: gs://, az://, https:// and http:// are fetched.

Cloud storage is read with blobfile. Of https:// it knows Azure's blobs only, so whatever else is
on the web is read with urllib, where there's no listing: a checkpoint's files are found by name.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Iterable, Iterator, List, Optional, Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

BLOCK = 1 << 20
ATTEMPTS = 3  # at a transfer that breaks off
TIMEOUT = 30  # seconds without a byte
RECORD = ".remote.json"  # in a cached folder: what a complete fetch consists of

# What a directory with a checkpoint may hold that's of use here. The names are patterns.
WANTED = (
    "params.json", "consolidated.*.pth", "config.json", "generation_config.json", "*.safetensors",
    "*.index.json", "pytorch_model*.bin", "tokenizer*", "special_tokens_map.json",
    "chat_template.jinja", "*.gguf",
)  # fmt: skip
BESIDE_META = ("tokenizer.model",)
BESIDE_HF = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip

Sizes = Dict[str, Optional[int]]  # file name -> bytes, or None where the server doesn't say


class _Unreachable(ValueError):
    """The server didn't answer, or only that it can't at the moment."""


class _Source(Protocol):
    """A kind of storage. A missing file is FileNotFoundError, all else that fails ValueError."""

    def size(self, url: str) -> Optional[int]: ...

    def files(self, url: str) -> Sizes:
        """A checkpoint's files if the URL is a directory's; nothing if it isn't."""

    def read(self, url: str, start: int) -> contextlib.AbstractContextManager[Any]:
        """A file, open for reading from a byte on."""


def local_path(path: str | Path) -> Path:
    """A path on this machine with the contents of a local path or a remote URL.

    Local paths are returned as they are. A remote file or a directory with a checkpoint is fetched
    into ${LLAMA_CACHE:-~/.cache/llama-inference}/remote, and fetched anew when sizes have changed.
    Processes that want the same URL wait for the one that fetches it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: there's no getting at it, or it isn't a checkpoint; the message says why.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)", str(path))  # a Path has lost a slash
    if not match:
        return Path(path)
    url = f"{match[1].lower()}://{match[2]}"
    source = _source(url)
    folder = _cache() / _folder_name(url)
    with _locked(folder):
        return _fetch(source, url, folder)


def _fetch(source: _Source, url: str, folder: Path) -> Path:
    record = folder / RECORD
    cached = json.loads(record.read_text()) if record.exists() else None
    try:
        found = _look(source, url)
    except _Unreachable as problem:
        if cached is None:
            raise
        _say(f"{problem}; using the copy of {_shown(url)} in {folder}")
        return folder / cached["file"] if cached["file"] else folder
    file, sizes = found["file"], found["sizes"]
    missing = {name: size for name, size in sizes.items() if not _is_there(folder / name, size)}
    if missing:
        record.unlink(missing_ok=True)
        _require_space(folder, sum(size or 0 for size in missing.values()), url)
    for name, size in missing.items():
        _fetch_file(source, url if file else _join(url, name), size, folder / name)
    for stale in folder.iterdir():  # a shard too many would be taken for part of the model
        if stale.name not in sizes and stale.name != RECORD:
            stale.unlink()
    record.write_text(json.dumps(found))
    return folder / file if file else folder


def _look(source: _Source, url: str) -> Dict[str, Any]:
    """What lies at a URL: a file, by its name, or a directory, by None; and the sizes."""
    name = _name(url)
    looks_like_a_file = any(PurePosixPath(name).match(pattern) for pattern in WANTED)
    if not looks_like_a_file and (sizes := source.files(url)):
        return {"file": None, "sizes": sizes}
    if not urlsplit(url).path.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            return {"file": name, "sizes": {name: source.size(url)}}
    if looks_like_a_file and (sizes := source.files(url)):
        return {"file": None, "sizes": sizes}
    raise FileNotFoundError(
        f"{_shown(url)}: there's no such file, and no directory with a checkpoint (params.json and "
        "consolidated.00.pth, or config.json and model.safetensors). Check the address"
    )


def _fetch_file(source: _Source, url: str, size: Optional[int], target: Path) -> None:
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() and size is not None else 0
    if size is not None and have > size:
        have = 0
    what = f"{_shown(url)} ({'size unknown' if size is None else _readable(size)})"
    attempt, problem = 1, ""
    with _progress(what, size, have) as advance:
        while True:
            try:
                with open(part, "r+b" if have else "wb") as out:
                    out.truncate(have)
                    out.seek(have)
                    if have != size:
                        with source.read(url, have) as data:
                            while block := data.read(BLOCK):
                                out.write(block)
                                advance(len(block))
            except _Unreachable as broken:
                problem = f": {broken}"
            have, before = part.stat().st_size, have
            if have == size or (size is None and not problem):
                break
            attempt = 1 if have > before else attempt + 1
            if attempt > ATTEMPTS or size is None or have > size:
                raise ValueError(
                    f"the transfer of {what} ended after {have} bytes{problem}. Run this again to "
                    f"continue, or delete {part} to start over"
                )
    os.replace(part, target)


class _Web:
    """Any web server."""

    def size(self, url: str) -> Optional[int]:
        for method in ("HEAD", "GET"):  # signed links are often for GET only
            try:
                with self._request(url, method) as answer:
                    length = answer.headers["Content-Length"]
                    return int(length) if length else None
            except ValueError:
                if method == "GET":
                    raise
        raise AssertionError

    def files(self, url: str) -> Sizes:
        sizes: Sizes = {}

        def add(name: str) -> bool:
            with contextlib.suppress(FileNotFoundError):
                sizes[name] = self.size(_join(url, name))
            return name in sizes

        ...

    @contextlib.contextmanager
    def read(self, url: str, start: int) -> Iterator[Any]: ...
