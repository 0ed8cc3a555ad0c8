"""Local copies of remote checkpoints and tokenizers: hf://, gs://, az://, https:// and http://.

Web servers don't list their directories, so a checkpoint's files are tried there by name.
"""

import contextlib
import errno
import hashlib
import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Optional, Tuple
from urllib.parse import unquote, urlsplit, urlunsplit

from llama.checkpoint import hub, transfer
from llama.checkpoint.listing import checkpoint_files
from llama.checkpoint.transfer import Files, Refused, Source, Unreachable, locked, say, shown
from llama.text.cache_dir import cache_dir
from llama.text.gguf_header import part_names

RECORD = ".complete"  # in a folder of the cache whose files are: the name of the file, if one
FILE_SUFFIXES = {".model", ".gguf", ".json", ".jinja", ".pth", ".pt", ".safetensors", ".bin"}


def local_path(path: str | Path) -> Path:
    """The path itself if it is local, or that of a local copy of what is at a URL.

    A URL names a file, or a directory with a checkpoint or an adapter. Of hf://OWNER/NAME, with
    @REVISION and /PATH after it if need be, the copy is in huggingface_hub's cache; of any other it
    is in the folder `remote` of `cache_dir()`, and fetched anew only when sizes have changed. Of
    several processes one fetches, the others wait for it. Offline, and where the cache
    can't be written, an earlier copy is used.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no access, no network, a kind of URL that isn't supported, no checkpoint.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)", str(path))  # Path drops one of the //
    if not match:
        return Path(path)
    if match[1].lower() == "hf":
        return hub.cached(match[2].rstrip("/"))
    parts = urlsplit(f"{match[1].lower()}://{match[2]}")
    url = urlunsplit(parts._replace(path=parts.path.rstrip("/"), fragment=""))
    source = _source(url)
    folder = _cache_folder(url)
    record = folder / RECORD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as waited:
            cached = record.read_text() if record.exists() else None
            if cached is None or not waited:  # else who was waited for has just looked
                try:
                    cached = _update(source, url, folder)
                except Unreachable as problem:
                    if cached is None:
                        raise
                    say(f"{problem}; using the copy in {folder}")
    except OSError as problem:
        if problem.errno not in (errno.EROFS, errno.EACCES) or not record.exists():
            raise
        say(f"{problem}; using the copy in {folder}")
        cached = record.read_text()
    return folder / cached


def _source(url: str) -> Source:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError(f"{shown(url)}: a name and password in a URL aren't supported")
    azure = parts.netloc.endswith(".blob.core.windows.net") and not parts.query
    if parts.scheme in ("gs", "az") or (parts.scheme == "https" and azure):
        return transfer.Blobs()
    if parts.scheme in ("http", "https"):
        return transfer.Web()
    raise ValueError(
        f"{shown(url)}: {parts.scheme}:// isn't supported, only gs://, az://, https://, http://, "
        "local paths, and hf://OWNER/NAME for the Hugging Face Hub"
    )


def _cache_folder(url: str) -> Path:
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", shown(url).split("://")[1])[-80:].strip("-.")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return cache_dir() / "remote" / f"{readable}-{digest}"


def _update(source: Source, url: str, folder: Path) -> str:
    """Fetch what is missing; returns the name of the file at the URL, "" for a directory."""
    file, files = _look(source, url, folder)
    missing = {name: found for name, found in files.items() if not _has(folder, name, found[1])}
    record = folder / RECORD
    if missing:
        record.unlink(missing_ok=True)
        transfer.fetch(source, missing, folder, shown(url))
    for stale in set(folder.iterdir()) - {folder / name for name in files}:
        if stale.suffix in {*FILE_SUFFIXES, ".part", ".version"}:
            stale.unlink()  # one shard too many would be taken for a part of the model
    if not record.exists() or record.read_text() != file:
        part = folder / f"{RECORD}.part"
        part.write_text(file)
        part.replace(record)
    return file


def _has(folder: Path, name: str, size: Optional[int]) -> bool:
    path = folder / name
    return path.exists() and size in (None, path.stat().st_size)


def _look(source: Source, url: str, folder: Path) -> Tuple[str, Files]:
    """What is at a URL: the name of a file, or "" for a directory, and what to fetch."""
    parts = urlsplit(url)
    name = PurePosixPath(unquote(parts.path)).name
    is_file = PurePosixPath(name).suffix.lower() in FILE_SUFFIXES  # to try first, at least
    failure: Exception = FileNotFoundError(
        f"{shown(url)}: there's no such file, nor a directory with a checkpoint (params.json and "
        "consolidated.00.pth, or config.json and model.safetensors); check the address"
    )
    for as_file in (is_file, not is_file):
        try:
            if as_file and name:
                above, _, last = parts.path.rpartition("/")  # a .gguf file may come in parts
                urls = [urlunsplit(parts._replace(path=f"{above}/{n}")) for n in part_names(last)]
                return name, {
                    part: (of, source.size(of))
                    for part, of in zip(part_names(name), urls, strict=True)
                }
            if not as_file and (files := _directory(source, url, folder)):
                return "", files
        except FileNotFoundError:
            if not as_file:  # begins like a checkpoint, but isn't complete
                raise
        except Refused as problem:
            failure = problem
    raise failure


def _directory(source: Source, url: str, folder: Path) -> Files:
    """The files of the checkpoint in a directory; none if there is none."""
    listing = source.listing(url)
    files: Files = {name: (_join(url, name), size) for name, size in (listing or {}).items()}

    @cache
    def has(name: str) -> bool:
        if listing is None:
            with contextlib.suppress(FileNotFoundError, Refused):
                files[name] = _join(url, name), source.size(_join(url, name))
        return name in files

    def read(name: str) -> bytes:
        if not _has(folder, name, files[name][1]):
            transfer.fetch(source, {name: files[name]}, folder, shown(url))
        return (folder / name).read_bytes()

    return {name: files[name] for name in checkpoint_files(shown(url), has, read, listing or ())}


def _join(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
