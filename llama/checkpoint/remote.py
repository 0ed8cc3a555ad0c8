"""Checkpoints and tokenizers that lie elsewhere: gs://, az://, https:// and http:// are fetched.

Cloud storage is read with blobfile. Of https:// it knows Azure's blobs only, so everything else on
the web is read with urllib; there's no listing there, so a checkpoint's files are tried by name.
"""

import contextlib
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
from typing import Any, Callable, Dict, Iterator, Optional, Union
from urllib.parse import quote, unquote, urlsplit, urlunsplit

BLOCK = 1 << 23
ATTEMPTS = 3  # at a transfer that breaks off
TIMEOUT = 30  # seconds without an answer
RECORD = ".remote.json"  # in a folder of the cache: what a complete fetch put there

FILE_SUFFIXES = {".model", ".gguf", ".json", ".jinja", ".pth", ".safetensors", ".bin"}
BESIDE_HF_WEIGHTS = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip

Sizes = Dict[str, Optional[int]]  # by file name, in bytes; None where a server doesn't tell


class _Refused(ValueError):
    """Access denied; some servers say so of a file that isn't there, too."""


class _Unreachable(ValueError):
    """No answer, or none for the moment."""


def local_path(path: str | Path) -> Path:
    """The path itself if it is local, or that of a local copy of what lies at a URL.

    A URL names a file, or a directory with a checkpoint. Copies are kept in the folder `remote` of
    ${LLAMA_CACHE:-${XDG_CACHE_HOME:-~/.cache}/llama-inference} and fetched anew only when sizes
    have changed. Of several processes one fetches, the others wait for it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no access, no network, a kind of URL that isn't supported, no checkpoint.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)", str(path))  # Path drops one of the //
    if not match:
        return Path(path)
    parts = urlsplit(f"{match[1].lower()}://{match[2]}")
    url = urlunsplit(parts._replace(path=parts.path.rstrip("/"), fragment=""))
    source = _source(url)
    folder = _cache_folder(url)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as waited:
        record = folder / RECORD
        cached = json.loads(record.read_text()) if record.exists() else None
        if cached is None or not waited:  # else the process that was waited for has just looked
            try:
                cached = _update(source, url, folder)
            except _Unreachable as problem:
                if cached is None:
                    raise
                _say(f"{problem}; using the copy in {folder}")
    return folder / cached["file"] if cached["file"] else folder


def _source(url: str) -> "Source":
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError(f"{_shown(url)}: a name and password in a URL aren't supported")
    azure = parts.netloc.endswith(".blob.core.windows.net") and not parts.query
    if parts.scheme in ("gs", "az") or (parts.scheme == "https" and azure):
        return _Blobs()
    if parts.scheme in ("http", "https"):
        return _Web()
    raise ValueError(
        f"{_shown(url)}: {parts.scheme}:// isn't supported, only gs://, az://, https://, http:// "
        "and local paths. Models on Hugging Face: ./download.sh --source hf OWNER/NAME"
    )


def _cache_folder(url: str) -> Path:
    cache = os.environ.get("LLAMA_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llama-inference"
    )
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", _shown(url).split("://")[1])[-80:].strip("-.")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Path(cache).expanduser() / "remote" / f"{readable}-{digest}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keeps other processes of this machine out; True if one of them had to be waited for."""
    import fcntl

    with open(f"{folder}.lock", "w") as lock:
        waited = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield waited


def _update(source: "Source", url: str, folder: Path) -> Dict[str, Any]:
    """Fetch what is missing; returns the record of what is there now."""
    file, sizes = _look(source, url, folder)
    missing = {name: size for name, size in sizes.items() if not _has(folder, name, size)}
    record = folder / RECORD
    if missing:
        record.unlink(missing_ok=True)
        parts = sum(path.stat().st_size for path in folder.glob("*.part"))
        needed = sum(size or 0 for size in missing.values()) - parts
        if (free := shutil.disk_usage(folder).free) < needed:
            raise ValueError(
                f"{_shown(url)} needs another {needed / 1e6:,.0f} MB in {folder}, where "
                f"{free / 1e6:,.0f} are free: free some, or set LLAMA_CACHE to another disk"
            )
    for name, size in missing.items():
        _fetch(source, url if file else _join(url, name), size, folder / name)
    for stale in set(folder.iterdir()) - {folder / name for name in sizes}:
        if stale.suffix in {*FILE_SUFFIXES, ".part"} and stale != record:
            stale.unlink()  # one shard too many would be taken for a part of the model
    found = {"url": _shown(url), "file": file, "sizes": sizes}
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(found, indent=1))
    os.replace(part, record)
    return found


