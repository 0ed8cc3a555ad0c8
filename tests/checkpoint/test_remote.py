"""Remote paths, against a web server on this machine that is a bucket and a hub, too."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, random_weights, write_checkpoint
from web import closed_url, point_hub_at, serving

from llama import checkpoint
from llama.checkpoint import InMemory, gguf, huggingface, remote, transfer
from llama.checkpoint.remote import local_path

BIG = bytes(range(256)) * 4000  # 1 MB


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        yield server


@pytest.fixture
def bucket(server, monkeypatch):
    import blobfile._gcp

    monkeypatch.setattr(blobfile._gcp, "GCP_BASE_URL", server.url)
    monkeypatch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")
    return server


def assert_same_weights(path, seed=0):
    opened = checkpoint.open(path)
    for name, weight in random_weights(TINY, seed).items():
        assert torch.equal(opened.read(name, 0, 0, weight.shape[0]), weight), name


# ---- local paths -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a/b", "/a/b.gguf", "~/x", "C:/models", "a:b", ""])
def test_local_paths_stay_what_they_are(path):
    assert local_path(path) == Path(path)
    assert local_path(Path(path)) == Path(path)


# The module alone: the packages around it are replaced by empty ones.
ALONE = f"""
import sys, types
for name in ("llama", "llama.text", "llama.checkpoint"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{ROOT}/" + name.replace(".", "/")]
from llama.checkpoint import remote
"""


def test_local_paths_need_no_blobfile():
    code = f"{ALONE}print(remote.local_path('x/y'))\n"
    code += "print({'blobfile', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("x/y\nset()\n", "")


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
    beside = ("chat_template.json", "preprocessor_config.json")  # of models that see
    server.files |= {f"many/{name}": b"{}" for name in beside}
    server.files["many/additional_chat_templates/tool_use.jinja"] = b"{{ tools }}"

    assert_same_weights(local_path(f"{server.url}/one"))
    many = local_path(f"{server.url}/many")
    assert_same_weights(many)
    assert (many / "tokenizer.json").exists() and not (many / "model.safetensors").exists()
    assert all((many / name).exists() for name in beside)
    assert (many / "additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
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
    assert server.gets("x.gguf") == [(None, 1000), (1000, 1000), (2000, len(BIG) - 2000)]


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
    assert server.log[-1] == ("GET", "x.gguf", 3000, len(BIG) - 3000)
    assert path == part.with_suffix("")
    assert not part.exists()


@pytest.mark.parametrize("known_by", ["ETag", "Last-Modified", "size", "size of part"])
def test_old_and_new_contents_are_never_mixed(server, known_by):
    url, server.files["x.gguf"] = f"{server.url}/x.gguf", b"1" * 10_000
    server.validator = None if "size" in known_by else known_by
    for received in (3000, 6000):  # resumed while nothing has changed
        server.cuts["x.gguf"] = 3
        with pytest.raises(ValueError, match=f"lastly after {received} of 10000"):
            local_path(url)
    server.files["x.gguf"] = b"2" * {"size": 15_000, "size of part": 6000}.get(known_by, 10_000)
    assert local_path(url).read_bytes() == server.files["x.gguf"]
    assert names_in(local_path(url).parent) == {"x.gguf", remote.RECORD}


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
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
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


@pytest.mark.parametrize("url", ["s3://bucket/x", "ftp://example.org/x"])
def test_other_kinds_of_url(url):
    with pytest.raises(
        ValueError, match=rf"{url}: .* isn't supported, only gs://.*hf://OWNER/NAME"
    ):
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


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_serves(server, monkeypatch, capsys, reason):
    server.files["x.gguf"] = BIG
    path = local_path(f"{server.url}/x.gguf")
    record = path.parent / remote.RECORD
    before = record.stat().st_ino
    assert local_path(f"{server.url}/x.gguf") == path
    assert record.stat().st_ino == before  # there was nothing to write

    def refuse(lock, **_):
        raise OSError(reason, os.strerror(reason), lock.lock_file)

    monkeypatch.setattr(transfer.FileLock, "acquire", refuse)
    assert local_path(f"{server.url}/x.gguf") == path and path.read_bytes() == BIG
    assert f"{os.strerror(reason)}: " in capsys.readouterr().err
    record.unlink()  # not complete
    with pytest.raises(OSError, match=os.strerror(reason)):
        local_path(f"{server.url}/x.gguf")


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
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sorted(server.bodies()) == sorted(set(server.bodies()))  # each file once
    assert_same_weights(Path(outputs[0][0].strip()))


def test_who_waited_takes_what_the_other_fetched(server, monkeypatch):
    """With a lock that is taken at first, as it would be with a second process."""
    server.files["x.gguf"] = BIG
    path = local_path(f"{server.url}/x.gguf")
    server.log.clear()

    class Taken(transfer.FileLock):
        def acquire(self, timeout=None):
            if timeout == 0:
                raise transfer.Timeout(self.lock_file)
            return super().acquire(timeout)

    monkeypatch.setattr(transfer, "FileLock", Taken)
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
    parts = {f"x-0000{i}-of-00002.gguf" for i in (1, 2)}
    bucket.files |= {f"parts/{name}": BIG for name in parts}
    for name in ("", *parts):
        path = local_path(f"gs://bucket/parts/{name}")
        assert {p.name for p in (path.parent if name else path).glob("*.gguf")} == parts
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
    assert {request.start for request in bucket.log} == {5000}
    assert "resuming" in capsys.readouterr().err


def test_bucket_with_a_part_of_older_contents(bucket):
    bucket.files["x.gguf"] = BIG
    path = local_path("gs://bucket/x.gguf")
    path.unlink()
    Path(f"{path}.part").write_bytes(b"old")
    Path(f"{path}.part.version").write_text("1")
    assert local_path("gs://bucket/x.gguf").read_bytes() == BIG


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
        assert isinstance(remote._source(url), transfer.Blobs), url
    for url in ("https://a.blob.core.windows.net/c/x?sig=1", "https://example.org/x", "http://h/x"):
        assert isinstance(remote._source(url), transfer.Web), url


# ---- the Hugging Face Hub --------------------------------------------------------------------


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    point_hub_at(server.url, tmp_path / "hub", monkeypatch)
    return server


def add_repo(server, tmp_path, seed=0):
    """A repository as Meta's are: everything twice, and more besides."""
    source = InMemory(TINY, random_weights(TINY, seed))
    model = huggingface.write(source, tmp_path / f"hf{seed}", max_shard_bytes=50_000)
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    files |= {"tokenizer.json": b"{}", "LICENSE.txt": b"terms", "README.md": b"", "x.gguf": BIG}
    original = write_checkpoint(tmp_path / f"meta{seed}", TINY, seed=seed)
    files |= {f"original/{p.name}": p.read_bytes() for p in original.iterdir()}
    server.repo = files
    return {p.name for p in model.iterdir()} | {"tokenizer.json", "LICENSE.txt"}


def names_in(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_hub(hub, tmp_path, capsys):
    needed = add_repo(hub, tmp_path)
    path = local_path("hf://o/n")
    assert names_in(path) == needed
    assert_same_weights(path)
    assert capsys.readouterr() == ("", "")  # progress bars are for terminals
    # The second time, nothing but what is there is asked for.
    hub.log.clear()
    assert local_path(Path("hf://o/n/")) == path  # a Path has lost a slash
    assert not [request for request in hub.log if "/resolve/" in request.path]

    assert local_path("hf://o/n/x.gguf").read_bytes() == BIG
    assert_same_weights(local_path("hf://o/n@v1/original"))
    assert local_path("HF://o/n/original/tokenizer.model").name == "tokenizer.model"


def test_hub_with_metas_files_alone(hub, tmp_path):
    add_repo(hub, tmp_path)
    hub.repo = {n: data for n, data in hub.repo.items() if "original" in n or n == "README.md"}
    path = local_path("hf://o/n")
    assert path.name == "original"
    assert_same_weights(path)


def test_hub_with_an_adapter(hub):
    hub.repo = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1", "a.txt": b""}
    assert names_in(local_path("hf://o/n")) == {"adapter_config.json", "adapter_model.safetensors"}


def test_hub_with_ggufs(hub):
    hub.repo = {"a[1].gguf": BIG, "README.md": b""}
    assert names_in(local_path("hf://o/n")) == {"a[1].gguf"}
    hub.repo["b.gguf"] = b""
    hub.commit = "b" * 40
    with pytest.raises(ValueError, match=r"o/n holds several models.*a\[1\]\.gguf, b\.gguf"):
        local_path("hf://o/n")
    parts = {f"Q8/x-0000{i}-of-00002.gguf": BIG for i in (1, 2)}
    hub.repo, hub.commit = hub.repo | parts, "c" * 40
    second = local_path("hf://o/n/Q8/x-00002-of-00002.gguf")
    assert names_in(second.parent) == {path.name for path in map(Path, parts)}
    assert local_path("hf://o/n/Q8") == second.parent
    del hub.repo["Q8/x-00001-of-00002.gguf"]
    hub.commit = "d" * 40
    with pytest.raises(FileNotFoundError, match="has Q8/x-00002-of-00002.gguf, but not its Q8/x-"):
        local_path("hf://o/n/Q8/x-00002-of-00002.gguf")


def test_a_changed_repository_is_fetched_anew(hub, tmp_path):
    add_repo(hub, tmp_path)
    before = local_path("hf://o/n")
    add_repo(hub, tmp_path, seed=1)
    hub.commit = "b" * 40
    assert_same_weights(local_path("hf://o/n"), seed=1)
    assert_same_weights(before)


@pytest.mark.parametrize("how", ["closed", "HF_HUB_OFFLINE", "503"])
def test_offline_the_hubs_cache_serves(hub, tmp_path, monkeypatch, capsys, how):
    needed = add_repo(hub, tmp_path)
    path = local_path("hf://o/n")
    capsys.readouterr()
    if how == "closed":
        point_hub_at(closed_url(), tmp_path / "hub", monkeypatch)
    elif how == "503":
        monkeypatch.setitem(hub.status, "hub", 503)
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_path("hf://o/n") == path and names_in(path) == needed
    assert f"using the copy in {path}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"(cannot reach|HF_HUB_OFFLINE is set).* no copy of it"):
        local_path("hf://o/other")


def test_offline_an_incomplete_copy_does_not_serve(hub, tmp_path, monkeypatch):
    add_repo(hub, tmp_path)
    path = local_path("hf://o/n")
    next(path.glob("model-00002*")).unlink()
    point_hub_at(closed_url(), tmp_path / "hub", monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"not its model-00002"):
        local_path("hf://o/n")


@pytest.mark.parametrize(
    ("url", "error", "kind", "message"),
    [
        ("hf://o/n", (403, "GatedRepo"), ValueError, "o/n is gated: accept .*HF_TOKEN"),
        ("hf://o/n", (403, "None"), ValueError, "refuses access"),
        ("hf://o/m", None, FileNotFoundError, "no model .*/o/m, or it is private"),
        ("hf://o/n@v2", None, FileNotFoundError, "/o/n has no revision v2"),
        ("hf://o/n/y.gguf", None, FileNotFoundError, "o/n has no file y.gguf"),
        ("hf://o", None, ValueError, "'o' is not OWNER/NAME"),
        ("hf://o/n@/x", None, ValueError, "is not OWNER/NAME"),
    ],
)  # fmt: skip
def test_hub_refuses(hub, tmp_path, url, error, kind, message):
    add_repo(hub, tmp_path)
    hub.error = error
    with pytest.raises(kind, match=message):
        local_path(url)


def test_hub_without_a_checkpoint(hub):
    hub.repo = {"README.md": b"", "y/model.safetensors": b""}
    with pytest.raises(FileNotFoundError, match=r"o/n holds no checkpoint: .*o/n/FILE"):
        local_path("hf://o/n")


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
    assert where() == "/home/someone/.cache/llama-reference/remote"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert where() == "/xdg/llama-reference/remote"
    monkeypatch.setenv("LLAMA_CACHE", "~/own")
    assert where() == "/home/someone/own/remote"
