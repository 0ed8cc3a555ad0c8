"""Checkpoints in repositories of the Hugging Face Hub, through the package huggingface_hub.

It finds the token (HF_TOKEN, or what `hf auth login` stored) and the server (HF_ENDPOINT) itself.
"""

import contextlib
import glob
import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Collection, Dict, Iterator, List, NamedTuple, Optional, Tuple

from llama.checkpoint.listing import checkpoint_files
from llama.checkpoint.transfer import Unreachable, check_space, failure, is_right, say
from llama.text.gguf_header import part_names

PART = r"[A-Za-z0-9][\w.-]*"
NAME = re.compile(rf"({PART}/{PART})(?:@(refs/(?:pr|convert)/{PART}|[^/@]+))?(?:/([^/].*))?", re.A)
TERMS = re.compile(r"(LICENSE|USE_POLICY)[\w.]*")  # go with the weights


class Name(NamedTuple):
    """OWNER/NAME, @REVISION and /PATH: of a file in the repository, or of a directory."""

    repo: str
    revision: Optional[str]
    path: str


def _snapshot(repo: str, files: Collection[str], **options: Any) -> Path:
    """huggingface_hub's download of some files, with progress bars on a terminal only."""
    import huggingface_hub as library  # takes 0.3 s, which only those who use it should wait
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": None})

    patterns = [*map(glob.escape, files)]
    return Path(
        library.snapshot_download(repo, allow_patterns=patterns, tqdm_class=Bars, **options)
    )


def parse(name: str) -> Name:
    """Split OWNER/NAME[@REVISION][/PATH]. Raises ValueError if it isn't of this form."""
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
    import huggingface_hub as library
    from huggingface_hub import errors

    name = parse(text)
    try:
        with _explained(name):
            _, place, files, _ = _look(name)
            return _snapshot(name.repo, files, revision=name.revision) / place
    except Unreachable as problem:
        try:  # the other files of the repository may be missing: they were never wanted
            copy = Path(
                library.snapshot_download(
                    name.repo, revision=name.revision, local_files_only=True, ignore_patterns="*"
                )
            )
        except errors.LocalEntryNotFoundError:
            raise Unreachable(f"{problem}, and there is no copy of it in the cache") from None
        names = [path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()]
        place, _ = _choose(name, names, lambda *path: copy.joinpath(*path).read_bytes())
        say(f"{problem}; using the copy in {copy}")
        return copy / place


def download(name: Name, folder: Path) -> Tuple[Path, bool]:
    """Fetch a checkpoint into a folder; returns its path there and whether there was work to do.

    What an earlier download has put there and the repository no longer has is removed, as it could
    be taken for a part of the model; but for .gguf files, which stand alone.

    Raises: as `cached`, but for a copy offline; ValueError too if checksums are wrong, or if the
        folder holds a repository of another owner.
    """
    record = folder / ".cache/repository"  # beside huggingface_hub's own records
    there = record.read_text() if record.exists() else name.repo
    if there.lower() != name.repo.lower():
        raise ValueError(
            f"{folder} holds {there}: for {name.repo}, choose another place with --out"
        )
    with _explained(name):
        commit, place, files, about = _look(name, folder)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(name.repo)
        for file in (folder / place).glob("*"):
            path = file.relative_to(folder).as_posix()
            fetched = (record.parent / f"huggingface/download/{path}.metadata").exists()
            if fetched and path not in about and file.suffix != ".gguf":
                file.unlink()
        wrong = [path for path in files if not _is_right(folder / path, about[path])]
        if wrong:
            needed = sum(about[path].size or 0 for path in wrong)
            check_space(folder, needed, name.repo)
            for path in wrong:  # huggingface_hub would go by its own records
                (folder / path).unlink(missing_ok=True)
            say(f"fetching {name.repo} ({needed / 1e6:,.1f} MB)")
        _snapshot(name.repo, files, revision=commit, local_dir=folder)
        for path in wrong:
            if not _is_right(folder / path, about[path]):
                raise ValueError(f"{folder / path} isn't what {name.repo} has: run this again")
    return folder / place, bool(wrong)


def _look(name: Name, folder: Optional[Path] = None) -> Tuple[str, str, List[str], Dict[str, Any]]:
    """The commit, the checkpoint's path in the repository, its files, and what the server tells of
    all files of the repository.

    The folder is where files are to go, if not into huggingface_hub's cache.
    """
    import huggingface_hub as library

    info = library.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    about = {file.rfilename: file for file in info.siblings or ()}
    if not info.sha or not about:
        raise FileNotFoundError(f"{name.repo} is an empty repository")
    if folder:
        # Contents may be refused where the list of files is public; and with files at hand,
        # huggingface_hub carries on without the server and calls that success.
        first = next((file for file in about if file.endswith("config.json")), min(about))
        library.get_hf_file_metadata(library.hf_hub_url(name.repo, first, revision=info.sha))

    def read(place: str, file: str) -> bytes:
        file = f"{place}/{file}".lstrip("/")
        path = library.hf_hub_download(name.repo, file, revision=info.sha, local_dir=folder)
        return Path(path).read_bytes()

    place, files = _choose(name, about, read)
    return info.sha, place, files, about


def _is_right(path: Path, file: Any) -> bool:
    """Whether a file here is the repository's, as far as the server tells."""
    if not path.is_file() or file.size not in (None, path.stat().st_size):
        return False
    checksum = file.lfs.sha256 if file.lfs else file.blob_id
    return not checksum or is_right(path, checksum)


def _choose(
    name: Name, names: Collection[str], read: Callable[[str, str], bytes]
) -> Tuple[str, List[str]]:
    """The path of a checkpoint within its repository, and the files that it needs.

    Meta's repositories have the weights twice: for Hugging Face's libraries, and in original/.
    """
    if name.path in names:
        path = PurePosixPath(name.path)
        files = [str(path.with_name(part)) for part in part_names(path.name)]
        if missing := [file for file in files if file not in names]:
            raise FileNotFoundError(f"{name.repo} has {path}, but not its {missing[0]}")
        return name.path, files
    for place in [name.path] if name.path else ["", "original"]:
        below = f"{place}/" if place else ""
        inside = [file.removeprefix(below) for file in names if file.startswith(below)]
        where = f"{name.repo}/{place}".rstrip("/")
        files = checkpoint_files(where, inside.__contains__, partial(read, place), inside)
        if files:
            files += sorted(file for file in inside if TERMS.fullmatch(file))
            return place, [below + file for file in files]
    if name.path:
        raise FileNotFoundError(
            f"{name.repo} has no file {name.path}, nor a checkpoint of this name"
        )
    raise FileNotFoundError(
        f"{name.repo} holds no checkpoint: neither config.json with model.safetensors, nor "
        "params.json with consolidated.00.pth, nor a .gguf file. For one file of it: "
        f"{name.repo}/FILE"
    )


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
    except errors.OfflineModeIsEnabled:
        raise Unreachable(f"HF_HUB_OFFLINE is set, so {name.repo} isn't fetched") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as problem:
        cause = problem.__cause__ or problem  # huggingface_hub has looked in its cache as well
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            raise ValueError(
                f"{page}: the server refuses access (HTTP {status}). If it is gated, accept its "
                f"licence there, and {login}"
            ) from None
        raise failure(page, status or 0, f"HTTP {status}" if status else str(cause)) from None
