"""Files on web servers and in cloud storage: their sizes, their contents, resumable transfers.

Cloud storage is read with blobfile. Of https:// it knows Azure's blobs only, so everything else on
the web is read with urllib.
"""

import contextlib
import hashlib
import http.client
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable, Dict, Iterator, Optional, Tuple, Union
from urllib.parse import quote, urlsplit, urlunsplit

from filelock import FileLock, Timeout

from llama.text.cache_dir import cache_dir

BLOCK = 1 << 23
PIECE = 25 * 10**9  # bytes per request: CloudFront, Meta's server, refuses more than 50 GiB
ATTEMPTS = 3  # at a transfer that breaks off
TIMEOUT = 30  # seconds without an answer

# By the name of a file here: its URL, and its size in bytes, None where a server doesn't tell.
Files = Dict[str, Tuple[str, Optional[int]]]


class Refused(ValueError):
    """Access denied; some servers say so of a file that isn't there, too."""


class Unreachable(ValueError):
    """No answer, or none for the moment."""


class Changed(Unreachable):
    """Other contents than before."""


def fetch(source: "Source", files: Files, folder: Path, what: str) -> None:
    """Fetch files into a folder; `what` they are is for errors.

    Until a file is complete it is called NAME.part, from where a later run resumes, unless the file
    has changed: what it was is in NAME.part.version.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no access, too little space, or a transfer that keeps breaking off.
    """
    parts = sum(path.stat().st_size for path in folder.glob("*.part"))
    check_space(folder, sum(size or 0 for _, size in files.values()) - parts, what)
    for name, (url, size) in files.items():
        _fetch_file(source, url, size, folder / name)


def _fetch_file(source: "Source", url: str, size: Optional[int], target: Path) -> None:
    from tqdm import tqdm

    part = target.with_name(target.name + ".part")
    version = target.with_name(part.name + ".version")
    target.parent.mkdir(parents=True, exist_ok=True)  # of a name with a folder

    def check(found: str) -> None:
        if version.exists() and version.read_text("utf-8") != found:
            raise Changed(f"{shown(url)} has changed")
        version.write_text(found, "utf-8")

    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if size is not None and part.exists() else 0
        complete = have == size and not version.exists()  # but not renamed yet
        have = have if complete or have < (size or 0) else 0
        if not attempt and not sys.stderr.isatty():
            told = "" if size is None else f" ({size / 1e6:,.1f} MB)"
            say(f"fetching {shown(url)}{told}{', resuming' if have else ''}")
        bar = tqdm(
            total=size, initial=have, desc=target.name, unit="B", unit_scale=True, disable=None
        )
        problem = ""
        with open(part, "ab") as out, bar:
            out.truncate(have)
            if not have:
                version.unlink(missing_ok=True)
            try:
                for block in source.blocks(url, have, size, check) if have != size else ():
                    bar.update(out.write(block))
            except Unreachable as broken:
                problem = f" ({broken})"
                if isinstance(broken, Changed):
                    out.truncate(0)
        have = part.stat().st_size
        if have == size or (size is None and not problem):
            version.unlink(missing_ok=True)
            part.replace(target)
            return
    raise ValueError(
        f"the transfer of {shown(url)} keeps breaking off, lastly after {have} of "
        f"{'an unknown number of' if size is None else size} bytes{problem}. Run this again to "
        f"continue; if that doesn't help, delete {part}"
    )


def check_space(folder: Path, needed: float, what: str) -> None:
    """Raises ValueError if a disk has less than this number of bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{what} needs another {needed / 1e6:,.0f} MB in {folder}, where {free / 1e6:,.0f} are "
            "free: free some, or choose a folder on another disk (for the cache, set LLAMA_CACHE)"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keeps other processes out of a folder; True if one of them had to be waited for."""
    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{hashlib.sha256(bytes(folder.resolve())).hexdigest()[:12]}.lock")
    try:
        held, waited = lock.acquire(timeout=0), False
    except Timeout:
        held, waited = lock.acquire(), True
    with held:
        yield waited


