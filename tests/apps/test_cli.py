"""The `llama` command as a user starts it: what it prints, and what it says of mistakes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    forked_python,
    llama_command,
    random_weights,
    torchrun,
    write_byte_tokenizer,
    write_checkpoint,
)

from llama import checkpoint
from llama.apps import cli, load
from llama.backends.options import ModelOptions
from llama.engine.params import SamplingParams
from llama.families.variants import VariantArgs

DEMO = "checkpoints/SmolLM2-135M-Instruct"


def documented(options):
    """What a docstring says of each option."""
    about = options.__doc__.partition("    Raises:")[0]
    found = re.findall(r"^        (\w+): (.*(?:\n            .*)*)", about, re.M)
    return {name: " ".join(words.split()) for name, words in found}


def llama(*arguments, command=(sys.executable, "-m", "llama"), **options):
    command = [*command, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)


def read(path) -> str:
    return Path(path).read_text()


def ok(*arguments) -> str:
    done = llama(*arguments, command=llama_command())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # it's no terminal: no progress bar
    return done.stdout


def here(capsys, *arguments):
    """In this process, since starting one takes seconds: exit code, stdout, stderr."""
    code = cli.main([*map(str, arguments)])
    return code, *capsys.readouterr()


def ok_here(capsys, *arguments) -> str:
    code, out, err = here(capsys, *arguments)
    assert (code, err) == (0, "")
    return out


# --- help ----------------------------------------------------------------------------------------


def test_help_says_what_there_is(capsys):
    text = ok("--help")
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    for code in ("0 success", "1 the command failed", "2 wrong usage", "130"):
        assert code in " ".join(text.split())
    code, text, _ = here(capsys, "convert", "--help")
    assert code == 0 and "llama convert [OPTIONS] SRC DST TO" in text
    for option in ("--mp", "--dtype", "--quant", "--tokenizer-path", "--force", "--verify"):
        assert option in text
    words = " ".join(text.replace("│", " ").split())
    assert "q8_0, q4_0, q4_1" in words and "q4_k_m" in words
    assert "[choices: meta, hf, gguf]" in text
    assert here(capsys, "convert", "-h") == (0, text, "")


HELPED = ["chat", "complete", "convert", "eval", "finetune", "inspect", "plan", "score"]


@pytest.mark.parametrize("command", HELPED)
def test_help_is_plain_text_that_fits(command, capsys):
    """On stdout, 80 columns wide, each option with the whole of what the docstring says of it."""
    code, text, err = here(capsys, command, "--help")
    assert (code, err) == (0, "") and max(map(len, text.splitlines())) <= 80
    assert not re.search(r"Optional|[\x1b│╭─]|Union|NoneType", text)
    said = " ".join(text.split())
    options = documented(cli.app[command].default_command)
    assert len(options) >= 2
    for name, about in options.items():
        assert f"-{name.replace('_', '-')}" in said or f" {name.upper()} " in said
        assert about in said


def test_help_of_shared_options_is_that_of_the_dataclasses(capsys):
    _, text, _ = here(capsys, "complete", "--help")
    said = " ".join(text.split())
    assert "Model:" in text and "Sampling:" in text
    for options in (ModelOptions, SamplingParams):
        for name, about in documented(options).items():
            shown = name not in (
                "logit_bias",
                "banned_tokens",
                "negative_prompt",
                "logits_processor",
            )
            assert (f"--{name.replace('_', '-')}" in text, about in said) == (shown, shown), name
    assert "[choices: int8, int4, dense]" in said and "[default: 0.0]" in said


def test_help_does_not_wait_for_torch():
    for arguments in (
        *([name, "--help"] for name in ("complete", "download", "finetune", "plot")),
        ["--help"],
        ["--version"],
        ["complete", "--promt"],
        ["completion", "bash"],
    ):
        code = (
            "import sys; from llama.apps.cli import main\n"
            f"main({arguments}); assert not {{'torch', 'fire', 'numpy'}} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_public_names_are_imported_when_they_are_used():
    code = (
        "import sys, llama; assert not {'torch', 'cyclopts'} & set(sys.modules)\n"
        "assert set(llama.__all__) <= set(dir(llama)) and not hasattr(llama, 'nothing')\n"
        "from llama import *; from llama import checkpoint, convert, tokenizer\n"
        "assert checkpoint.open and callable(convert) and tokenizer.Tokenizer is Tokenizer\n"
        "assert llama.model.Transformer is Transformer and llama.Llama is Llama"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_version(capsys):
    import llama as package

    assert here(capsys, "--version") == (0, f"llama {package.__version__}\n", "")


# --- what is an option, and what isn't -----------------------------------------------------------


def test_options_are_written_in_either_spelling():
    one, two = (
        cli.parse(["complete", "ckpt", *words]).args[0]
        for words in (
            ["--max_seq_len", "7", "--no-compile"],
            ["--max-seq-len=7", "--compile=false"],
        )
    )
    assert one == two and one.max_seq_len == 7 and not one.compile
    assert cli.parse(["score", "ckpt", "f", "--batch_size=2"]).args[0].max_batch_size == 2


def test_texts_are_left_as_they_are():
    for text in ("--hello", "-1", "1, 2", "['a']", "1e3", "None", "True", "a=b", "#", " x ", "@a"):
        for words in (["--prompt", text], [f"--prompt={text}"]):
            assert cli.parse(["complete", "ckpt", *words]).keywords["prompt"] == text
    for name in ("prompt_file", "input", "output"):
        for text in ("-", "-x.txt", os.fsdecode(b"caf\xe9")):
            assert cli.parse(["complete", "c", f"--{name}", text]).keywords[name] == text
    assert cli.parse(["complete", "2024"]).args[0].ckpt_dir == "2024"
    stops = cli.parse(["complete", "c", "--stop", "a", "--stop", "-", "--stop", '["b"]'])
    assert stops.keywords["stop"] == ["a", "-", '["b"]']


USAGE = {  # exit code 2
    "typo": ("complete c --promt x", "Unknown option: --promt. Did you mean --prompt?"),
    "short": ("complete c -n 2", "Unknown option: -n"),
    "short output": ("complete c -o x", "Unknown option: -o"),
    "stray word": ("complete c stray", "error: unexpected argument 'stray': a text with spaces"),
    "stray word of inspect": ("inspect c 2048", "error: unexpected argument '2048': "),
    "command": ("complet c", 'Unknown command "complet". Did you mean "complete"?'),
    "a switch's value": (
        "complete c --compile false",
        "error: --compile false: write --no-compile, or --compile=false",
    ),
    "a value too much": (
        "finetune c --out o --no-shard true",
        "error: --no-shard true: write --shard, or --shard=true",
    ),
    "no checkpoint": ("complete", "requires an argument"),
    "no value": ("complete c --seed", "--seed requires an argument"),
    "ray": (
        "batch --ray in.jsonl out.jsonl",
        "argument. (--ray takes the next word: write it last",
    ),
    "choice": ("complete c --quantize int9", 'Choose from: "int8", "int4"'),
    "format": ("convert a b --to onnx", 'Choose from: "meta", "hf", "gguf"'),
    "number": ("complete c --seed x", 'unable to convert "x" into int'),
    "range": ("complete c --top_p 2", "top_p=2.0 must lie between 0 and 1"),
    "device": ("complete c --device gpu", "device='gpu': choose one of cuda, mps, cpu"),
    "hidden": ("complete c --logits_processor x", "Unknown option: --logits_processor"),
    "switch": ("convert a b hf --force=5", "--force"),
    "shell": ("completion tcsh", 'Choose from: "bash", "zsh", "fish"'),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(case, capsys):
    text, says = USAGE[case]
    code, out, err = here(capsys, *text.split())
    assert (code, out) == (2, "") and says in err
    assert re.fullmatch(r"error: [^\n]+\n", err)


# --- completion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_both_spellings(shell):
    script = ok("completion", shell)
    dashes = "" if shell == "fish" else "--"
    for name in ("max-seq-len", "max_seq_len", "tokenizer_path", "response-format"):
        assert re.search(rf"{dashes}\b{name}\b", script), name
    assert all(name in script for name in (*cli.COMMANDS, "int8", "lookup"))
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes(tmp_path):
    (tmp_path / "script").write_text(ok("completion", "bash"))
    code = """
        source ./script
        try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _llama; echo "${COMPREPLY[@]}"; }
        try llama compl; try llama complete c --max_s; try llama complete c --quantize int
    """
    done = subprocess.run(
        ["bash", "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert [set(line.split()) for line in done.stdout.splitlines()] == [
        {"complete", "completion"}, {"--max_seq_len"}, {"int8", "int4"}
    ]  # fmt: skip


TABS = {  # what an interactive shell makes of words that end with Tab
    "inspect a": ["inspect", "a folder/"],
    "finetune dial": ["finetune", "dialogs.jsonl"],
    "chat c --tokenizer-path a": ["chat", "c", "--tokenizer-path", "a folder/"],
    "complete c --prompt-file dial": ["complete", "c", "--prompt-file", "dialogs.jsonl"],
    "complete c --input=dial": ["complete", "c", "--input=dialogs.jsonl"],
    "complete c --quantize de": ["complete", "c", "--quantize", "dense"],
    "complete c --max-s": ["complete", "c", "--max-seq-len"],
    "pla": ["plan"],  # and not the folder
}


def test_bash_completes_names_of_files_where_there_are_no_choices(tmp_path):
    for folder in ("a folder", "plan"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dialogs.jsonl").touch()
    show = """llama() { printf '%s\\0' "$@" >> shown; echo >> shown; }"""
    (tmp_path / "rc").write_text(f"{ok('completion', 'bash')}\n{show}\n")
    subprocess.run(
        ["bash", "--noprofile", "--rcfile", "rc", "-i"], env={**os.environ, "HOME": str(tmp_path)},
        input="".join(f"llama {words}\t\n" for words in TABS), cwd=tmp_path, text=True,
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    shown = (tmp_path / "shown").read_text().splitlines()
    assert [line.split("\0")[:-1] for line in shown] == [*TABS.values()]


def test_completion_is_installed_for_the_shell(tmp_path):
    home = {**os.environ, "HOME": str(tmp_path), "BASH_VERSION": "5", "ZSH_VERSION": ""}
    home.pop("XDG_DATA_HOME", None)
    done = llama("--install-completion", env=home)
    path = done.stdout.partition(":")[0]
    assert done.returncode == 0 and path.startswith(str(tmp_path))
    assert read(path) + "\n" == ok("completion", "bash")


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "no source": ("convert nowhere OUT hf", "no checkpoint at nowhere"),
    "source a number": ("convert 2024 OUT hf", "no checkpoint at 2024"),
    "source like a float": ("convert 1e3 OUT hf", "no checkpoint at 1e3"),
    "source like a tuple": ("convert a,b OUT hf", "no checkpoint at a,b"),
    "source like a comment": ("inspect a#b", "no checkpoint at a#b"),
    "no checkpoint": ("convert tests OUT hf", "tests holds no checkpoint"),
    "destination exists": ("convert SRC README.md gguf", "README.md exists: choose another name"),
    "shards of gguf": ("convert SRC OUT --to gguf --mp 3", "model_parallel_size=3 is for Meta's"),
    "too many shards": ("convert SRC OUT meta --mp 5", "model_parallel_size 5 doesn't divide"),
    "quant": ("convert SRC OUT gguf --quant q5_k", "'q5_k' can't be written; choose one of f32"),
    "quant for hf": ("convert SRC OUT hf --quant q8_0", "quant='q8_0' is for GGUF only"),
    "tokenizer": ("convert SRC OUT hf --tokenizer_path nowhere", "no tokenizer file at nowhere"),
    "nothing to inspect": ("inspect nowhere", "no checkpoint at nowhere"),
    "no checkpoint to inspect": ("inspect LICENSE", "LICENSE isn't a GGUF file"),
    "a file of a checkpoint": ("inspect PARAMS", "a file of a checkpoint: name its directory"),
    "no answer": ("chat SRC --max_gen_len -3", "max_gen_len=-3 must be at least 1"),
    "no draft": ("chat SRC --speculate draft", "needs a draft model"),
    "no server": ("bench load --url http://127.0.0.1:9", "http://127.0.0.1:9: [Errno "),
    "no port": ("bench load http://127.0.0.1:80x0", "80x0'; give the address that `llama serve`"),
    "no address": ("bench load --url 127.0.0.1:1", "url='127.0.0.1:1': give http://HOST:PORT"),
    "no tokens": ("inspect SRC --max_seq_len 0", "max_seq_len=0 must be at least 1"),
}


@pytest.mark.parametrize("command", ["complete --prompt", "chat --system"])
def test_arguments_that_are_not_utf_8_are_refused(tiny_dir, command):
    name, option = command.split()
    done = llama(name, str(tiny_dir), option, os.fsdecode(b"caf\xe9"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "an argument isn't UTF-8: byte 3" in done.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tiny_dir, tmp_path, monkeypatch, capsys, mistake):
    """In this process, since starting one takes seconds; the next test starts some."""
    text, message = MISTAKES[mistake]
    replaced = {"SRC": str(tiny_dir), "OUT": str(tmp_path / "out")}
    replaced["PARAMS"] = f"{tiny_dir}/params.json"
    monkeypatch.chdir(ROOT)
    code, out, err = here(capsys, *(replaced.get(word, word) for word in text.split()))
    assert (code, out) == (1, "") and message in err
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_with_1_and_no_traceback(tiny_dir, tmp_path, capsys):
    commands = [
        ("convert", "nowhere", tmp_path / "out", "--to", "hf"),
        ("convert", tiny_dir, ROOT / "README.md", "--to", "gguf"),
        ("convert", tiny_dir, tmp_path / "out", "--to", "gguf", "--quant", "q9"),
    ]
    done = llama(*commands[0])  # as a process, once
    found = [(done.returncode, done.stdout, done.stderr)]
    for code, out, err in found + [here(capsys, *command) for command in commands]:
        assert code == 1 and out == ""
        assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert list(tmp_path.iterdir()) == []


def test_wrong_values_of_convert(tiny_dir, tmp_path, capsys):
    for words, says in (
        ("--to onnx", '"onnx" for TO. Choose from: "meta", "hf", "gguf"'),
        ("meta --mp two", 'Invalid value for --mp: unable to convert "two" into int'),
        ("gguf --quant", "--quant requires an argument"),
        ("hf --dtype int8", 'Invalid value "int8" for --dtype. Choose from: "bf16"'),
        ("hf --dtype 16", 'Invalid value "16" for --dtype. Choose from: "bf16"'),
        ("hf --verfy", "Unknown option: --verfy. Did you mean --verify?"),
    ):
        code, out, err = here(capsys, "convert", tiny_dir, tmp_path / "out", *words.split())
        assert (code, out) == (2, "") and says.replace("for TO", "for --to") in err, err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_a_line(tiny_dir, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama.checkpoint.convert.convert", interrupted)
    code, out, err = here(capsys, "convert", tiny_dir, tmp_path / "o", "hf")
    assert (code, out) == (130, "")
    assert err == "interrupted: nothing was written under the final name\n"


@pytest.mark.parametrize("library", ["libtorch_cpu", "_multiarray_umath"])
def test_ctrl_c_while_torch_is_imported_is_a_line(library, tiny_dir):
    command = [sys.executable, "-m", "llama", "complete", str(tiny_dir), "--prompt", "a"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and library not in read(f"/proc/{process.pid}/maps"):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@contextmanager
def replying(text):
    """The address of a server that answers all with this text; None: with nothing, ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    if text is not None:
                        connection.sendall(text)
                        connection.shutdown(socket.SHUT_WR)

        kept = []
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", kept


