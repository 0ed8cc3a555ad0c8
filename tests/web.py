"""A web server on this machine: plain files, Meta's links, Google Storage, a Hugging Face Hub."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
import zlib
from pathlib import Path
from typing import NamedTuple

COMMIT = "a" * 40


class Request(NamedTuple):
    method: str
    path: str
    start: int | None  # first byte asked for
    sent: int  # bytes


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by their path; below /storage/v1/b/bucket/o as Google Storage does.

    `repo` is the repository o/n of a hub, with the revisions main and v1. The other attributes
    switch on what can go wrong.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {}
        self.log = []  # of Request
        self.status = {}  # path, "HEAD path" or "*" -> status to answer instead
        self.query = None  # without which every request is refused
        self.cuts = {}  # path -> number of answers still to be cut off after cut_after bytes
        self.cut_after = 1000
        self.ranges = self.lengths = True
        self.validator = None  # "ETag" or "Last-Modified", to be sent, by contents
        self.delay = 0.0
        self.stall = None  # a path whose answer stops half-way until `release` is set
        self.release = threading.Event()
        self.html = False  # a page for everything that isn't there
        self.repo = {}
        self.wrong = {}  # path in it -> contents sent instead of what the list promises
        self.commit = COMMIT
        self.error = None  # (status, error code) for the contents of files; the list stays public
        self.authorizations = set()

    def add(self, folder, at):
        self.files.update({f"{at}/{p.name}": p.read_bytes() for p in Path(folder).iterdir()})

    def bodies(self):
        return [request.path for request in self.log if request.method == "GET"]

    def gets(self, path):
        return [(r.start, r.sent) for r in self.log if (r.method, r.path) == ("GET", path)]


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
        path = urllib.parse.unquote(url.path)
        if match := re.fullmatch("/storage/v1/b/bucket/o(?:/(.+))?", path):
            self.storage(match[1], dict(urllib.parse.parse_qsl(url.query)))
        elif path.startswith("/api/models/") or "/resolve/" in path:
            self.hub(path[1:])
        else:
            self.send_file(path.lstrip("/"), url.query)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, path, query=""):
        server = self.server
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else None
        note = lambda sent: server.log.append(Request(self.command, path, first, sent))  # noqa: E731
        status = 404 if path not in server.files and not server.html else None
        for key in ("*", path, f"{self.command} {path}"):
            status = server.status.get(key, status)
        if server.query not in (None, query):
            status = 403
        if status is not None or path not in server.files:
            note(0)
            self.answer(status or 200, Content_Type="text/html")
            return
        time.sleep(server.delay)
        data = server.files[path]
        ranged = asked and server.ranges
        body = data[first : int(asked[2]) + 1 if asked[2] else None] if ranged else data
        self.send_response(206 if ranged else 200)
        if server.validator:
            self.send_header(server.validator, git_blob(data))
        if server.lengths:
            self.send_header("Content-Length", str(len(body)))
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body)}/{len(data)}")
        if self.command == "HEAD":
            body = b""
        elif server.cuts.get(path, 0):
            server.cuts[path] -= 1
            body = body[: server.cut_after]
        note(len(body))  # before the client, which then asks for more, knows
        self.end_headers()
        if server.stall == path and body:
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            server.release.wait(600)
            body = body[half:]
        self.wfile.write(body)

    def storage(self, name, query):
        files = self.server.files
        if name and query.get("alt") == "media":
            return self.send_file(name)
        status = self.server.status.get(name or "list", 200)
        about = lambda name: {"name": name, "size": str(len(files[name])),   # noqa: E731
                              "generation": str(zlib.crc32(files[name])),
                              "updated": "2024-01-01T00:00:00.000Z",
                              "timeCreated": "2024-01-01T00:00:00.000Z"}  # fmt: skip
        if name:
            status = status if name in files else 404
            found = about(name) if status == 200 else {}
        else:
            below = [n for n in files if n.startswith(query["prefix"])]
            rest = {n: n[len(query["prefix"]) :] for n in below}
            found = {"items": [about(n) for n in below if "/" not in rest[n]],
                     "prefixes": sorted({query["prefix"] + r.split("/")[0] + "/"
                                         for r in rest.values() if "/" in r})}  # fmt: skip
        self.answer(status, json.dumps(found).encode())

    def sibling(self, name, data):
        about = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
        if len(data) > 100_000:  # large files' contents are known by another checksum
            sha256 = hashlib.sha256(data).hexdigest()
            about |= {"blobId": "0" * 40,
                      "lfs": {"sha256": sha256, "size": len(data), "pointerSize": 130}}  # fmt: skip
        return about

    def hub(self, path):
        server, files = self.server, self.server.repo
        server.log.append(Request(self.command, path, None, 0))
        server.authorizations.add(self.headers.get("Authorization"))
        if "hub" in server.status:
            self.answer(server.status["hub"])
        elif match := re.fullmatch("api/models/o/n(?:/revision/(.+))?", path):
            if match[1] not in (None, "main", "v1", server.commit):
                self.answer(404, X_Error_Code="RevisionNotFound")
                return
            about = {"id": "o/n", "sha": server.commit,
                     "siblings": [self.sibling(n, data) for n, data in files.items()]}  # fmt: skip
            self.answer(200, json.dumps(about).encode())
        elif path == f"api/models/o/n/tree/{server.commit}":
            entries = [{"type": "file", "path": name, "size": len(data), "oid": git_blob(data)}
                       for name, data in files.items()]  # fmt: skip
            self.answer(200, json.dumps(entries).encode())
        elif not path.startswith("o/n/resolve/"):
            self.answer(404, X_Error_Code="RepoNotFound")
        elif server.error:
            self.answer(server.error[0], X_Error_Code=server.error[1])
        elif (name := path.split("/", 4)[4]) not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            etag = f'"{git_blob(files[name])}"'
            data = server.wrong.get(name, files[name])
            self.answer(200, data, ETag=etag, X_Repo_Commit=server.commit)


def git_blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serving():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()


def point_hub_at(url, cache, monkeypatch):
    """As the environment variables HF_ENDPOINT and HF_HOME would for a new process."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # set by tests of the harness
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def closed_url():
    with Server() as closed:
        return closed.url
