"""Text, JSON and JSONL files, read strictly; files and directories replaced atomically."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterable, Iterator, List, Mapping, Sequence, Tuple


def unique_keys(complaint: str) -> Callable[[List[Tuple[str, Any]]], Dict[str, Any]]:
    """A json object_pairs_hook that raises ValueError for a key that comes twice.

    json itself would keep the last of them. `complaint` has a place {} for the key.
    """

    def check(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(complaint.format(max(names, key=names.count)))
        return found

    return check


def read_object(path: Path) -> Dict[str, Any]:
    """An object from a JSON file, in which no key may come twice.

    Raises:
        ValueError: not JSON, not an object, or a key that comes twice.
    """
    try:
        hook = unique_keys("the key {!r} comes twice")
        value = json.loads(path.read_bytes(), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} isn't usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} and not an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people to read, too."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def read_text(path: Path, *, exact: bool = False) -> str:
    """The text of a UTF-8 file; `exact` is as in `decode`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or a directory.
    """
    try:
        return decode(path.read_bytes(), str(path), exact=exact)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory: name a file") from None


def decode(raw: bytes, name: str, *, exact: bool = False) -> str:
    """UTF-8 as text, without a byte order mark and with \\n for \\r\\n, which editors put there.

    Args:
        name: of the file, for errors.
        exact: keep both. Perplexity is of each character of a file, compared with what other
            programs give for the same bytes; in a prompt or a training text they are accidents.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        return raw.decode("utf-8") if exact else raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} isn't UTF-8: byte {error.start} can't be read") from None


def objects(path: Path) -> Iterator[Tuple[int, Dict[str, Any]]]:
    """The objects of a JSONL file with their lines' numbers from 1, empty lines left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that isn't an object, by file and number.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            json_line(value)
        except UnicodeEncodeError:
            raise ValueError(f"{path}, line {number}: half of a surrogate pair") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: it isn't JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: it's no object {{...}} but {line[:40]!r}")
        yield number, value


def string(path: Path, number: int, value: Dict[str, Any], key: str) -> str:
    """The text of a line; ValueError if there is none."""
    if key not in value:
        has = ", ".join(map(repr, value)) or "nothing"
        raise ValueError(f"{path}, line {number}: no {key!r} in it; it has {has}")
    if not isinstance(value[key], str) or not value[key].strip():
        raise ValueError(f"{path}, line {number}: {key!r} is a text that isn't empty")
    return value[key]


def json_line(value: Dict[str, Any]) -> bytes:
    """A line of a JSONL file; UnicodeEncodeError for half of a surrogate pair."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


@contextmanager
def beside(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Write a file or directory atomically: yields a path beside it, renamed to `path` at the end.

    Whatever interrupts the writing, nothing incomplete ever has the final name, and with `force`
    the old file or directory stays until the new one is complete. Through a link, what it leads to
    is written.

    Raises:
        FileExistsError: `path` exists and not `force`; or it has directories in it, so that it's no
            checkpoint but perhaps the place of all of them.
        ValueError: somebody else is writing it.
    """
    path = _followed(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        recovered(path)
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists: choose another name, or overwrite it with force")
        check_plain(path)
        partial, old = _beside(path)
        remove(partial)
        try:
            yield partial
            if path.exists():
                remove(old)
                path.rename(old)
            partial.rename(path)
            remove(old)
        finally:
            remove(partial)
            if old.exists() and not path.exists():  # stopped between the two renames
                old.rename(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock beside a path; ValueError if somebody else does."""
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        try:
            hold(file)
            held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):  # or was held until after it was opened here
            held = False
        if not held:
            raise ValueError(f"{path} is being written by another process")
        try:
            yield
        finally:
            lock.unlink()


def hold(file: IO[Any]) -> None:
    """Lock an open file for this process.

    Where a file system has no locks, as Lustre's and NFS often don't, nobody is kept out.

    Raises:
        BlockingIOError: somebody else holds it.
    """
    import fcntl  # not on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def check_plain(path: Path) -> None:
    """Raises FileExistsError for a directory with directories in it."""
    if path.is_dir() and any(inner.is_dir() for inner in path.iterdir()):
        raise FileExistsError(f"{path} has directories in it: not overwritten, even with force")