def test_bench_names_the_address_of_what_is_no_server(capsys):
    for text, says in ((b"SSH-2.0\r\n", "SSH-2.0"), (b"HTTP/1.1 404 No\r\n\r\na\nb", "404: a b")):
        with replying(text) as (url, _):
            code, out, err = here(capsys, "bench", "load", url, "--requests=2")
        assert (code, out) == (1, "") and re.fullmatch(rf"error: {url}[^\n]+\n", err)
        assert says in err and ("`llama serve`" in err or "404" in err)


def test_bench_takes_the_address_that_clients_take(monkeypatch):
    given = []
    monkeypatch.setattr(load, "run", lambda url, *_, **options: given.append(url) or {})
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        cli.parse(["bench", "load", url])()
    assert given == ["http://a:1"] * 4


def test_bench_counts_what_came(monkeypatch):
    """A server that doesn't know ignore_eos ends early, and says so in a chunk without text."""
    monkeypatch.setattr(load, "summary", lambda found, *_: {"found": found})
    chunk, [job] = (
        'data:{"choices": [{"text": "%s", "finish_reason": %s}]}\n\n',
        load.make_jobs(1, 1, 1),
    )
    for reason, tokens in (("stop", 3), ("length", job.max_tokens)):
        text = "HTTP/1.1 200 OK\r\n\r\n" + chunk % ("a", "null") * 3 + chunk % ("", f'"{reason}"')
        with replying((text + "data: [DONE]\n\n").encode()) as (url, _):
            [timing] = load.run(url, [job], 1)["found"]
        assert (timing.tokens, len(timing.between)) == (tokens, 2)


