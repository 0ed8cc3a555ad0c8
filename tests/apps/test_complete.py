"""`llama complete`: prompts from anywhere, shots, and files of prompts that survive any kill."""

import io
import json
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, THOROUGH, TINY, forked_python, torchrun, write_checkpoint
from cyclopts import CycloptsError

from llama import Llama, Transformer
from llama.apps import cli
from llama.text.few_shot import TEMPLATE, FewShot, read_shots
from llama.text.files import Results

KILLS = 100 if THOROUGH else 6
CPU = {"device": "cpu", "dtype": "fp32", "max_seq_len": 128}


def complete(ckpt, **options):
    """The command in this process; what it raises isn't caught."""
    cli.parse(["complete", str(ckpt), *words(options)])()


def words(options):
    for name, value in options.items():
        yield (
            f"--{name}={value}" if not isinstance(value, bool) else f"--{'no-' * (not value)}{name}"
        )


def start(command, text=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), env=environment, input=text, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip


@pytest.fixture
def run(tiny_dir, capsys):
    """run(...): complete with the tiny model; returns what it prints to stdout."""

    def run(**options):
        complete(tiny_dir, **{**CPU, "max_gen_len": 8, **options})
        return capsys.readouterr().out

    return run


@pytest.fixture
def batch(tmp_path):
    """batch(n): a file of n prompts of many lengths, each with an id."""

    def batch(n=14):
        rng, path = random.Random(n), tmp_path / "in.jsonl"
        prompts = ["".join(rng.choices("abcdef gh", k=rng.randint(1, 40))) + "." for _ in range(n)]
        lines = [json.dumps({"id": i, "prompt": prompt}) for i, prompt in enumerate(prompts)]
        path.write_text("\n".join(lines))
        return path

    return batch


