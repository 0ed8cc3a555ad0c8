"""`llama batch`: the server's answers, a place for every line, and no kill that changes any."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from batches import LINES, PREFIXES, normal, requests, small_model
from conftest import ROOT, run_ranks
from served import PATIENCE, serve, wait_for

from llama import Llama
from llama.apps import batch_lines, cli
from llama.apps.completion import fingerprint
from llama.layers import parallel
from llama.server.offline import Offline
from llama.text.files import Results

CPU = ["--device=cpu", "--dtype=fp32", "--max-seq-len=128"]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def run(model, tmp_path):
    """run(text, *options): the results and the errors of a file with this content."""

    def run(text, *options, name="in.jsonl", output="out.jsonl"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        out = tmp_path / output
        command = ["batch", str(tmp_path / name), str(out), str(model), *CPU, *options]
        cli.parse(command)()
        errors = tmp_path / f"{output}.errors.jsonl"
        return out, [*map(json.loads, errors.read_text().splitlines())] if errors.exists() else []

    return run


def parquet_lines(table):
    """What is read of a Parquet file: lines, and the messages of those that fail."""
    import pyarrow.parquet as parquet

    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return read_lines("in.parquet", buffer.getvalue())


def read_lines(name, content):
    lines = batch_lines.read(Path(name), content, {}, 0)
    errors = [line.request["error"]["message"] for line in lines if isinstance(line.request, dict)]
    return lines, errors


def lines_of(path):
    return [*map(json.loads, path.read_text().splitlines())]


# --- what the results are -------------------------------------------------------------------------


def test_results_are_the_servers_answers(run, model):
    """Of all kinds of requests, errors included; to the bit, log-probabilities too."""
    asked = [line for line in requests(24, "tiny-name") if line["custom_id"] != "sampled"]
    out, errors = run("\n".join(map(json.dumps, asked)), "--served-name=tiny-name")
    found = {line["custom_id"]: line for line in [*lines_of(out), *errors]}
    with serve(model, *CPU, "--served_name=tiny-name") as server:
        for line in asked:
            reply = server.client.post(line["url"], json=line["body"])
            result = found.pop(line["custom_id"])["response"]
            assert result["status_code"] == reply.status_code, line
            assert normal(result["body"]) == normal(reply.json()), line
    assert not found and len(errors) >= 3


def test_a_result_has_the_shape_of_openais(run):
    line = requests(1)[0]
    out, errors = run(json.dumps(line))
    [result] = lines_of(out)
    assert [*result] == ["id", "custom_id", "response", "error"] and not errors
    assert result["id"].startswith("batch_req_") and result["error"] is None
    assert [*result["response"]] == ["status_code", "request_id", "body"]
    assert result["response"]["status_code"] == 200


def test_order_is_the_inputs(run):
    asked = requests(20)
    out, errors = run("\n\n".join(map(json.dumps, reversed(asked))))
    failed = {line["custom_id"] for line in errors}
    expected = [line["custom_id"] for line in reversed(asked) if line["custom_id"] not in failed]
    assert [line["custom_id"] for line in lines_of(out)] == expected


def test_what_gives_no_seed_gets_one_from_its_name(run):
    """So samples don't depend on the order of lines, and differ from line to line."""
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 1, "top_p": 1}
    asked = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        for i in range(6)
    ]

    def texts(asked, *options):
        out, _ = run("\n".join(map(json.dumps, asked)), "--force", *options)
        found = {line["custom_id"]: line["response"]["body"] for line in lines_of(out)}
        return {name: answer["choices"][0]["text"] for name, answer in found.items()}

    found = texts(asked)
    assert len({*found.values()}) == 6
    assert texts(asked[::-1][:4]) == {name: found[name] for name in "5432"}
    assert texts(asked, "--seed=2") != found


@pytest.mark.slow
def test_several_ranks(run, model, tmp_path):
    prompts = "\n".join(json.dumps({"prompt": f"{name} {i}"}) for i, name in enumerate(PREFIXES))
    alone, _ = run(prompts, "--max-gen-len=8")
    out = tmp_path / "ranks.jsonl"
    words = [str(tmp_path / "in.jsonl"), str(out), str(model), *CPU, "--max-gen-len=8"]
    run_ranks(2, "batch", tmp_path / "report", words=words)
    assert lines_of(out) == lines_of(alone)