def test_ctrl_c_ends_a_bench_that_waits():
    """For answers, and for the time of the next request."""
    with replying(None) as (url, connections):
        process = subprocess.Popen(
            [sys.executable, "-m", "llama", "bench", "load", url, "--rate=0.01"], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and not connections:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.slow
# Output is buffered unless PYTHONUNBUFFERED is set: errors then show at the last flush.
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_nobody_reads_is_no_error(tiny_dir, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "llama", "inspect", str(tiny_dir)]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_a_line(unbuffered):
    command = [sys.executable, "-m", "llama", "--help"]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert re.fullmatch("error: .*No space left.*\n", done.stderr.decode())


@pytest.mark.parametrize("argument, code", [("--version", 0), ("--nothing", 2)])
def test_it_ends_after_threads_and_handlers(argument, code):
    """With its exit code and all that they print, but modules aren't taken down."""
    script = """
import atexit, sys, threading
from llama.__main__ import main

class Left:
    def __del__(self):
        print("taken down")

def late():
    threading.main_thread().join()
    print("thread")

left, code = Left(), main()
atexit.register(print, "handler", end="")
threading.Thread(target=late).start()
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, argument], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code and done.stdout.endswith("thread\nhandler"), done


@pytest.mark.slow
def test_closed_streams(tiny_dir):
    run = f"{sys.executable} -m llama complete {tiny_dir} --device cpu"
    for closed, code, says in (
        (
            "<&-",
            1,
            "error: the prompt is empty: give --prompt TEXT, --prompt_file FILE, or stdin\n",
        ),
        ("--prompt a --max_gen_len 1 >&- 2>&-", 0, ""),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{run} {closed}"], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, "", says)


@pytest.mark.slow
def test_what_is_not_utf_8_is_refused_by_chat_as_by_complete(tiny_dir):
    for command in ("chat", "complete"):
        done = subprocess.run(
            [sys.executable, "-m", "llama", command, str(tiny_dir), "--device=cpu"], cwd=ROOT,
            input=b"caf\xe9\n", capture_output=True, timeout=120, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.splitlines()[-1] == b"error: stdin isn't UTF-8: byte 3 can't be read"
        assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_ranks_say_it_once(tmp_path):
    done = llama("inspect", tmp_path, command=[*torchrun(2), "-m", "llama"])
    assert done.returncode == 1
    assert done.stderr.count(f"error: {tmp_path} holds no checkpoint") == 1


@pytest.mark.slow
def test_faults_of_a_plain_process_name_no_rank():
    code = (
        "import llama.layers.parallel as parallel, sys; from llama.apps import cli\n"
        "parallel.initialize(device='cpu')\n"
        "cli.parse = lambda words: lambda: 1 / 0\n"
        "sys.exit(cli.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in done.stderr and "rank0" not in done.stderr


# --- what it does --------------------------------------------------------------------------------


def test_convert_there_and_back(tiny_dir, tmp_path, capsys):
    """From two shards to Hugging Face's format, to GGUF, and to four shards."""
    meta = write_checkpoint(tmp_path / "meta", TINY, mp=2)
    hf, quantized, back = (tmp_path / name for name in ("hf", "q.gguf", "back"))
    text = ok("convert", meta, hf, "--to", "hf", "--verify")
    assert re.fullmatch(r"\S+/hf: 0\.5\d MB, verified\n", text)
    names = {path.name for path in hf.iterdir()}
    assert names == {"config.json", "model.safetensors", "generation_config.json",
                     "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    text = ok_here(capsys, "convert", hf, quantized, "--to=gguf", "--quant=q8_0", "--verify")
    assert re.fullmatch(r"\S+q\.gguf: 0\.1\d MB, verified\n", text)
    assert checkpoint.open(quantized).stored_as("output.weight") == "Q8_0"
    ok_here(capsys, "convert", hf, back, "meta", "--mp", "4", "--dtype", "bf16")
    assert (back / "tokenizer.model").read_bytes() == (meta / "tokenizer.model").read_bytes()
    assert sorted(path.name for path in back.glob("*.pth"))[-1] == "consolidated.03.pth"
    name, weight = "norm.weight", random_weights(TINY)["norm.weight"]
    assert torch.equal(checkpoint.open(back).read(name, 0, 0, 64), weight.bfloat16())
    assert f"{back}" in ok_here(capsys, "convert", hf, back, "--to", "meta", "--force")
    assert torch.equal(checkpoint.open(back).read(name, 0, 0, 64), weight)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_tokenizer_from_elsewhere(tmp_path, capsys):
    meta = write_checkpoint(tmp_path / "meta", TINY)
    (meta / "tokenizer.model").rename(tmp_path / "elsewhere")
    hf = tmp_path / "hf"
    ok_here(capsys, "convert", meta, hf, "hf", "--tokenizer-path", tmp_path / "elsewhere")
    expected = write_byte_tokenizer(tmp_path / "expected").read_bytes()
    ok_here(capsys, "convert", hf, tmp_path / "back", "meta")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == expected


def test_inspect_of_the_demo_model(smollm2_path):
    lines = ok("inspect", DEMO).splitlines()
    assert lines[:3] == [
        f"{DEMO}/{smollm2_path.name}: GGUF, 134,515,008 parameters",
        "stored as: Q8_0 30.08 MB, F32 0.14 MB, Q4_1 66.36 MB",
        f"tokenizer: {DEMO}/{smollm2_path.name}",
    ]
    assert lines[3] == "network: llama, computed by the CPU kernels"
    for field in ("dim = 576", "n_heads = 9", "n_kv_heads = 3", "norm_eps = 1e-05",
                  "rope_theta = 100000.0", "tied_embeddings = True"):  # fmt: skip
        assert f"  {field}" in lines
    table = lines[lines.index("memory per rank with a cache of 8 rows of 2048 tokens:") + 1 :]
    assert [re.match(r" +(\d+) ranks? +(.+): w", line).groups() for line in table] == [
        (ranks, kind) for ranks in ("1", "3", "9") for kind in ("bf16", "fp32", "as stored, bf16")
    ]
    assert table[1] == "    1 rank  fp32: weights 0.54 GB + cache 0.75 GB"
    assert table[2] == "    1 rank  as stored, bf16: weights 96.51 MB + cache 0.38 GB"


def test_inspect_names_what_differs_from_llama(tmp_path):
    args = VariantArgs(**vars(TINY) | {"no_rope_layers": (1,), "attention_bias": True})
    lines = ok("inspect", write_checkpoint(tmp_path / "meta", args)).splitlines()
    assert lines[3].startswith("network: variant of Llama, computed on a CPU by plain layers")
    assert "head_dim is 8" in lines[3]
    assert {"  no_rope_layers = (1,)", "  attention_bias = True"} <= {*lines}
    assert not any("as stored, bf16" in line for line in lines)


def test_inspect_of_metas_directory(tmp_path):
    path = write_checkpoint(tmp_path / "meta", TINY, mp=4)
    lines = ok("inspect", path, "--max_batch_size", "2", "--max-seq-len=100").splitlines()
    count = sum(weight.numel() for weight in random_weights(TINY).values())
    assert lines[:3] == [
        f"{path}: Meta, {count:,} parameters",
        f"stored as: F32 {4 * count / 1e6:.2f} MB",
        f"tokenizer: {path / 'tokenizer.model'}",
    ]
    cache = 2 * TINY.n_layers * TINY.n_kv_heads * TINY.head_dim * 2 * 100 * 4
    assert "memory per rank with a cache of 2 rows of 100 tokens:" in lines
    assert f"weights {4 * count / 1e6:.2f} MB + cache {cache / 1e6:.2f} MB" in lines[-7]
    assert lines[-1].startswith("    8 ranks fp32: ")


def test_inspect_says_what_is_wrong(tmp_path):
    path = write_checkpoint(tmp_path / "meta", TINY)
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    done = llama("inspect", path, command=llama_command())
    assert done.returncode == 1 and "lacks layers.2" in done.stderr
    assert "n_layers = 3" in done.stdout and "Traceback" not in done.stderr


def test_what_is_optional_is_missed_only_where_it_is_used(tiny_dir, tmp_path):
    """Without an editor and the extra [eval], help and a chat in a pipe work; eval names it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; lacking = {'lm_eval': None, 'prompt_toolkit': None}\n"
        "assert not sys.modules.keys() & lacking\n"
        "sys.modules.update(lacking)\n"
        "from llama.apps.cli import main; sys.exit(main())"
    )

    def run(*arguments):
        command = [*forked_python(), *map(str, (script, *arguments))]
        return subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )

    helped = run("--help")
    assert helped.returncode == 0 and "eval" in helped.stdout
    assert run("chat", tiny_dir, "--device", "cpu").returncode == 0
    done = run("eval", tiny_dir, "--tasks", "x")
    assert done.returncode == 1 and done.stderr.startswith("error: llama eval needs lm_eval")
    assert "pip install 'llama-reference[eval]'" in done.stderr and "Traceback" not in done.stderr