def recovered(path: str | Path) -> Path:
    """The path; what it held is back there if a process was killed as it was being replaced."""
    path = Path(path)
    place = _followed(path)
    old = _beside(place)[1]
    if old.exists() and not place.exists():
        old.rename(place)
    return path


def _followed(path: Path) -> Path:
    """Where a link leads to; any other path is left as it is written."""
    return path.resolve() if path.is_symlink() else path


def _beside(path: Path) -> Tuple[Path, Path]:
    """Where the new is written, and where the old is put."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_apart(source: Path, *outputs: Path) -> None:
    """Raises ValueError: what shall be written is what was read."""
    for path in outputs:
        if source.exists() and path.exists() and path.samefile(source):
            raise ValueError(f"{path} is the input: choose another name for the output")


class Results:
    """What is finished of a job, kept in `.NAME.partial` beside its output until all of it is.

    The first line has the job's fingerprint, each other one the number of an input line and its
    result. What was added is on the disk before anything else is begun, so that whatever interrupts
    the job leaves at most the last lines incomplete; those are cut off.

    Args:
        output: the file to write, in the end.
        job: fingerprint of all that the results depend on.
        count: number of lines that there will be.
        force: replace an output, and a partial file of another job.

    Attributes:
        found: where the result of each finished line lies in the partial file, by its number.

    Raises:
        FileExistsError: the output exists.
        ValueError: the partial file is another job's, or is being written by another process.
    """

    def __init__(self, output: Path, job: str, count: int, force: bool = False):
        if output.is_dir():
            raise FileExistsError(f"{output} is a directory: name a file")
        if output.exists() and not output.is_file():  # /dev/stdout, /dev/null
            raise FileExistsError(f"{output} is no file that can be replaced: name another")
        self.output = output
        self.partial = output.with_name(f".{output.name}.partial")
        exists = FileExistsError(
            f"{output} exists: choose another name, or overwrite it with --force"
        )
        if output.exists() and not force and not self.partial.exists():
            raise exists
        output.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            hold(self._file)
            self.found = self._read(job, force)
            # Killed between its last two steps, a job leaves its partial file beside the output.
            if output.exists() and not force and len(self.found) < count:
                raise exists
        except BlockingIOError:
            self.close()
            raise ValueError(f"{self.partial} is being written by another process") from None
        except BaseException:
            self.close()
            raise

    def _read(self, job: str, force: bool) -> Dict[int, Tuple[int, int]]:
        found: Dict[int, Tuple[int, int]] = {}
        end, same = 0, False
        try:
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                if end:
                    found[entry["line"]] = (end, len(line))
                else:
                    same = entry.get("job") == job
                end += len(line)
            refused = bool(found) and not same  # without results, there is nothing to lose
        except (ValueError, LookupError, TypeError, AttributeError):
            same, refused = False, True
        if refused and not force:
            raise ValueError(
                f"{self.partial} is left of an interrupted run with another input, checkpoint or "
                "other options: repeat that command to finish it, or start anew with --force"
            )
        self._end = end if same else 0
        self._file.seek(self._end)
        self._file.truncate()
        if not same:
            self._write([{"job": job}])
        return found if same else {}

    def _write(self, entries: Sequence[Dict[str, Any]]) -> List[Tuple[int, int]]:
        """Returns where they lie."""
        places = []
        for line in map(json_line, entries):
            self._file.write(line)
            places.append((self._end, len(line)))
            self._end += len(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        return places

    def add(self, number: int, result: Dict[str, Any]) -> None:
        """Keep the result of a line, whatever happens from now on."""
        self.add_all({number: result})

    def add_all(self, results: Mapping[int, Dict[str, Any]]) -> None:
        """Keep the results of lines, by their numbers."""
        places = self._write([{"line": n, "result": result} for n, result in results.items()])
        self.found.update(zip(results, places, strict=True))

    def __getitem__(self, number: int) -> Dict[str, Any]:
        """The result of a finished line."""
        place, length = self.found[number]
        return json.loads(os.pread(self._file.fileno(), length, place))["result"]

    def publish(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write a file, whole or not at all."""
        ordered = path.with_name(f".{path.name}.ordered")
        with ordered.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(ordered, path)

    def finish(self, chunks: Iterable[bytes]) -> None:
        """Write the output, and forget the partial file."""
        self.publish(self.output, chunks)
        self.partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes write the partial file."""
        self._file.close()
