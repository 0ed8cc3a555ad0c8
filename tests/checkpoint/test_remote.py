"""Remote paths, against a web server and a make-believe Google Storage on this machine."""

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_weights, write_checkpoint

from llama import checkpoint
from llama.checkpoint import InMemory, gguf, huggingface, remote
from llama.checkpoint.remote import local_path

BIG = bytes(range(256)) * 4000  # 1 MB


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by their path; below /storage/v1/b/bucket/o as Google Storage does."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {}
        self.log = []  # (method, path, first byte)
        self.status = {}  # path or "HEAD path" -> status to answer instead
        self.cuts = {}  # path -> number of answers still to be cut off after cut_after bytes
        self.cut_after = 1000
        self.ranges = self.lengths = True
        self.delay = 0.0
        self.html = False  # a page for everything that isn't there

    def add(self, folder, at):
        self.files.update({f"{at}/{p.name}": p.read_bytes() for p in Path(folder).iterdir()})

    def bodies(self):
        return [path for method, path, _ in self.log if method == "GET"]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        path = urllib.parse.unquote(url.path)
        if match := re.fullmatch("/storage/v1/b/bucket/o(?:/(.+))?", path):
            return self.storage(match[1], query)
        self.send_file(path.lstrip("/"))

    def send_file(self, path, partial=None):
        server = self.server
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        server.log.append((self.command, path, int(asked[1]) if asked else None))
        status = server.status.get(f"{self.command} {path}", server.status.get(path))
        if status is None and path not in server.files:
            status = 200 if server.html else 404
        if status is not None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        time.sleep(server.delay)
        data = server.files[path]
        ranged = asked and server.ranges
        body = data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None] if ranged else data
        self.send_response(206 if ranged else 200)
        if server.lengths:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if server.cuts.get(path, 0):
            server.cuts[path] -= 1
            body = body[: server.cut_after]
        self.wfile.write(body)

    def storage(self, name, query):
        files = self.server.files
        if name and query.get("alt") == "media":
            return self.send_file(name)
        status = self.server.status.get(name or "list", 200)
        about = lambda name: {"name": name, "size": str(len(files[name])), "generation": "1",  # noqa: E731
                              "updated": "2024-01-01T00:00:00.000Z",
                              "timeCreated": "2024-01-01T00:00:00.000Z"}  # fmt: skip
        if name:
            status = status if name in files else 404
            answer = about(name) if status == 200 else {}
        else:
            below = [n for n in files if n.startswith(query["prefix"])]
            rest = {n: n[len(query["prefix"]) :] for n in below}
            answer = {"items": [about(n) for n in below if "/" not in rest[n]],
                      "prefixes": sorted({query["prefix"] + r.split("/")[0] + "/"
                                          for r in rest.values() if "/" in r})}  # fmt: skip
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def bucket(server, monkeypatch):
    import blobfile._gcp

    monkeypatch.setattr(blobfile._gcp, "GCP_BASE_URL", server.url)
    monkeypatch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")
    return server


def closed_url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        return f"http://127.0.0.1:{closed.server_port}"


def assert_same_weights(path, seed=0):
    opened = checkpoint.open(path)
    for name, weight in random_weights(TINY, seed).items():
        assert torch.equal(opened.read(name, 0, 0, weight.shape[0]), weight), name


# ---- local paths -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a/b", "/a/b.gguf", "~/x", "C:/models", "a:b", ""])
def test_local_paths_stay_what_they_are(path):
    assert local_path(path) == Path(path)
    assert local_path(Path(path)) == Path(path)