def stdin(monkeypatch, raw, terminal=False):
    fake = SimpleNamespace(buffer=io.BytesIO(raw), isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdin", fake)


# --- shots and templates -------------------------------------------------------------------------


def test_shots_inline():
    assert read_shots("sea otter => loutre de mer; cheese=>fromage;") == [
        ("sea otter", "loutre de mer"), ("cheese", "fromage"),
    ]  # fmt: skip
    assert read_shots(r"a\; b => c => d; x \=> y => z") == [("a; b", "c => d"), ("x => y", "z")]


def test_shots_of_a_file(tmp_path):
    path = tmp_path / "shots.jsonl"
    path.write_text('{"input": "a => b; c", "output": "é"}\r\n\n{"input": "x", "output": "y"}')
    assert read_shots(str(path)) == [("a => b; c", "é"), ("x", "y")]


@pytest.mark.parametrize(
    "shots, says",
    [
        ("a => b; c = d", "shot 'c = d' isn't 'input => output'"),
        ("a =>", "shot 'a =>' isn't"),
        ("a b", "'a b': neither 'input => output; input => output' nor a file"),
    ],
)
def test_shots_that_are_none(shots, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        read_shots(shots)


def test_template():
    shots = [("sea", "mer"), ("bread", "pain")]
    few_shot = FewShot(shots, instruction="Translate English to French:")
    expected = "Translate English to French:\n\nsea => mer\nbread => pain\ncheese =>"
    assert (few_shot.prompt("cheese"), few_shot.stop) == (expected, "\n")
    for typed in ("cheese", "cheese =>", "cheese => ", "cheese=>\n"):
        assert few_shot.prompt(few_shot.without_separator(typed)) == expected
    few_shot = FewShot(shots[:1], "Q: {input}\nA: {output}\n\n")
    assert (few_shot.prompt(" x\ny "), few_shot.stop) == ("Q: sea\nA: mer\n\n\nQ: x\ny\nA:", "\n\n")
    tags = FewShot([("{output}", "{input}")], "<q>{input}</q>\n<a>\n{output}</a>")
    assert tags.prompt("{}") == "<q>{output}</q>\n<a>\n{input}</a>\n<q>{}</q>\n<a>\n"
    assert tags.stop == "</a>"


@pytest.mark.parametrize(
    "template", ["=>", "{input}", "{output} {input}", "{input}{input}{output}"]
)
def test_template_without_its_places(template):
    with pytest.raises(ValueError, match=r"needs \{input\} and then \{output\}, once each"):
        FewShot([], template)


def test_shot_that_holds_the_end_of_answers():
    with pytest.raises(ValueError, match=r"the shot 'a' contains '\\n', where answers end"):
        FewShot([("a", "b\nc")])


# --- one prompt ----------------------------------------------------------------------------------


def test_prompt_from_anywhere(run, tiny, tmp_path, monkeypatch):
    [expected] = tiny.text_completion(["Hello, world"], temperature=0, max_gen_len=8)
    expected = expected["generation"] + "\n"
    (tmp_path / "prompt.txt").write_bytes(b"Hello, world\r\n")
    assert run(prompt="Hello, world") == expected
    assert run(prompt_file=str(tmp_path / "prompt.txt")) == expected
    for given in ({}, {"prompt": "-"}, {"prompt_file": "-"}):
        stdin(monkeypatch, b"Hello, world\n", terminal=bool(given))
        assert run(**given) == expected


def test_samples_and_seeds(run):
    options = {"prompt": "Hello", "temperature": 1.0, "top_p": 1.0, "stop": "\n"}
    one, two = run(**options), run(**options, seed=2)
    assert one == run(**options) != two
    assert run(**options, n=2).startswith(one)


def test_stop_strings(run, tiny):
    [whole] = tiny.text_completion(["Hello"], temperature=0, max_gen_len=8)
    text = whole["generation"]
    assert len(set(text)) > 4
    for stop, given in ((text[3:5], text[3:5]), (text[2], json.dumps(["never", text[2]]))):
        assert run(prompt="Hello", stop=given) == text[: text.index(stop)] + "\n"


def test_answer_comes_as_it_is_made(run, monkeypatch):
    pieces, stream = [], Llama.stream_text

    def watched(self, *args, **kwargs):
        for event in stream(self, *args, **kwargs):
            pieces.append((event.text, len(shown)))
            yield event

    shown: list = []
    monkeypatch.setattr(Llama, "stream_text", watched)
    monkeypatch.setattr("builtins.print", lambda *text, **_: shown.append(text))
    run(prompt="Hello")
    assert [before for _, before in pieces if before] and len(pieces) == 8


def test_demo_model_translates_in_one_line(smollm2, smollm2_path, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "build", lambda **_: smollm2)  # it has been read already
    complete(
        smollm2_path, prompt="cheese =>", instruction="Translate English to French:",
        shots="sea => mer; bread => pain; house => maison", max_gen_len=12, **CPU,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.strip() and out == out.strip() + "\n", out


@pytest.mark.slow
def test_as_a_command(tiny_dir, tiny, batch, tmp_path):
    """Nothing but the answer on stdout; a prompt with a comma is a text."""
    options = ["--device", "cpu", "--dtype", "fp32", "--max_seq_len", 128, "--max_gen_len", 8]
    done = start(
        [sys.executable, "-m", "llama", "complete", tiny_dir, "--prompt", "1, 2", *options]
    )
    [expected] = tiny.text_completion(["1, 2"], temperature=0, max_gen_len=8)
    assert (done.returncode, done.stdout) == (0, expected["generation"] + "\n"), done.stderr


@pytest.mark.slow
def test_two_ranks(tmp_path, batch):
    """Rank 0 alone reads, prints and writes; its errors are all ranks' errors."""
    ckpt = write_checkpoint(tmp_path / "ckpt", TINY)
    script, out = tmp_path / "run.py", tmp_path / "out.jsonl"
    options = {"max_gen_len": 4, "max_batch_size": 4, **CPU}
    script.write_text(
        f"from llama.apps.cli import parse\nfrom llama.layers.parallel import rank\n"
        f"options = {['complete', str(ckpt), *words(options)]}\n"
        f"parse([*options, '--prompt', '-'])()\n"
        f"job = [*options, '--output', {str(out)!r}]\n"
        f"parse([*job, '--input', {str(batch())!r}])()\n"
        "try:\n"
        f"    parse([*job, '--input', 'nowhere'])()\n"
        "except FileNotFoundError as error:\n"
        f"    open({str(tmp_path)!r} + f'/{{rank()}}', 'w').write(str(error))\n"
    )
    done = start([*torchrun(2), script], text="Hello")
    assert done.returncode == 0, done.stderr[-4000:]
    half = len(done.stdout) // 2
    assert done.stdout.endswith("\n") and done.stdout[:half] != done.stdout[half:]
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == list(range(14))
    assert [(tmp_path / r).read_text() for r in "01"] == ["no file at nowhere"] * 2


# --- files of prompts ----------------------------------------------------------------------------


def test_file_keeps_order_and_other_keys(run, tiny, batch, tmp_path):
    source, out = batch(), tmp_path / "sub" / "out.jsonl"
    assert run(input=str(source), output=str(out), max_batch_size=4) == ""
    asked = [json.loads(line) for line in source.read_text().splitlines()]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    answers = tiny.text_completion([a["prompt"] for a in asked], temperature=0, max_gen_len=8)
    assert found == [a | dict(b) for a, b in zip(asked, answers, strict=True)]
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_file_of_inputs_with_shots_and_samples(run, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input": "é", "id": [1]}\n\n{"input": "b"}\n')
    run(input=str(source), output=str(out), shots="a => b", n=2, temperature=1.0, max_gen_len=4)
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert list(first) == ["input", "id", "generation", "finish_reason"] and first["id"] == [1]
    assert len(second["generation"]) == 2 and len(second["finish_reason"]) == 2
    assert all(text == text.strip() for text in first["generation"] + second["generation"])
    assert '"é"' in out.read_text()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_texts_begin_with_is_computed_once(run, tmp_path, monkeypatch, temperature):
    """The shots, whatever the batches; the file is the same, interrupted or not."""
    source, out, whole = (tmp_path / f"{name}.jsonl" for name in ("in", "out", "whole"))
    source.write_text("".join(f'{{"input": "word{i}{i}"}}\n' for i in range(9)))
    options = dict(input=str(source), max_batch_size=3, temperature=temperature, max_gen_len=6,
                   shots="one => 1; two => 2; three => 3; four => 4; five => 5")  # fmt: skip
    run(output=str(whole), prefix_cache_mb=0, **options)
    plain, fed, hidden = whole.read_bytes(), [], Transformer.hidden

    def watched(self, tokens, *rest):
        fed.append(tuple(tokens.shape))
        return hidden(self, tokens, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "hidden", watched)
        run(output=str(whole), force=True, **options)
    prompts = [shape for shape in fed if shape[1] > 1]
    assert prompts[0][0] == 1 and prompts[0][1] > 50
    assert len(prompts) == 4 and all(rows == 3 and new < 12 for rows, new in prompts[1:])
    assert whole.read_bytes() == plain
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut(patch, 4)
        run(output=str(out), **options)
    run(output=str(out), **options)
    assert out.read_bytes() == plain


def test_forms_and_guesses(run, tmp_path, tiny_dir):
    """A format as JSON or in a file; guesses by either means change nothing of the text."""
    format_ = {"type": "regex", "regex": "[a-e]{3,9}!"}
    (tmp_path / "format").write_text(json.dumps(format_))
    options = {"prompt": "abcabc", "max_gen_len": 40, "temperature": 0.8}
    text = run(response_format=json.dumps(format_), **options)
    assert re.fullmatch("[a-e]{3,9}!\n", text)
    assert run(response_format=str(tmp_path / "format"), **options) == text
    for speculate in ({"speculate": "lookup"}, {"draft_ckpt_dir": str(tiny_dir)}):
        assert run(response_format=json.dumps(format_), **speculate, **options) == text
        assert run(**speculate, **options) == run(**options)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hello"}\n' * 3)
    run(input=str(source), output=str(out), temperature=0.8, response_format=json.dumps(format_))
    for line in out.read_text().splitlines():
        assert re.fullmatch("[a-e]{3,8}!?", json.loads(line)["generation"])


def test_rows_of_one_file_have_seeds_of_their_own(run, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hello"}\n' * 6)
    run(input=str(source), output=str(out), temperature=1.0, top_p=1.0, max_batch_size=4)
    assert len(set(out.read_text().splitlines())) == 6


def cut(monkeypatch, k, before=True):
    """The process is gone with the k-th result, before or after it is on the disk."""
    add, count = Results.add, iter(range(1000))

    def dying(self, number, result):
        if (last := next(count) == k) and before:
            raise KeyboardInterrupt
        add(self, number, result)
        if last:
            raise KeyboardInterrupt

    monkeypatch.setattr(Results, "add", dying)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_interrupted_at_a_line(run, batch, tmp_path, monkeypatch, temperature):
    source, out, whole = batch(), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = {"input": str(source), "max_batch_size": 4, "temperature": temperature}
    batches, stream = [], Llama.stream_text

    def watched(self, prompts, **kwargs):
        batches.append(list(prompts))
        return stream(self, prompts, **kwargs)

    monkeypatch.setattr(Llama, "stream_text", watched)
    run(output=str(whole), **options)
    planned = list(batches)
    for k, before in ((0, True), (0, False), (2, True), (5, False)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut(patch, k, before)
            run(output=str(out), **options)
        assert not out.exists()
        _, *left = (tmp_path / ".out.jsonl.partial").read_text().splitlines()
        numbers = [json.loads(line)["line"] for line in left]
        assert len(numbers) == len(set(numbers))
    begun = len(batches)
    run(output=str(out), **options)
    assert out.read_bytes() == whole.read_bytes()
    assert 0 < len(batches) - begun < len(planned)  # what was finished isn't computed again,
    assert all(batch in planned for batch in batches)  # and nothing in other company


def test_interrupted_in_its_last_steps(run, batch, tmp_path, monkeypatch):
    source, out, whole = batch(), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = {"input": str(source), "max_batch_size": 4}
    run(output=str(whole), **options)
    replace = os.replace

    def after(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    def before(*paths):
        raise KeyboardInterrupt

    for step in (before, after):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", step)
            run(output=str(out), **options)
        assert out.exists() == (step is after)
    with monkeypatch.context() as patch:  # all is there: no weights are read
        patch.setattr(Llama, "build", None)
        run(output=str(out), **options)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_torn_at_any_byte(tmp_path):
    partial = tmp_path / ".out.partial"
    with pytest.raises(FileExistsError, match="is a directory: name a file"):
        Results(tmp_path, "job", 3, force=True)
    results = Results(tmp_path / "out", "job", 3)
    for number in (1, 3):
        results.add(number, {"generation": "é\n"})
    results.close()
    raw = partial.read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for length in range(len(raw) + 1):
        partial.write_bytes(raw[:length])
        again = Results(tmp_path / "out", "job", 3)
        assert list(again.found) == [1, 3][: max(0, sum(end <= length for end in ends) - 1)]
        for number in {1, 3} - set(again.found):
            again.add(number, {"generation": "é\n"})
        again.close()
        assert sorted(partial.read_bytes().splitlines()) == sorted(raw.splitlines())
    Results(tmp_path / "out", "another job", 3, force=True).close()
    assert not Results(tmp_path / "out", "another job", 3).found  # nothing stays of the first


# Forks children from one process that has imported torch, so that a start is cheap; each child is
# killed at a moment drawn at random, until there were enough kills and the last job is done.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import llama.apps.completion  # what a command imports when it runs
from llama.apps.cli import parse

ckpt, folder, kills, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
options, rng = json.loads(options), random.Random(0)

def child(out, temperature):
    pid = os.fork()
    if pid == 0:
        try:
            job = dict(input=folder / "in.jsonl", output=out, temperature=temperature, **options)
            parse(["complete", ckpt, *(f"--{name}={value}" for name, value in job.items())])()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

wholes = []
for temperature in (0.0, 0.9):
    begin, out = time.monotonic(), folder / f"whole{temperature}.jsonl"
    assert os.waitpid(child(out, temperature), 0)[1] == 0
    length = time.monotonic() - begin
    wholes.append((temperature, out.read_bytes()))
killed, jobs, lines = 0, 0, []
while killed < kills or jobs < 2 or not any(0 < n < 32 for n in lines):
    temperature, whole = wholes[jobs % 2]
    jobs += 1
    out = folder / f"out{jobs}.jsonl"
    partial = folder / f".{out.name}.partial"
    while not out.exists() or partial.exists():
        pid, wait = child(out, temperature), rng.uniform(0, 0.8 * length)
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)  # still our child, perhaps one that is done
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        killed += status == signal.SIGKILL
        if partial.exists():
            there = partial.read_bytes().split(b"\\n")[1:-1]
            numbers = [json.loads(line)["line"] for line in there]
            assert len(set(numbers)) == len(numbers)
            lines.append(len(numbers))
    assert out.read_bytes() == whole, out
print(json.dumps({"killed": killed, "jobs": jobs, "lines": lines}))
"""


@pytest.mark.slow
def test_killed_at_random_moments(tiny_dir, batch, tmp_path):
    batch(32)
    options = {**CPU, "max_batch_size": 4, "max_gen_len": 16}
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    done = start([*forked_python(), script, tiny_dir, tmp_path, KILLS, json.dumps(options)])
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    print(told)
    assert told["killed"] >= KILLS and any(0 < n < 32 for n in told["lines"]), told


# --- mistakes ------------------------------------------------------------------------------------


def test_another_jobs_partial_file_is_refused(run, batch, tmp_path, monkeypatch):
    source, out = batch(), tmp_path / "out.jsonl"
    job = {"input": str(source), "output": str(out), "max_batch_size": 4}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut(patch, 5)
        run(**job)
    left = (tmp_path / ".out.jsonl.partial").read_bytes()
    for other in ({"max_gen_len": 9}, {"seed": 2}, {"max_batch_size": 5}, {"stop": "x"}):
        with pytest.raises(ValueError, match="out.jsonl.partial is left of an interrupted run"):
            run(**{**job, **other})
    assert (tmp_path / ".out.jsonl.partial").read_bytes() == left
    source.write_text(source.read_text().replace('"id": 3', '"id": 33'))
    with pytest.raises(ValueError, match="or start anew with --force"):
        run(**job)
    run(**job, force=True)
    assert '"id": 33' in out.read_text() and len(out.read_text().splitlines()) == 14


def test_output_is_replaced_only_if_told_so(run, batch, tmp_path):
    source, out = batch(), tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="out.jsonl exists: choose another name"):
        run(input=str(source), output=str(out))
    assert out.read_text() == "mine" and not (tmp_path / ".out.jsonl.partial").exists()
    run(input=str(source), output=str(out), force=True)
    assert len(out.read_text().splitlines()) == 14


def test_two_at_once_are_refused(tmp_path):
    first = Results(tmp_path / "out", "job", 3)
    with pytest.raises(ValueError, match="is being written by another process"):
        Results(tmp_path / "out", "job", 3)
    first.close()


def test_a_mistake_leaves_nothing_to_force(run, batch, tmp_path):
    job = {"input": str(batch()), "output": str(tmp_path / "out.jsonl")}
    with pytest.raises(ValueError, match="the prompt of line .* tokens, and max_seq_len is 16"):
        run(**job, max_seq_len=16)
    run(**job)


BAD_LINES = {
    "broken": ('{"prompt": "a"}\n{"prompt": \n', "in.jsonl, line 2: it isn't JSON"),
    "no object": ('["a"]', r"in.jsonl, line 1: it's no object \{...\}"),
    "key": ('{"prompt": "a"}\n\n{"text": "b"}', "line 3: no 'prompt' in it; it has 'text'"),
    "kind": ('{"prompt": 5}', "line 1: 'prompt' is a text that isn't empty"),
    "empty prompt": ('{"prompt": ""}', "line 1: 'prompt' is a text that isn't empty"),
    "surrogate": ('{"prompt": "a", "x": "\\ud800"}', "line 1: half of a surrogate pair"),
    "empty": ("\n", "in.jsonl has no lines"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(run, tmp_path, case):
    text, says = BAD_LINES[case]
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says):
        run(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


MISTAKES = {
    "no output": ({"input": "a"}, "--input and --output belong together"),
    "both": ({"prompt": "a", "input": "a", "output": "b"}, "don't go with --input"),
    "two prompts": ({"prompt": "a", "prompt_file": "b"}, "choose one"),
    "no file": ({"prompt_file": "nowhere"}, "no file at nowhere"),
    "empty": ({"prompt": " "}, "the prompt is empty"),
    "n": ({"prompt": "a", "n": 9}, "n=9 is more than max_batch_size=8"),
    "seed": ({"prompt": "a", "seed": "x"}, '--seed: unable to convert "x" into int'),
    "temperature": (
        {"prompt": "a", "temperature": "x"},
        '--temperature: unable to convert "x" into float',
    ),
    "top_p": ({"prompt": "a", "top_p": 2}, "top_p=2.0 must lie between 0 and 1"),
    "stop": ({"prompt": "a", "stop": ""}, "--stop='': a string, or several as JSON"),
    "template": ({"prompt": "a", "template": TEMPLATE[:7]}, "needs {input} and then {output}"),
    "format": ({"prompt": "a", "response_format": "{"}, "isn't JSON"),
    "a text": ({"prompt": "a", "response_format": '{"type": "text"}'}, "it is one of json_object"),
    "no format": ({"prompt": "a", "response_format": "nowhere"}, "no file at nowhere"),
    "guesses": ({"prompt": "a", "speculate": "magic"}, 'Choose from: "lookup", "draft", "off"'),
    "prefixes": ({"prompt": "a", "prefix_cache_mb": -1}, "prefix_cache_mb=-1 must be at least 0"),
    "no input": ({"input": "nowhere", "output": "out"}, "no file at nowhere"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(run, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, says = MISTAKES[case]
    with pytest.raises((ValueError, FileNotFoundError, CycloptsError)) as error:
        run(**options)
    assert says in str(error.value)


def test_no_prompt_at_a_terminal(run, monkeypatch):
    stdin(monkeypatch, b"", terminal=True)
    with pytest.raises(ValueError, match="no prompt: give --prompt TEXT"):
        run()
    stdin(monkeypatch, b"\xff")
    with pytest.raises(ValueError, match="stdin isn't UTF-8"):
        run()