# --- prompts, dialogs, Parquet --------------------------------------------------------------------


def test_prompts_and_dialogs(run, model):
    llama = Llama.build(model, device="cpu", dtype="fp32", max_seq_len=128)
    dialog = [{"role": "user", "content": "Hi"}]
    asked = [{"prompt": "Hello", "id": 7}, {"messages": dialog}, {"prompt": "abc"}]
    options = ["--max-gen-len=9", "--stop=\x00"]
    out, errors = run("\n".join(map(json.dumps, asked)), *options)
    texts = llama.text_completion(["Hello", "abc"], temperature=0, max_gen_len=9, stop=["\x00"])
    [chat] = llama.chat_completion([dialog], temperature=0, max_gen_len=9, stop=["\x00"])
    generations = [
        texts[0]["generation"], chat["generation"]["content"], texts[1]["generation"]
    ]  # fmt: skip
    found = lines_of(out)
    assert [line["generation"] for line in found] == generations and not errors
    assert [{k: line[k] for k in one} for line, one in zip(found, asked, strict=True)] == asked
    out, _ = run("Hello\r\n\nabc", *options, name="in.txt", output="text.jsonl")
    assert [line["generation"] for line in lines_of(out)] == generations[::2]
    assert [line["prompt"] for line in lines_of(out)] == ["Hello", "abc"]


def test_parquet(run, tmp_path):
    """In and out, the same as JSONL in both formats."""
    import pyarrow
    import pyarrow.parquet as parquet

    asked = requests(12)
    wide = [{**line, "body": json.dumps(line["body"])} for line in asked]
    parquet.write_table(pyarrow.Table.from_pylist(wide), tmp_path / "wide.parquet")
    plain, errors = run("\n".join(map(json.dumps, asked)))
    raw = (tmp_path / "wide.parquet").read_bytes()
    out, same_errors = run(raw, name="in.parquet", output="out.parquet")
    table = parquet.read_table(out).to_pylist()
    found = [{**row, "response": json.loads(row["response"])} for row in table]
    assert list(map(normal, found)) == list(map(normal, lines_of(plain)))
    assert list(map(normal, same_errors)) == list(map(normal, errors))
    prompts = pyarrow.table({"prompt": ["Hello", "abc"], "score": [1.5, None]})
    parquet.write_table(prompts, tmp_path / "prompts.parquet")
    raw = (tmp_path / "prompts.parquet").read_bytes()
    out, _ = run(raw, name="p.parquet", output="p.out.parquet")
    [one, two] = parquet.read_table(out).to_pylist()
    assert (one["score"], two["score"]) == (1.5, None) and one["generation"]


def test_text_of_spark_is_text():
    """Of columns of bytes, what is no UTF-8 fails alone, if it is asked."""
    import pyarrow

    texts = pyarrow.array(["Grüße".encode(), b"\xff", b"abc"])
    lines, errors = parquet_lines(pyarrow.table({"prompt": texts, "id": texts.take([2, 0, 1])}))
    good = [lines[0].value, lines[2].value]
    assert good == [{"prompt": "Grüße", "id": "abc"}, {"prompt": "abc", "id": "/w=="}]
    assert errors == ["line 2: prompt isn't UTF-8: byte 0 can't be read"]
    row = {name: value.encode() for name, value in json.loads(GOOD).items() if name != "body"}
    row["body"] = b'{"prompt": "a"}'
    [line], errors = parquet_lines(pyarrow.Table.from_pylist([row]))
    assert not errors and line.request.body == row["body"]


def test_messages_may_be_json_as_text():
    """As `llama batch` itself writes them to Parquet."""
    import pyarrow

    dialog = [{"role": "user", "content": "Hi"}]
    [content] = batch_lines.written(Path("a.parquet"), [{"messages": dialog}])
    [line], errors = read_lines("a.parquet", content)
    assert not errors and line.value == {"messages": dialog}
    rows = pyarrow.table({"messages": ["Hi"], "id": [1]})
    assert parquet_lines(rows)[0][0].value == {"messages": "Hi", "id": 1}