# The module alone, without the package and its torch, loads in no time.
ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("remote", {remote.__file__!r})
remote = importlib.util.module_from_spec(spec)
spec.loader.exec_module(remote)
"""


def test_local_paths_need_no_blobfile():
    code = ALONE + "print(remote.local_path('x/y'), {'blobfile', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("x/y set()\n", "")


# ---- files and directories on the web --------------------------------------------------------


def test_directory_in_metas_format(server, tmp_path, capsys):
    server.add(write_checkpoint(tmp_path / "tiny", TINY, mp=2), "models/tiny")
    server.files["models/tiny/consolidated.07.pth"] = b"of no use"
    server.files["models/tiny/notes.txt"] = b"of no use"

    path = local_path(f"{server.url}/models/tiny")

    assert path.parent == tmp_path / "cache/remote"
    assert re.fullmatch(r"127\.0\.0\.1-\d+-models-tiny-[0-9a-f]{12}", path.name)
    assert {p.name for p in path.iterdir()} - {remote.RECORD} == {
        "params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model",
    }  # fmt: skip
    assert_same_weights(path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"fetching http\S+/consolidated\.00\.pth \([\d.]+ MB\)", lines[1])

    # The second time, sizes are compared and nothing is fetched, nor said.
    server.log.clear()
    assert local_path(f"{server.url}/models/tiny/") == path
    assert local_path(Path(f"{server.url}/models/tiny")) == path  # a Path has lost a slash
    assert server.bodies() == []
    assert capsys.readouterr() == ("", "")


def test_directory_in_hugging_faces_format(server, tmp_path):
    source = InMemory(TINY, random_weights(TINY))
    server.add(huggingface.write(source, tmp_path / "one"), "one")
    server.add(huggingface.write(source, tmp_path / "many", max_shard_bytes=50_000), "many")
    server.files["many/model.safetensors"] = b"to be ignored: there's an index"
    server.files["many/tokenizer.json"] = b"{}"

    assert_same_weights(local_path(f"{server.url}/one"))
    many = local_path(f"{server.url}/many")
    assert_same_weights(many)
    assert (many / "tokenizer.json").exists() and not (many / "model.safetensors").exists()
    server.log.clear()
    assert local_path(f"{server.url}/many") == many
    assert server.bodies() == []


def test_single_files(server, tmp_path):
    write_checkpoint(tmp_path / "tiny", TINY)
    source = checkpoint.open(tmp_path / "tiny")
    server.files["tokenizer.model"] = (tmp_path / "tiny/tokenizer.model").read_bytes()
    server.files["a b/model"] = gguf.write(source, tmp_path / "model.gguf").read_bytes()
    server.files["model.gguf"] = server.files["a b/model"]

    tokenizer = local_path(f"{server.url}/tokenizer.model?download=true")
    assert tokenizer.name == "tokenizer.model"
    assert tokenizer.read_bytes() == server.files["tokenizer.model"]
    assert_same_weights(local_path(f"{server.url}/model.gguf"))
    escaped = local_path(f"{server.url}/a%20b%2Fmodel")
    assert escaped.name == "model"
    unnamed = local_path(f"{server.url}/a b/model")  # no suffix tells that this is a file
    assert unnamed.name == "model" and unnamed.read_bytes() == server.files["model.gguf"]


def test_a_directory_with_the_name_of_a_file(server, tmp_path):
    server.add(write_checkpoint(tmp_path / "tiny", TINY), "tiny.model")
    assert_same_weights(local_path(f"{server.url}/tiny.model"))


def test_a_changed_remote_is_fetched_anew(server, tmp_path):
    server.add(write_checkpoint(tmp_path / "two", TINY, mp=2), "m")
    path = local_path(f"{server.url}/m")
    (path / "own.txt").write_text("kept")
    server.files.clear()
    server.add(write_checkpoint(tmp_path / "one", TINY, seed=1), "m")
    server.log.clear()
    assert local_path(f"{server.url}/m") == path
    assert not (path / "consolidated.01.pth").exists() and (path / "own.txt").exists()
    assert_same_weights(path, seed=1)
    assert server.bodies() == ["m/consolidated.00.pth"]  # all else has kept its size


def test_urls_that_differ_in_their_query_are_kept_apart(server):
    server.files["get.model"] = b"1"
    first, second = (local_path(f"{server.url}/get.model?id={i}") for i in (1, 2))
    assert first != second and "id" not in str(first)


# ---- broken transfers ------------------------------------------------------------------------


def test_a_cut_transfer_is_resumed_at_once(server):
    server.files["x.gguf"] = BIG
    server.cuts["x.gguf"] = 2
    assert local_path(f"{server.url}/x.gguf").read_bytes() == BIG
    assert [start for method, _, start in server.log if method == "GET"] == [None, 1000, 2000]


def test_a_transfer_that_keeps_breaking_is_resumed_by_the_next_run(server):
    server.files["x.gguf"] = BIG
    server.cuts["x.gguf"] = 3
    with pytest.raises(
        ValueError, match=r"x\.gguf keeps breaking off, lastly after 3000 of 1024000"
    ):
        local_path(f"{server.url}/x.gguf")
    [part] = Path(os.environ["LLAMA_CACHE"]).rglob("*.part")
    assert part.read_bytes() == BIG[:3000]
    server.log.clear()
    path = local_path(f"{server.url}/x.gguf")
    assert path.read_bytes() == BIG
    assert server.log[-1] == ("GET", "x.gguf", 3000)
    assert path == part.with_suffix("")
    assert not part.exists()


def test_a_server_that_cannot_resume(server):
    server.files["x.gguf"] = BIG
    server.cuts["x.gguf"], server.ranges = 1, False
    assert local_path(f"{server.url}/x.gguf").read_bytes() == BIG


def test_a_server_that_tells_no_sizes(server):
    server.files["x.gguf"], server.lengths = BIG, False
    path = local_path(f"{server.url}/x.gguf")
    assert path.read_bytes() == BIG
    server.log.clear()
    assert local_path(f"{server.url}/x.gguf") == path
    assert server.bodies() == []


def test_signed_links_are_for_get_alone(server, capsys):
    server.files["x.gguf"] = BIG
    server.status["HEAD x.gguf"] = 403
    assert local_path(f"{server.url}/x.gguf?sig=s3cr3t").read_bytes() == BIG
    server.status["x.gguf"] = 403
    with pytest.raises(ValueError, match=r"x\.gguf: the server refuses access \(HTTP 403") as error:
        local_path(f"{server.url}/x.gguf?sig=s3cr3t")
    assert "s3cr3t" not in str(error.value) + capsys.readouterr().err


def test_not_enough_space(server, monkeypatch):
    server.files["x.gguf"] = BIG
    usage = remote.shutil.disk_usage(".")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(ValueError, match=r"needs another 1 MB in .* set LLAMA_CACHE"):
        local_path(f"{server.url}/x.gguf")
    assert server.bodies() == []


# ---- what isn't there ------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nothing.gguf", "nothing", "", "m/consolidated.00.pth"])
@pytest.mark.parametrize("html", [False, True])
def test_nothing_there(server, path, html):
    server.html = html
    with pytest.raises(FileNotFoundError, match=re.escape(f"{server.url}/{path}".rstrip("/"))):
        local_path(f"{server.url}/{path}")


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"params.json": b"{}"}, FileNotFoundError, "no consolidated.00.pth"),
        ({"config.json": b"{}"}, FileNotFoundError, "no model.safetensors"),
        ({"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "b"}}'},
         FileNotFoundError, "not its b"),
        ({"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'},
         ValueError, "'../b', which is no file name"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"no JSON"},
         ValueError, "no index of weights"),
    ],
)  # fmt: skip
def test_incomplete_checkpoints(server, files, error, message):
    server.files.update({f"m/{name}": data for name, data in files.items()})
    with pytest.raises(error, match=re.escape(message)) as caught:
        local_path(f"{server.url}/m")
    assert f"{server.url}/m" in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/x", "hf://meta-llama/x", "ftp://example.org/x"])
def test_other_kinds_of_url(url):
    with pytest.raises(ValueError, match=rf"{url}: .* isn't supported, only gs://.*--source hf"):
        local_path(url)


def test_passwords_in_urls_are_refused_and_not_repeated():
    with pytest.raises(ValueError, match="aren't supported") as error:
        local_path("https://me:s3cr3t@example.org/x")
    assert "s3cr3t" not in str(error.value)


def test_no_network(server):
    url = closed_url()
    with pytest.raises(ValueError, match=rf"cannot reach {url}/x.gguf: .*refused"):
        local_path(f"{url}/x.gguf")


@pytest.mark.parametrize("how", ["503", "closed"])
def test_offline_the_cache_serves(server, tmp_path, capsys, how):
    server.add(write_checkpoint(tmp_path / "tiny", TINY), "m")
    path = local_path(f"{server.url}/m")
    capsys.readouterr()
    if how == "closed":
        server.shutdown()
        server.server_close()
    else:
        server.status["m/params.json"] = 503
    assert local_path(f"{server.url}/m") == path
    said = capsys.readouterr().err
    assert f"cannot reach {server.url}/m" in said and f"using the copy in {path}" in said


def test_offline_an_incomplete_cache_does_not_serve(server, tmp_path):
    server.add(write_checkpoint(tmp_path / "tiny", TINY), "m")
    server.cuts["m/consolidated.00.pth"] = 3
    with pytest.raises(ValueError, match="keeps breaking off"):
        local_path(f"{server.url}/m")
    server.status["m/params.json"] = 503
    with pytest.raises(ValueError, match="cannot reach"):
        local_path(f"{server.url}/m")


# ---- several processes -----------------------------------------------------------------------


def test_one_of_several_processes_fetches(server, tmp_path):
    server.add(write_checkpoint(tmp_path / "tiny", TINY), "m")
    server.delay = 0.1
    code = ALONE + f"print(remote.local_path('{server.url}/m'))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sorted(server.bodies()) == sorted(set(server.bodies()))  # each file once
    assert_same_weights(Path(outputs[0][0].strip()))


def test_who_waited_takes_what_the_other_fetched(server, monkeypatch):
    """With flock made to find the lock taken, as it would be with a second process."""
    import fcntl

    server.files["x.gguf"] = BIG
    path = local_path(f"{server.url}/x.gguf")
    server.log.clear()

    def taken(file, how):
        if how & fcntl.LOCK_NB:
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", taken)
    assert local_path(f"{server.url}/x.gguf") == path
    assert server.log == []


# ---- cloud storage, through blobfile ---------------------------------------------------------


def test_bucket(bucket, tmp_path):
    bucket.add(write_checkpoint(tmp_path / "tiny", TINY, mp=2), "some/tiny")
    bucket.files.update({"some/tiny/notes.txt": b"of no use", "some/tiny/deeper/x.pth": b"too"})
    path = local_path("gs://bucket/some/tiny")
    assert path.name.startswith("bucket-some-tiny-")
    assert {p.name for p in path.iterdir()} - {remote.RECORD} == {
        "params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model",
    }  # fmt: skip
    assert_same_weights(path)
    bucket.log.clear()
    assert local_path("gs://bucket/some/tiny/") == path
    assert bucket.log == []

    tokenizer = local_path("gs://bucket/some/tiny/tokenizer.model")
    assert tokenizer.read_bytes() == (path / "tokenizer.model").read_bytes()


def test_bucket_with_a_gguf(bucket):
    bucket.files["g/x.gguf"] = BIG
    path = local_path("gs://bucket/g")
    assert [p.name for p in path.glob("*.gguf")] == ["x.gguf"]
    assert (path / "x.gguf").read_bytes() == BIG
    bucket.files["g/y.gguf"] = BIG
    with pytest.raises(ValueError, match=r"gs://bucket/g holds several models.*x\.gguf, y\.gguf"):
        local_path("gs://bucket/g")


def test_bucket_resumes(bucket, capsys):
    bucket.files["x.gguf"] = BIG
    path = local_path("gs://bucket/x.gguf")
    path.unlink()
    Path(f"{path}.part").write_bytes(BIG[:5000])
    bucket.log.clear()
    assert local_path("gs://bucket/x.gguf").read_bytes() == BIG
    assert {start for *_, start in bucket.log} == {5000}
    assert "resuming" in capsys.readouterr().err


def test_bucket_without_the_file(bucket):
    for url in ("gs://bucket/nothing", "gs://bucket/nothing.gguf"):
        with pytest.raises(FileNotFoundError, match=url):
            local_path(url)


def test_bucket_without_access(bucket):
    bucket.files["x.gguf"] = BIG
    bucket.status.update({"x.gguf": 403, "list": 403})
    with pytest.raises(ValueError, match=r"gs://bucket/x\.gguf: the server refuses access .*403"):
        local_path("gs://bucket/x.gguf")


def test_bucket_without_network(bucket, monkeypatch, capsys):
    import blobfile._gcp

    monkeypatch.setattr(blobfile._gcp, "GCP_BASE_URL", closed_url())
    monkeypatch.setattr("blobfile._common.time.sleep", lambda _: None)
    with pytest.raises(ValueError, match=r"cannot reach gs://bucket/x\.gguf: .*refused"):
        local_path("gs://bucket/x.gguf")
    assert capsys.readouterr().out == ""


def test_who_reads_what():
    for url in ("gs://b/x", "az://a/c/x", "https://a.blob.core.windows.net/c/x"):
        assert isinstance(remote._source(url), remote._Blobs), url
    for url in ("https://a.blob.core.windows.net/c/x?sig=1", "https://example.org/x", "http://h/x"):
        assert isinstance(remote._source(url), remote._Web), url


# ---- progress and the cache's place ----------------------------------------------------------


def test_progress_bar_on_a_terminal(server, monkeypatch, capsys):
    server.files["x.gguf"] = BIG
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    local_path(f"{server.url}/x.gguf")
    assert "100%" in capsys.readouterr().err


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("LLAMA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    where = lambda: str(remote._cache_folder("http://h/x").parent)  # noqa: E731
    assert where() == "/home/someone/.cache/llama-inference/remote"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert where() == "/xdg/llama-inference/remote"
    monkeypatch.setenv("LLAMA_CACHE", "~/own")
    assert where() == "/home/someone/own/remote"
