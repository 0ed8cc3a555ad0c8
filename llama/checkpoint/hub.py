"""Checkpoints in repositories of the Hugging Face Hub, through the package huggingface_hub.

It finds the token (HF_TOKEN, or what `hf auth login` stored) and the server (HF_ENDPOINT) itself.
"""

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any, Callable, Collection, Iterator, List, NamedTuple, Optional, Tuple

from llama.checkpoint.listing import checkpoint_files
from llama.checkpoint.transfer import Unreachable, check_space, digest, say

PART = r"[A-Za-z0-9][\w.-]*"
NAME = re.compile(rf"({PART}/{PART})(?:@(refs/(?:pr|convert)/{PART}|[^/@]+))?(?:/([^/].*))?", re.A)
TERMS = re.compile(r"(LICENSE|USE_POLICY)[\w.]*")  # go with the weights


class Name(NamedTuple):
    """OWNER/NAME, @REVISION and /PATH: of a file in the repository, or of a directory."""

    repo: str
    revision: Optional[str]
    path: str


def parse(name: str) -> Name:
    """Split OWNER/NAME[@REVISION][/PATH].

    Raises:
        ValueError: it isn't of this form.
    """
    match = NAME.fullmatch(name)
    if not match or match[0].endswith("/"):
        raise ValueError(
            f"'{name}' is not OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME/FILE, as in "
            "meta-llama/Llama-3.2-1B-Instruct"
        )
    return Name(match[1], match[2], match[3] or "")


def cached(text: str) -> Path:
    """What OWNER/NAME[@REVISION][/PATH] is in huggingface_hub's cache, once it is up to date.

    Offline, that's what an earlier call has put there.

    Raises:
        FileNotFoundError: no such repository, revision or file.
        ValueError: no access, no network and no earlier copy, several checkpoints.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = parse(text)
    try:
        with _explained(name):
            commit, names = _listing(name, HfApi().model_info(name.repo, revision=name.revision))
            read = lambda file: Path(  # noqa: E731
                hf_hub_download(name.repo, file, revision=commit)
            ).read_bytes()
            place, files = _choose(name, names, read)
            folder = snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=[_literally(file) for file in files],
                tqdm_class=_bars(),
            )
            return Path(folder, place)
    except Unreachable as problem:
        try:
            folder = snapshot_download(name.repo, revision=name.revision, local_files_only=True)
        except LocalEntryNotFoundError as error:
            # A repository's other files were never wanted; that they're missing is no error.
            folder = getattr(error, "snapshot_path", "")
            if not folder:
                raise Unreachable(f"{problem}, and there is no copy of it in the cache") from None
        copy = Path(folder)
        names = [file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()]
        place, _ = _choose(name, names, lambda file: (copy / file).read_bytes())
        say(f"{problem}; using the copy in {copy}")
        return copy / place


def download(name: Name, folder: Path) -> Tuple[Path, bool]:
    """Fetch a checkpoint into a folder; returns its path there and whether there was work to do.

    Raises: as `cached`, but for a copy offline; ValueError too if checksums are wrong.
    """
    import huggingface_hub as library

    with _explained(name):
        info = library.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        commit, names = _listing(name, info)
        # Contents may be refused where the list of files is public; and with files at hand,
        # huggingface_hub carries on without the server and calls that success.
        first = next((file for file in names if file.endswith("config.json")), names[0])
        library.get_hf_file_metadata(library.hf_hub_url(name.repo, first, revision=commit))
        read = lambda file: Path(  # noqa: E731
            library.hf_hub_download(name.repo, file, revision=commit, local_dir=folder)
        ).read_bytes()
        place, files = _choose(name, names, read)
        wanted = [(folder / f.rfilename, f) for f in info.siblings or () if f.rfilename in files]
        if missing := [
            (path, file, ok) for path, file in wanted if not (ok := _is_right(path, file))
        ]:
            needed = sum(file.size or 0 for _, file, _ in missing)
            folder.mkdir(parents=True, exist_ok=True)
            check_space(folder, needed, name.repo, "choose a folder on")
            for path, _, ok in missing:
                if ok is False:  # huggingface_hub would go by its own records
                    path.unlink(missing_ok=True)
            say(f"fetching {name.repo} ({needed / 1e6:,.1f} MB)")
            library.snapshot_download(
                name.repo,
                revision=commit,
                local_dir=folder,
                allow_patterns=[_literally(file) for file in files],
                tqdm_class=_bars(),
            )
        for path, file, _ in missing:
            if _is_right(path, file) is False:
                raise ValueError(f"{path} isn't what {name.repo} has: run this again")
    return folder / place, bool(missing)


def _is_right(path: Path, file: Any) -> Optional[bool]:
    """Whether a file here is the repository's; None if the server tells no checksum."""
    if not path.is_file() or file.size not in (None, path.stat().st_size):
        return False
    if file.lfs:
        return digest(path, "sha256") == file.lfs.sha256
    content = path.read_bytes() if file.blob_id else b""  # small: of large ones lfs tells
    as_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return as_git == file.blob_id if file.blob_id else None