def test_values_that_json_lacks_are_text():
    import pyarrow

    moment = pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp("ns"))
    length = pyarrow.array([5], pyarrow.duration("ns"))
    table = pyarrow.table({"prompt": ["a"], "at": moment, "took": length})
    [line], errors = parquet_lines(table)
    assert not errors and line.value["at"] == "2023-11-14 22:13:20.123456789"


def test_numbers_that_no_column_holds_are_json():
    import pyarrow.parquet as parquet

    columns = {
        "large": [2**63, 1], "wide": [2**53 + 1, 1.5], "mixed": [3, 1.5], "int": [3, None],
        "float": [0.5, 2.0], "none": [None, None],
    }  # fmt: skip
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    [content] = batch_lines.written(Path("out.parquet"), rows)
    found = parquet.read_table(io.BytesIO(content)).to_pydict()
    texts = {name: [*map(json.dumps, columns[name])] for name in ("large", "wide", "mixed")}
    assert found == {**columns, **texts}


# --- lines that fail ------------------------------------------------------------------------------

GOOD = '{"custom_id": "good", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}'
BAD = {
    "{": (None, "line 2: it isn't valid JSON"),
    "[1]": (None, "line 2: it is no object"),
    '{"text": "b"}': (None, "neither a prompt, messages nor a request; it has 'text'"),
    '{"prompt": "\\ud800"}': (None, "line 2: it isn't valid JSON"),
    GOOD: ("good", "custom_id 'good' is line 1's, too"),
    GOOD.replace("good", "x").replace("POST", "GET"): ("x", "GET"),
    GOOD.replace("good", "x").replace("/v1/comp", "/v2/comp"): ("x", "url '/v2/completions'"),
    GOOD.replace('"good"', "5"): (5, "Expected str, got int - at $.custom_id"),
    GOOD.replace('"custom_id": "good", ', ""): (None, "missing required field custom_id"),
    GOOD.replace("good", "x").replace('{"prompt"', '{"stream": true, "prompt"'): ("x", "stream"),
    GOOD.replace("good", "x").replace('{"prompt": "a"}', "[]"): ("x", "got array"),
    GOOD.replace("good", "x").replace('"prompt"', '"promt"'): ("x", "unknown parameter 'promt'"),
    GOOD.replace("good", "x").replace('"a"', f'"{"a" * 200}"'): ("x", "the context"),
    GOOD.replace("good", "x").replace('"a"', '"a", "top_p": 2'): ("x", "top_p=2.0 must lie"),
    GOOD.replace("good", "x").replace('"a"', '"a", "n": 1, "n": 2'): ("x", "a key occurs twice"),
    GOOD.replace("good", "x").replace('"a"', '"a", "model": "gpt"'): ("x", "no model 'gpt'"),
}  # fmt: skip


def test_bad_lines_are_lines_of_the_error_file(run):
    for i, (bad, (custom_id, says)) in enumerate(BAD.items()):
        out, [error] = run(f"{GOOD}\n{bad}\n", output=f"{i}.jsonl")
        assert [line["custom_id"] for line in lines_of(out)] == ["good"], bad
        assert error["custom_id"] == custom_id and [*error] == [
            "id", "custom_id", "response", "error"
        ], bad  # fmt: skip
        status, told = error["response"]["status_code"], error["response"]["body"]["error"]
        assert status == (404 if "gpt" in bad else 400), bad
        assert says in told["message"], (bad, told)


def test_a_line_that_is_no_utf8_fails_alone():
    lines, errors = read_lines("in.txt", b"a\n\xff\nb")
    assert [line.value.get("prompt") for line in lines] == ["a", None, "b"]
    assert errors == ["line 2: it isn't UTF-8: byte 0 can't be read"]


def test_what_is_no_text_is_refused_at_once():
    """Compressed files and UTF-16 were read as prompts."""
    for name, content in (
        ("in.jsonl.gz", gzip.compress(f"{GOOD}\n".encode() * 20)),
        ("in.txt", "Hello\nWorld\n".encode("utf-16")),
    ):
        with pytest.raises(ValueError, match=f"{name} is no text in UTF-8: unpack or convert it"):
            read_lines(name, content)