def _has(folder: Path, name: str, size: Optional[int]) -> bool:
    path = folder / name
    return path.exists() and size in (None, path.stat().st_size)


def _look(source: "Source", url: str, folder: Path) -> tuple[Optional[str], Sizes]:
    """What lies at a URL: a file's name, or None for a directory, and the sizes."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    is_file = PurePosixPath(name).suffix.lower() in FILE_SUFFIXES  # to try first, at least
    refused = None
    for as_file in (is_file, not is_file):
        try:
            if not as_file and (sizes := _checkpoint_files(source, url, folder)):
                return None, sizes
            if as_file and name:
                return name, {name: source.size(url)}
        except FileNotFoundError:
            if not as_file:  # begins like a checkpoint, but isn't complete
                raise
        except _Refused as problem:
            refused = problem
    if refused:
        raise refused
    raise FileNotFoundError(
        f"{_shown(url)}: there's no such file, nor a directory with a checkpoint (params.json and "
        "consolidated.00.pth, or config.json and model.safetensors); check the address"
    )


def _checkpoint_files(source: "Source", url: str, folder: Path) -> Sizes:
    """The files of the checkpoint in a directory; none if there is no directory, or no checkpoint.

    Raises:
        FileNotFoundError: a checkpoint that lacks files.
    """
    listing = source.listing(url)
    sizes: Sizes = {}

    def has(name: str) -> bool:
        with contextlib.suppress(FileNotFoundError, _Refused, KeyError):
            sizes[name] = source.size(_join(url, name)) if listing is None else listing[name]
        return name in sizes

    if has("params.json"):
        shards = 0
        while has(f"consolidated.{shards:02d}.pth"):
            shards += 1
        if not shards:
            raise FileNotFoundError(f"{_shown(url)} has params.json, but no consolidated.00.pth")
        has("tokenizer.model")
    elif has("config.json"):
        for weights in ("model.safetensors", "pytorch_model.bin"):
            if has(index := f"{weights}.index.json"):
                if not _has(folder, index, sizes[index]):
                    _fetch(source, _join(url, index), sizes[index], folder / index)
                for name in _indexed(folder / index, url):
                    if not has(name):
                        raise FileNotFoundError(f"{_shown(url)} has {index}, but not its {name}")
                break
            if has(weights):
                break
        else:
            raise FileNotFoundError(f"{_shown(url)} has config.json, but no model.safetensors")
        for name in BESIDE_HF_WEIGHTS:
            has(name)
    elif ggufs := [name for name in listing or {} if name.endswith(".gguf")]:
        if len(ggufs) > 1:
            raise ValueError(f"{_shown(url)} holds several models, name one: {', '.join(ggufs)}")
        has(ggufs[0])
    return sizes


def _indexed(index: Path, url: str) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        index.unlink()
        raise ValueError(f"{_shown(url)}: {index.name} is no index of weights: {problem}") from None
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", str(name)):  # it becomes the name of a file here
            raise ValueError(f"{_shown(url)}: {index.name} names {name!r}, which is no file name")
    return names


def _fetch(source: "Source", url: str, size: Optional[int], target: Path) -> None:
    part = target.with_name(target.name + ".part")
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if size is not None and part.exists() else 0
        have = have if size is None or have <= size else 0
        problem = ""
        with open(part, "ab") as out, _progress(url, size, have, again=attempt > 0) as advance:
            out.truncate(have)
            try:
                for block in source.blocks(url, have) if have != size else ():
                    out.write(block)
                    advance(len(block))
            except _Unreachable as broken:
                problem = f" ({broken})"
        have = part.stat().st_size
        if have == size or (size is None and not problem):
            os.replace(part, target)
            return
    raise ValueError(
        f"the transfer of {_shown(url)} keeps breaking off, lastly after {have} of "
        f"{'an unknown number of' if size is None else size} bytes{problem}. Run this again to "
        f"continue; if that doesn't help, delete {part}"
    )


@contextlib.contextmanager
def _progress(
    url: str, size: Optional[int], have: int, again: bool
) -> Iterator[Callable[[int], Any]]:
    """A progress bar on a terminal, one line per file elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        name = PurePosixPath(urlsplit(url).path).name
        with tqdm(total=size, initial=have, desc=name, unit="B", unit_scale=True) as bar:
            yield bar.update
    else:
        if not again:
            told = "" if size is None else f" ({size / 1e6:,.1f} MB)"
            _say(f"fetching {_shown(url)}{told}{', resuming' if have else ''}")
        yield lambda _: None