def _listing(name: Name, info: Any) -> Tuple[str, List[str]]:
    """The commit that a revision is, and the files in it."""
    names = [file.rfilename for file in info.siblings or []]
    if not info.sha or not names:
        raise FileNotFoundError(f"{name.repo} is an empty repository")
    return info.sha, names


def _choose(
    name: Name, names: Collection[str], read: Callable[[str], bytes]
) -> Tuple[str, List[str]]:
    """The path of a checkpoint within its repository, and the files that it needs.

    Meta's repositories have the weights twice: for Hugging Face's libraries, and in original/.
    """
    if name.path in names:
        return name.path, [name.path]
    for place in [name.path] if name.path else ["", "original"]:
        below = f"{place}/" if place else ""
        inside = {file.removeprefix(below): file for file in names if file.startswith(below)}
        where = "/".join(filter(None, (name.repo, place)))
        files = checkpoint_files(where, inside.__contains__, _renamed(read, inside), inside)
        if files:
            files += sorted(file for file in inside if TERMS.fullmatch(file))
            return place, [inside[file] for file in files]
    if name.path:
        raise FileNotFoundError(
            f"{name.repo} has no file {name.path}, nor a checkpoint of this name"
        )
    raise FileNotFoundError(
        f"{name.repo} holds no checkpoint: neither config.json with model.safetensors, nor "
        "params.json with consolidated.00.pth, nor a .gguf file. For one file of it: "
        f"{name.repo}/FILE"
    )


def _renamed(read: Callable[[str], bytes], names: dict[str, str]) -> Callable[[str], bytes]:
    return lambda file: read(names[file])


def _bars() -> Any:
    """Progress bars on a terminal, nothing elsewhere."""
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": None})

    return Bars


def _literally(file: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", file)


@contextlib.contextmanager
def _explained(name: Name) -> Iterator[None]:
    """Turns what huggingface_hub raises into FileNotFoundError and ValueError."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.repo}"
    login = "log in with `hf auth login`, or put a token that may read it in HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(
            f"{name.repo} is gated: accept its licence at {page} (approval may take a while), and "
            f"{login}. Then run this again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no model {page}, or it is private: check the name, or {login}"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{page} has no revision {name.revision}") from None
    except Exception as problem:
        if isinstance(problem, errors.LocalEntryNotFoundError):  # it was looked for there as well
            problem = problem.__cause__ if isinstance(problem.__cause__, Exception) else problem
        response = getattr(problem, "response", None)
        status = response.status_code if response is not None else None
        if isinstance(problem, errors.OfflineModeIsEnabled):
            raise Unreachable(f"HF_HUB_OFFLINE is set, so {name.repo} isn't fetched") from None
        if status in (401, 403):
            raise ValueError(
                f"{page}: the server refuses access (HTTP {status}). If it is gated, accept its "
                f"licence there, and {login}"
            ) from None
        if isinstance(problem, errors.HfHubHTTPError) and status and status != 429 and status < 500:
            raise ValueError(f"cannot read {page}: HTTP {status}") from None
        known = isinstance(problem, (errors.HfHubHTTPError, errors.LocalEntryNotFoundError))
        if known or type(problem).__module__.startswith("httpx"):
            what = f"HTTP {status}" if status else problem
            raise Unreachable(f"cannot reach {page}: {what}") from None
        raise