def test_a_json_list_is_refused_at_once():
    """Each of its lines failed, for want of the others."""
    with pytest.raises(ValueError, match=r"in.json is a list: write .* line of its own: jq -c"):
        read_lines("in.json", f"\ufeff[\n  {GOOD},\n  {GOOD}\n]\n".encode())
    assert not read_lines("in.txt", b"[1] and [2]")[1]


def test_requests_in_a_file_of_any_name():
    """Such as a pipe's: nobody wants a request to be continued."""
    for name in ("/dev/fd/63", "in.txt"):
        [line], errors = read_lines(name, f"\ufeff\n{GOOD}\n".encode())
        assert not errors and line.name == "good" and not line.plain
    [line], _ = read_lines("in.txt", b'{"prompt": "a"}')
    assert line.value == {"prompt": '{"prompt": "a"}'}


def test_capitals_in_a_files_name():
    content = b'{"prompt": "a"}\n'
    assert read_lines("in.JSONL", content)[0] == read_lines("in.jsonl", content)[0]
    assert b"".join(batch_lines.written(Path("out.PARQUET"), [{"a": 1}])).startswith(b"PAR1")


def test_several_prompts_are_several_lines():
    """Only the answer to the first would be kept."""
    for bad in ('["Hello", "World"]', "[[1, 2], [3]]"):
        [line], [error] = read_lines("in.jsonl", b'{"prompt": %s, "id": 1}' % bad.encode())
        assert "line 1: prompt: one text, or its ids" in error and line.value["id"] == 1
    assert not read_lines("in.jsonl", b'{"prompt": [1, 2]}')[1]


def test_bad_prompts_keep_their_keys(run):
    out, [error] = run('{"prompt": "a", "id": 1}\n' + json.dumps({"prompt": "a" * 200, "id": 2}))
    assert [line["id"] for line in lines_of(out)] == [1]
    assert (error["id"], error["status_code"]) == (2, 400)
    assert error["error"]["code"] == "context_length_exceeded"


def test_a_line_may_be_longer_than_a_servers_request(run):
    """As those with images are."""
    _, [error] = run(GOOD + "\n" + GOOD.replace("good", "x").replace('"a"', f'"{"a" * 9_000_000}"'))
    assert error["response"]["status_code"] == 400, error


def test_a_file_of_which_no_line_succeeds_is_an_error(run, tmp_path):
    """After both files are written."""
    with pytest.raises(ValueError, match=r"no line succeeded: .*out.jsonl.errors.jsonl says why"):
        run(GOOD.replace('"a"', f'"{"a" * 200}"'))
    assert lines_of(tmp_path / "out.jsonl") == []
    [error] = lines_of(tmp_path / "out.jsonl.errors.jsonl")
    assert error["custom_id"] == "good"
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.jsonl", "out.jsonl", "out.jsonl.errors.jsonl"
    }  # fmt: skip


def test_unknown_parameters_can_be_ignored(run):
    for i, asked in enumerate((GOOD.replace('"a"', '"a", "best": 1'), f'{GOOD[:-1]}, "tag": 1}}')):
        out, errors = run(asked, "--lenient", output=f"{i}.jsonl")
        assert len(lines_of(out)) == 1 and not errors