class Web:
    """Any web server. What isn't there is FileNotFoundError, every other failure ValueError."""

    def listing(self, url: str) -> Optional[Dict[str, int]]:
        """The sizes of the files in a directory; None as that can't be asked."""
        return None

    def size(self, url: str) -> Optional[int]:
        """A file's size; None if the server has the file, but doesn't tell."""
        try:
            answer = self._open(url, "HEAD")
        except Unreachable:
            raise
        except ValueError:  # signed links tend to be for GET alone
            answer = self._open(url, "GET", "0-0")
        with answer:
            total = _total(answer)
            return int(total) if total.isdecimal() else None

    def blocks(
        self, url: str, start: int, size: Optional[int], check: Callable[[str], None]
    ) -> Iterator[bytes]:
        """A file's contents from a byte on; `check` is told which contents, to raise Changed."""
        while True:
            stop = start + PIECE if size is not None and size - start > PIECE else None
            some = f"{start}-{stop - 1 if stop else ''}" if start or stop else None
            with self._open(url, "GET", some) as answer:
                headers = answer.headers
                check(headers["ETag"] or headers["Last-Modified"] or _total(answer))
                skip = start if answer.status != 206 else 0  # the server can't resume
                with _explained(url):
                    while block := answer.read(min(skip, BLOCK) or BLOCK):
                        if skip:
                            skip -= len(block)
                        else:
                            start += len(block)
                            yield block
            if start != stop:  # all of it, or broken off
                return

    def _open(self, url: str, method: str, some: Optional[str] = None) -> http.client.HTTPResponse:
        safe = quote(url, safe=":/?#[]@!$&'()*+,;=%~")
        request = urllib.request.Request(safe, method=method, headers={"User-Agent": "llama"})
        if some:
            request.add_header("Range", f"bytes={some}")
        with _explained(url):
            answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        if answer.headers.get_content_type() == "text/html":
            answer.close()  # of a server that has a page for everything, say
            raise FileNotFoundError(f"{shown(url)} is a web page, and no file of a model")
        return answer


def _total(answer: http.client.HTTPResponse) -> str:
    """A file's size, as an answer with all or a part of it tells; may be "" or "*"."""
    length = answer.headers["Content-Range" if answer.status == 206 else "Content-Length"]
    return (length or "").rpartition("/")[2]


class Blobs:
    """The same of Google's and Azure's storage, with the credentials that blobfile finds."""

    def __init__(self) -> None:
        import blobfile

        self.context = blobfile.create_context(
            log_callback=say, retry_limit=5, save_access_token_to_disk=False
        )

    def listing(self, url: str) -> Optional[Dict[str, int]]:
        with _explained(url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return {file.name: file.stat.size for file in self.context.scandir(url) if file.stat}
        return {}

    def size(self, url: str) -> Optional[int]:
        with _explained(url):
            return self.context.stat(url).size

    def blocks(
        self, url: str, start: int, size: Optional[int], check: Callable[[str], None]
    ) -> Iterator[bytes]:
        with _explained(url):
            about = self.context.stat(url)
        check(about.version or str(about.size))
        with _explained(url), self.context.BlobFile(url, "rb") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block


Source = Union[Web, Blobs]


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns what urllib and blobfile raise into FileNotFoundError and ValueError."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(url)}: no such file") from None
    except urllib.error.HTTPError as problem:
        problem.close()
        raise failure(shown(url), problem.code, f"HTTP {problem.code} {problem.reason}") from None
    except (OSError, http.client.HTTPException) as problem:
        reason = getattr(problem, "reason", None) or str(problem) or type(problem).__name__
        raise failure(shown(url), 0, str(reason)) from None
    except Exception as problem:
        if not type(problem).__module__.startswith(("blobfile", "urllib3")):
            raise
        status = getattr(problem, "response_status", 400)  # no credentials, say
        reason = str(getattr(problem, "message", problem)).strip()
        raise failure(shown(url), status, reason) from None


def failure(where: str, status: int, reason: str) -> Exception:
    """The exception for an HTTP status; 0 is for no answer at all."""
    if status in (401, 403, 405, 501):
        return Refused(f"{where}: the server refuses access ({reason})")
    if status in (404, 410, 600):  # 600: blobfile's for an Azure account that doesn't exist
        return FileNotFoundError(f"{where}: no such file ({reason})")
    if status in (0, 408, 425, 429) or status >= 500:
        return Unreachable(f"cannot reach {where}: {reason}")
    return ValueError(f"cannot read {where}: {reason}")


def is_right(file: Path, checksum: str) -> bool:
    """Whether a file is there with this MD5, SHA-256 or, of 40 digits, git's SHA-1 of a blob."""
    if not file.is_file():
        return False
    git = lambda: hashlib.sha1(b"blob %d\0" % file.stat().st_size)  # noqa: E731
    kind = {40: git, 64: hashlib.sha256}.get(len(checksum), hashlib.md5)
    with open(file, "rb") as content:
        return hashlib.file_digest(content, kind).hexdigest() == checksum


def shown(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
