"""Files: one rule for text, atomic replacement."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest

from llama.apps.score import read_lines
from llama.text.files import Results, beside, read_object, read_text, recovered, write_json


def test_text_is_read_without_what_editors_add_unless_it_is_to_be_exact(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert read_text(path) == "a\nb\n"
    assert read_text(path, exact=True) == "\ufeffa\r\nb\n"
    path.write_bytes(b"na\xefve")
    for exact in (False, True):
        with pytest.raises(ValueError, match=r"a\.txt isn't UTF-8: byte 2"):
            read_text(path, exact=exact)
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_text(tmp_path / "none")
    with pytest.raises(ValueError, match="is a directory: name a file"):
        read_text(tmp_path)


def test_lines_to_score_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n')
    assert read_lines(path) == [(f"{path}:1", "a\r\n")]


def test_what_fails_to_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    with pytest.raises(FileExistsError, match="exists: choose another name"), beside(path):
        pass
    with pytest.raises(RuntimeError), beside(path, force=True) as partial:
        write_json(partial, {"é": 2})
        raise RuntimeError
    assert read_object(path) == {"é": 1} and [*tmp_path.iterdir()] == [path]
    with beside(path, force=True) as partial:
        write_json(partial, {"é": 2})
    assert read_object(path) == {"é": 2} and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("there", [True, False], ids=["a directory", "nothing yet"])
def test_what_a_link_leads_to_is_written(tmp_path, there):
    """A checkpoint on another disk, for example."""
    place, link = tmp_path / "disk" / "model", tmp_path / "here" / "link"
    link.parent.mkdir()
    link.symlink_to(place)
    if there:
        place.mkdir(parents=True)
        write_json(place / "a.json", {"old": 1})
        with pytest.raises(FileExistsError), beside(link):
            raise AssertionError
    with beside(link, force=True) as partial:
        assert partial.parent == place.parent  # so that a rename is enough
        partial.mkdir()
        write_json(partial / "b.json", {"new": 1})
    assert link.is_symlink() and read_object(place / "b.json") == {"new": 1}
    assert [*link.parent.iterdir()] == [link] and [*place.iterdir()] == [place / "b.json"]
    place.rename(place.with_name(".model.old"))  # as if killed between two renames
    assert recovered(link) == link and (link / "b.json").exists() and link.is_symlink()


def test_two_writers_of_a_file_do_not_meet_and_what_a_killed_one_leaves_is_cleared(tmp_path):
    path = tmp_path / "a.json"
    with beside(path) as first:
        write_json(first, {"a": 1})
        refused = pytest.raises(ValueError, match="is being written by another process")
        with refused, beside(path, force=True):
            raise AssertionError
        assert read_object(first) == {"a": 1}
    assert read_object(path) == {"a": 1} and [*tmp_path.iterdir()] == [path]

    code = "import os, sys\nfrom llama.text.files import beside\n"
    code += "with beside(sys.argv[1], True) as partial:\n    partial.mkdir()\n    os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == 9
    assert read_object(path) == {"a": 1} and len([*tmp_path.iterdir()]) == 3
    with beside(path, force=True) as partial:
        write_json(partial, {"a": 2})
    assert read_object(path) == {"a": 2} and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_file_systems_without_locks_are_written_to(tmp_path, monkeypatch, number):
    """As Lustre's are unless they are mounted with them, and NFS without its daemon."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    fails = number == errno.EIO
    with pytest.raises(OSError, match="Input/output") if fails else nullcontext():
        with beside(tmp_path / "a.json") as partial:
            write_json(partial, {})
        Results(tmp_path / "out", "job", 1).close()
    assert (tmp_path / "a.json").exists() != fails