def test_a_failed_engine_is_no_line_of_the_error_file(run, tmp_path, monkeypatch):
    """What isn't answered then is answered by the next run."""
    from llama.engine.engine import Engine

    step, count = Engine.step, iter(range(1000))

    def failing(self):
        if next(count) == 5:
            raise RuntimeError("out of something")
        return step(self)

    asked = "\n".join(map(json.dumps, requests(20)))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of something"):
        patch.setattr(Engine, "step", failing)
        run(asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.jsonl.partial", "in.jsonl"]
    out, errors = run(asked)
    assert len(lines_of(out)) + len(errors) == 20
    assert not [line for line in errors if line["response"]["status_code"] >= 500]


# --- interruptions --------------------------------------------------------------------------------


@pytest.fixture
def expected(run):
    """Results and errors of a run that nothing interrupts."""

    def expected(text, *options):
        out, errors = run(text, *options, name="whole.jsonl", output="whole-out.jsonl")
        return [*map(normal, lines_of(out))], [*map(normal, errors)]

    return expected


def test_interrupted_anywhere(run, expected, tmp_path, monkeypatch):
    text = "\n".join(map(json.dumps, requests(30)))
    whole = expected(text)
    add, replace, submit, asked = Results.add_all, os.replace, Offline.submit, []

    def watched(self, request):
        asked.append(request.number)
        return submit(self, request)

    monkeypatch.setattr(Offline, "submit", watched)

    def dying(before, after):
        def add_all(self, results):
            if before:
                raise KeyboardInterrupt
            add(self, results)
            raise KeyboardInterrupt

        def replaced(*paths):
            if not before:
                replace(*paths)
            raise KeyboardInterrupt

        return ("add_all", add_all) if not after else ("replace", replaced)

    for before in (True, False):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as error:
            patch.setattr(Results, *dying(before, False))
            run(text)
        assert "requests are finished, and the same command goes on" in str(error.value)
        assert not (tmp_path / "out.jsonl").exists()
    _, *left = (tmp_path / ".out.jsonl.partial").read_text().splitlines()
    kept = [json.loads(line)["line"] for line in left]
    assert kept and len(kept) == len({*kept})
    asked.clear()
    for before in (True, False, True, False):  # as the errors are written, and as the results are
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, *dying(before, True))
            run(text)
    assert not {*asked} & {*kept}  # what was finished isn't computed again
    asked.clear()
    out, errors = run(text)
    assert not asked and ([*map(normal, lines_of(out))], [*map(normal, errors)]) == whole
    hidden = [path.name for path in tmp_path.iterdir() if "out.jsonl" in path.name]
    assert sorted(n for n in hidden if not n.startswith("whole")) == [
        "out.jsonl", "out.jsonl.errors.jsonl"
    ]  # fmt: skip


@pytest.mark.slow
def test_killed(run, expected, model, tmp_path):
    """kill -9 in the middle, and Ctrl-C; the same command, each time, finishes the rest."""
    text = "\n".join(map(json.dumps, requests(LINES)))
    whole = expected(text)
    (tmp_path / "in.jsonl").write_text(text)
    partial = tmp_path / ".out.jsonl.partial"
    command = [sys.executable, "-m", "llama", "batch", str(tmp_path / "in.jsonl")]
    command += [str(tmp_path / "out.jsonl"), str(model), *CPU]

    def count():
        return len(partial.read_bytes().splitlines()) if partial.exists() else 0

    for signum, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        before = count()
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_for(lambda before=before, process=process: count() > before + 1 or process.poll())
        process.send_signal(signum)
        said = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == code, said
    assert re.fullmatch(r"interrupted: \d+ of \d+ requests are finished, .*", said.splitlines()[-1])
    assert 1 < count() < LINES
    out, errors = run(text)
    assert ([*map(normal, lines_of(out))], [*map(normal, errors)]) == whole


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes(run, tmp_path):
    with pytest.raises(ValueError, match="in.jsonl has no lines"):
        run("\n")
    with pytest.raises(ValueError, match="--engines and --cpus are of a Ray cluster"):
        run(GOOD, "--engines=2")
    with pytest.raises(ValueError, match="top_p=2.0 must lie"):
        run(GOOD, "--top-p=2")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="out.jsonl exists: choose another name"):
        run(GOOD)
    (tmp_path / "other.jsonl.errors.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other.jsonl.errors.jsonl exists: choose another"):
        run(GOOD, output="other.jsonl")
    out, errors = run(GOOD, "--force")
    assert len(lines_of(out)) == 1 and not errors


def test_the_input_is_never_overwritten(run, tmp_path):
    """Nor what is no file, such as /dev/null."""
    for output, name in (("in.jsonl", "in.jsonl"), ("out", "out.errors.jsonl")):
        with pytest.raises(ValueError, match=f"{name} is the input: choose another name"):
            run(GOOD, "--force", name=name, output=output)
        assert (tmp_path / name).read_text() == GOOD
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe is no file that can be replaced"):
        run(GOOD, "--force", output="pipe")
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.errors.jsonl", "pipe"}