class _Web:
    """Any web server. What isn't there is FileNotFoundError, every other failure ValueError."""

    def listing(self, url: str) -> Optional[Sizes]:
        """The files in a directory; None as that can't be asked."""
        return None

    def size(self, url: str) -> Optional[int]:
        """A file's size; None if the server has the file, but doesn't tell."""
        try:
            answer = self._open(url, "HEAD")
        except _Refused:  # signed links tend to be for GET alone
            answer = self._open(url, "GET")
        with answer:
            length = answer.headers["Content-Length"]
            return int(length) if length else None

    def blocks(self, url: str, start: int) -> Iterator[bytes]:
        """A file's contents from a byte on."""
        with self._open(url, "GET", start) as answer, _explained(url):
            skip = start if answer.status != 206 else 0  # the server can't resume
            while block := answer.read(min(skip, BLOCK) or BLOCK):
                if skip:
                    skip -= len(block)
                else:
                    yield block

    def _open(self, url: str, method: str, start: int = 0) -> http.client.HTTPResponse:
        safe = quote(url, safe=":/?#[]@!$&'()*+,;=%~")
        request = urllib.request.Request(safe, method=method, headers={"User-Agent": "llama"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        with _explained(url):
            answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        if answer.headers.get_content_type() == "text/html":
            answer.close()  # of a server that has a page for everything, say
            raise FileNotFoundError(f"{_shown(url)} is a web page, and no file of a model")
        return answer


class _Blobs:
    """The same of Google's and Azure's storage, with the credentials that blobfile finds."""

    def __init__(self) -> None:
        import blobfile

        self.context = blobfile.create_context(
            log_callback=_say, retry_limit=5, save_access_token_to_disk=False
        )

    def listing(self, url: str) -> Optional[Sizes]:
        with _explained(url):
            try:
                entries = list(self.context.scandir(url))
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {entry.name: entry.stat.size for entry in entries if entry.stat}

    def size(self, url: str) -> Optional[int]:
        with _explained(url):
            return self.context.stat(url).size

    def blocks(self, url: str, start: int) -> Iterator[bytes]:
        with _explained(url), self.context.BlobFile(url, "rb") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block


Source = Union[_Web, _Blobs]


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns what urllib and blobfile raise into FileNotFoundError and ValueError."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{_shown(url)}: no such file") from None
    except urllib.error.HTTPError as problem:
        problem.close()
        raise _failure(url, problem.code, f"HTTP {problem.code} {problem.reason}") from None
    except (OSError, http.client.HTTPException) as problem:
        reason = getattr(problem, "reason", None) or str(problem) or type(problem).__name__
        raise _failure(url, 0, str(reason)) from None
    except Exception as problem:
        if not type(problem).__module__.startswith(("blobfile", "urllib3")):
            raise
        status = getattr(problem, "response_status", None)
        message = str(getattr(problem, "message", problem)).strip()
        raise _failure(url, status, message) from None


def _failure(url: str, status: Optional[int], reason: str) -> Exception:
    """The exception for an HTTP status; 0 is for no answer at all, None for other reasons."""
    if status in (401, 403, 405, 501):
        return _Refused(f"{_shown(url)}: the server refuses access ({reason})")
    if status in (404, 410, 600):  # 600: blobfile's for an Azure account that doesn't exist
        return FileNotFoundError(f"{_shown(url)}: no such file ({reason})")
    if status == 0 or status in (408, 425, 429) or (status or 0) >= 500:
        return _Unreachable(f"cannot reach {_shown(url)}: {reason}")
    return ValueError(f"cannot read {_shown(url)}: {reason}")


def _join(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _shown(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