def test_options_that_nothing_heeds_are_named(run, capsys):
    """Those of prompts for requests, and those in lines of prompts."""
    run(GOOD, "--max-gen-len=3", "--top-p=0.5", output="a")
    note = "note: --max-gen-len, --top-p: of prompts and messages; here are requests, whose bodies"
    assert note in capsys.readouterr().err
    line = '{"prompt": "a", "id": 1, "tools": [], "max_tokens": 9}'
    for asked, option in ((line, "--top-p=0.5"), (f"{GOOD}\n{line}", "--max-gen-len=3")):
        run(asked, option, "--force", output="a")
        err = capsys.readouterr().err
        assert "note: max_tokens, tools in lines: kept, and not heeded; options are" in err
        assert err.count("note:") == 1
    run(GOOD, "--force", output="a")
    assert "note:" not in capsys.readouterr().err


@contextmanager
def interrupted(monkeypatch):
    """Runs in it are interrupted when their first results have been kept."""

    def dying(self, results):
        add(self, results)
        raise KeyboardInterrupt

    add = Results.add_all
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Results, "add_all", dying)
        yield


def test_another_jobs_results_are_refused(run, tmp_path, monkeypatch):
    with interrupted(monkeypatch):
        run(GOOD)
    for other in (["--seed=2"], ["--max-gen-len=3"], ["--lenient"], ["--served-name=x"]):
        with pytest.raises(ValueError, match="is left of an interrupted run"):
            run(GOOD, *other)
    with pytest.raises(ValueError, match="is left of an interrupted run"):
        run(GOOD + "\n" + GOOD)
    with monkeypatch.context() as patch:  # all is there: no weights are read
        patch.setattr(Llama, "build", None)
        run(GOOD)


def test_rank_timeout_is_of_the_run(model, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(parallel, "initialize", lambda **options: given.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.parse(["batch", "in", "out", str(model), *CPU, "--rank-timeout=7"])()
    assert given["timeout"] == 7
    job = {"ckpt_dir": str(model)}
    assert fingerprint([], {**job, "rank_timeout": 7}) == fingerprint([], job)


def test_another_tokenizer_or_template_is_another_job(tmp_path):
    """Whatever changes in a file that is read."""
    inside = [tmp_path / "model" / name for name in ("tokenizer.model", "chat_template.jinja")]
    inside[0].parent.mkdir()
    job = {"ckpt_dir": str(inside[0].parent), "tokenizer_path": str(tmp_path / "words")}
    found = {fingerprint([], job)}
    for file in (*inside, tmp_path / "words"):
        for text in ("one", "other"):
            file.write_text(text)
            found.add(fingerprint([], job))
    assert len(found) == 7


def test_another_pipes_results_are_refused(model, tmp_path, monkeypatch):
    def piped(text):
        reading, writing = os.pipe()
        with open(reading), open(writing, "w") as file:
            file.write(text)
            file.close()
            cli.parse(["batch", f"/dev/fd/{reading}", str(tmp_path / "out"), str(model), *CPU])()

    with interrupted(monkeypatch):
        piped("Hello")
    with pytest.raises(ValueError, match="is left of an interrupted run"):
        piped("World")
    piped("Hello")
    assert [line["prompt"] for line in lines_of(tmp_path / "out")] == ["Hello"]


@pytest.mark.parametrize(
    "missing, option, says",
    [
        ("msgspec", [], "llama batch needs msgspec: pip install llama-reference[server]"),
        ("ray", ["--ray"], "llama batch --ray needs ray: pip install llama-reference[ray]"),
    ],
)
def test_missing_packages_are_one_line(model, tmp_path, missing, option, says):
    (tmp_path / "in.jsonl").write_text(GOOD)
    code = f"import sys; sys.modules[{missing!r}] = None; from llama.apps import cli; cli.main()"
    code = code.replace("cli.main()", "sys.exit(cli.main())")
    words = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), str(model)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *CPU, *option], cwd=ROOT, capture_output=True,
        text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {says}\n")
