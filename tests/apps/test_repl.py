"""`llama chat`: what commands do to a session, what terminals show, and both together in a pty."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pexpect
import pytest
from conftest import ROOT, forked_python, llama_command, torchrun
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from llama import Event, SamplingParams
from llama.apps import cli, repl
from llama.apps.terminal import Plain, Rich, printable
from llama.engine.predictions import with_calls

PATHS = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'apps'}"  # for what is run in a process
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one two "}


class FakeLlama:
    """Answers "one two ", a word per token; a message of n words is n tokens long."""

    def __init__(self, words=("one ", "two "), reason="stop", max_seq_len=32):
        self.words, self.reason, self.calls = words, reason, []
        self.model = SimpleNamespace(params=SimpleNamespace(max_seq_len=max_seq_len))
        self.formatter = SimpleNamespace(
            encode_dialog_prompt=lambda dialog, tools=(): [
                word for message in dialog for word in message["content"].split()
            ]
        )

    def stream_chat(self, dialogs, max_gen_len=None, *, params, should_stop, speculate, tools):
        self.calls.append((dialogs, max_gen_len, params))
        guessed = {"proposed": 5, "accepted": 3, "passes": 2} if speculate else None
        tokens = len(self.formatter.encode_dialog_prompt(dialogs[0]))
        if tokens > self.model.params.max_seq_len:
            raise ValueError(f"prompt 0 has {tokens} tokens: shorten it")
        if tokens == self.model.params.max_seq_len:
            yield Event(0, 0, None, "", finish_reason="length")
            return
        for i, word in enumerate(self.words):
            if should_stop():
                yield Event(0, 0, 7, word, finish_reason="stop")
                return
            last = i == len(self.words) - 1
            if last:
                yield Event(0, 0, 7, word, finish_reason=self.reason, speculation=guessed)
            else:
                yield Event(0, 0, 7, word)


@pytest.fixture
def session() -> repl.Session:
    return repl.Session(FakeLlama())


def test_an_empty_answer_is_one():
    """A stop token as the first: the message stays in the dialog."""
    llama = FakeLlama()
    llama.stream_chat = lambda *args, **options: iter([Event(0, 0, None, "", finish_reason="stop")])
    session = repl.Session(llama)
    assert say(session, "Hi") == "" and session.note == "an empty answer"
    assert [message["role"] for message in session.dialog] == ["user", "assistant"]


def say(session, line, interrupted=lambda: False) -> str:
    assert session.take(line).wants_answer
    return "".join(session.answer(interrupted))


def refused(session, line) -> str:
    """What is wrong with a line, which then has changed nothing."""
    before = [*session.dialog], session.params
    with pytest.raises(ValueError) as caught:
        say(session, line)
    assert (session.dialog, session.params) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the session ---------------------------------------------------------------------------------


def test_a_turn_is_sent_to_all_ranks_and_added():
    sent = []
    session = repl.Session(FakeLlama(), SamplingParams(0.0), "Be brief.", 9, sent.append)
    assert say(session, "Hi\n") == "one two "
    system = {"role": "system", "content": "Be brief."}
    assert sent == [([system, USER], SamplingParams(0.0), 9, None, [])]
    assert session.llama.calls == [([[system, USER]], 9, SamplingParams(0.0))]
    assert session.dialog == [system, USER, ANSWER] and session.note == ""


def test_slashes_and_empty_lines(session):
    assert session.take("  \n") == repl.Reply()
    say(session, "//etc/hosts is what?")
    assert session.dialog[0]["content"] == "/etc/hosts is what?"
    assert "no command /etc/hosts: there are /help, /system" in refused(session, "/etc/hosts is")
    assert session.take("a lone \udce4 byte").wants_answer
    assert session.dialog[-1]["content"] == "a lone ? byte"


def test_help_names_every_command(session):
    for name in repl.COMMANDS:
        assert f"/{name} " in session.take("/help").text


def test_system(session):
    assert session.take("/system").text == "no system message"
    session.take("/system Be brief.")
    say(session, "Hi")
    session.take("/system Be\nlong.")
    assert session.take("/system").text == "Be\nlong."
    assert [message["role"] for message in session.dialog] == ["system", "user", "assistant"]
    session.take("/reset")
    assert session.dialog == [{"role": "system", "content": "Be\nlong."}]
    session.take("/system -")
    assert session.dialog == []


def test_undo_and_regenerate(session):
    for command in ("/undo", "/regenerate"):
        assert "nothing has been said yet" in refused(session, command)
    say(session, "Hi")
    say(session, "And?")
    session.llama.words = ("three",)
    assert say(session, "/regenerate") == "three"
    assert session.dialog[2:] == [
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "three"},
    ]  # fmt: skip
    assert session.take("/undo").text == "taken back: And?"
    assert session.dialog == [USER, ANSWER]
    session.llama.model.params.max_seq_len = 0
    refused(session, "/regenerate")  # the old answer is still there
    session.take("/undo")
    assert session.dialog == []


def test_interrupted_answers_stay(session):
    asked = iter([False, True])
    session.llama.words = ("one ", "two ", "three ")
    assert say(session, "Hi", lambda: next(asked)) == "one two "
    assert session.dialog == [USER, ANSWER] and session.note == "interrupted"
    say(session, "Go on")
    assert session.note == ""


def test_answers_that_are_cut_off_say_why(session):
    session.llama.reason = "length"
    say(session, "Hi")
    assert session.note == "cut off: max_gen_len is reached"
    session.llama.model.params.max_seq_len = 6
    say(session, "Go")
    assert session.note == "cut off: the context is full"
    session.llama.model.params.max_seq_len = 7
    assert "7 tokens fill the context: /undo" in refused(session, "Ah")
    assert "8 tokens: shorten it" in refused(session, "And then?")


def test_save_and_load(session, tmp_path, monkeypatch):
    path = tmp_path / "a dialog.json"
    assert "nothing to save" in refused(session, f"/save {path}")
    say(session, "Grüß Gott")
    said = session.dialog
    assert session.take(f"/save {path}").text == f"2 messages saved to {path}"
    session.take(f"/save {path}")  # again, over its own file
    assert json.loads(path.read_text("utf-8")) == said and list(tmp_path.iterdir()) == [path]
    session.take("/reset")
    monkeypatch.setenv("HOME", str(tmp_path))
    session.take("/load ~/a dialog.json")
    assert session.dialog == said


def test_only_calls_are_answered_with_a_tools_result(session, tmp_path):
    for calls, role in (([], "user"), ([{"name": "f", "arguments": {}}], "tool")):
        dialog = [USER, {**ANSWER, "tool_calls": calls}]
        (tmp_path / "dialog.json").write_text(json.dumps(dialog))
        session.take(f"/load {tmp_path / 'dialog.json'}")
        session.take("And then?")
        assert session.dialog[-1]["role"] == role


def test_save_that_fails_leaves_the_old_file(session, tmp_path, monkeypatch):
    path = tmp_path / "dialog.json"
    say(session, "Hi")
    session.take(f"/save {path}")
    old = path.read_bytes()

    def full(self, *_):
        self.write_bytes(b"[{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        assert "No space left" in refused(session, f"/save {path}")
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "isn't JSON"),
        ("\xff", "isn't JSON"),
        ("[" * 100_000, "isn't JSON"),
        ("{}", "holds no list of messages"),
        ("[]", "is empty"),
        ('[{"role": "assistant", "content": "Hi"}]', "begins with the assistant"),
        ('[{"role": "user"}]', "a message is"),
    ],
)
def test_files_that_are_no_dialogs(session, tmp_path, content, message):
    path = tmp_path / "file"
    path.write_text(content, "latin-1")
    say(session, "Hi")
    assert message in refused(session, f"/load {path}")
    assert "is no dialog: choose another name" in refused(session, f"/save {path}")
    assert path.read_text("latin-1") == content


def test_paths_that_lead_nowhere(session, tmp_path):
    say(session, "Hi")
    assert "nothing: No such file" in refused(session, f"/load {tmp_path / 'nothing'}")
    assert f"{tmp_path}: Is a directory" in refused(session, f"/load {tmp_path}")
    assert "No such file" in refused(session, f"/save {tmp_path / 'nothing' / 'file'}")
    assert "File name too long" in refused(session, f"/save {'x' * 300}")
    for command in ("save", "load"):
        assert f"/{command} takes the name" in refused(session, f"/{command}")


def test_params(session):
    assert session.take("/params").text.startswith("temperature=0.6 top_p=0.9 top_k=0 ")
    session.take("/params temperature=0 top_k=40")
    assert session.params == SamplingParams(temperature=0.0, top_k=40)
    assert "no_repeat_ngram_size=0" in session.take("/params").text
    say(session, "Hi")
    assert session.llama.calls[0][2] == session.params
    assert "no parameter 'heat': there are temperature" in refused(session, "/params heat=1")
    assert "no parameter 'logits_processor'" in refused(session, "/params logits_processor=1")
    for pair in ("top_k=1.5", "top_p=much", "top_p=", "top_p"):
        assert f"{pair}: write top_" in refused(session, f"/params temperature=1 {pair}")
    assert "top_p=2.0 must lie between 0 and 1" in refused(session, "/params top_k=1 top_p=2")


def test_stats(session):
    assert session.take("/stats").text == "no answer yet"
    say(session, "Hi there")
    text = session.take("/stats").text
    assert text.startswith("2 tokens: first after 0.00 s, then ")
    assert text.endswith(" tokens/s; context 4 / 32")
    guessing = repl.Session(FakeLlama(), speculate="lookup")
    say(guessing, "Hi there")
    assert " tokens/s; 3 of 5 proposed tokens accepted; context " in guessing.take("/stats").text


def test_calls_are_shown_as_they_come_and_the_next_line_is_their_result():
    class Calls(FakeLlama):
        def stream_chat(self, *args, tools, **options):
            return with_calls(super().stream_chat(*args, tools=tools, **options), tools)

    words = ["Look: ", "<function=", 'f>{"a', '": 1', "}</function>", "\n"]
    session = repl.Session(Calls(words), tools=[{"name": "f"}])
    session.take("Hi")
    shown = [piece for piece in session.answer() if piece]
    assert shown == ["Look:", '\n\n    f {"a', '": 1', "}"]
    call = {"name": "f", "arguments": {"a": 1}}
    said = {"role": "assistant", "content": "Look:", "tool_calls": [call]}
    assert session.dialog == [USER, said] and session.note == "a call: write its result"
    session.llama.words = ['{"name": "f"}']
    assert say(session, "42") == '{"name": "f"}'
    assert session.dialog[2] == {"role": "tool", "content": "42"}
    assert "can't be read: the arguments for 'f'" in session.note
    session.llama.words = ["Well."]
    assert say(session, "And?") == "Well." and session.dialog[4]["role"] == "user"


@pytest.mark.parametrize("content", ["{", "3", '[{"name": ""}]', "\xff"])
def test_files_that_hold_no_tools(tmp_path, content):
    path = tmp_path / "tools.json"
    with pytest.raises(FileNotFoundError, match="no such file; write a JSON list"):
        repl.read_tools(str(path))
    path.write_text(content, "latin-1")
    with pytest.raises(ValueError, match="tools.json holds no list of tools' JSON schemas: "):
        repl.read_tools(str(path))
    path.write_text('[{"name": "f"}]')
    assert repl.read_tools(str(path))[0]["function"] == {"name": "f"}


def test_exit(session):
    assert session.take("/exit").leaves


# --- the terminal --------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path):
    """(what sends keys, a Rich terminal that reads them and prints to its console's file)."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        terminal = Rich(tmp_path / "history")
        terminal.console = Console(file=io.StringIO(), width=60, height=10, force_terminal=True)
        yield pipe.send_text, terminal


@pytest.mark.parametrize(
    "typed, read",
    [
        ("Hi\r", "Hi"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("\x1b[200~one\r\ntwo\nthree\x1b[201~ four\r", "one\ntwo\nthree four"),
        ("\x04", None),
    ],
)
def test_keys(keys, typed, read):
    send, terminal = keys
    send(typed)
    assert terminal.read() == read


def test_ctrl_c_at_the_prompt(keys):
    send, terminal = keys
    send("half\x03")
    with pytest.raises(KeyboardInterrupt):
        terminal.read()


def test_history_stays(keys, tmp_path):
    send, terminal = keys
    send("remember\r")
    terminal.read()
    again = Rich(tmp_path / "history")
    send("\x1b[A\r")
    assert again.read() == "remember"
    assert (tmp_path / "history").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("place", ["/proc/history", "/", "/dev/null/history"])
def test_history_that_cannot_be_kept_is_no_error(keys, place):
    send, _ = keys
    terminal = Rich(place)
    send("Hi\r")
    assert terminal.read() == "Hi"


def test_history_is_by_default_where_state_belongs(keys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Rich()
    assert (tmp_path / "state" / "llama" / "history").is_file()


MARKDOWN = """# Title
First *paragraph*
of two lines with <b>tags</b>.

1. one

   more of one
2. two
   - inner

| a | b |
|---|---|
| 1 | 2 |

```python
def f():

    return 1
```
Setext
---
<div>
#hashtag
- [link](https://example.com)

    code
"""


def test_finished_blocks_never_change(keys):
    """Cut while it comes in, character by character, a text has the blocks of the whole."""
    _, terminal = keys
    kinds, tail, cuts = [], "", 0
    for character in MARKDOWN:
        done, tail = terminal.split(tail + character)
        cuts += bool(done)
        kinds += [token.type for token in terminal.parser.parse(done)]
    kinds += [token.type for token in terminal.parser.parse(tail)]
    assert kinds == [token.type for token in terminal.parser.parse(MARKDOWN)] and cuts > 5


def shown(terminal) -> str:
    """The text in what was printed, without styles."""
    from rich.text import Text

    return Text.from_ansi(terminal.console.file.getvalue()).plain


def test_answers_are_rendered_whole(keys):
    """However much longer than the screen, and with nothing that a terminal would obey."""
    _, terminal = keys
    terminal.answer(iter([*MARKDOWN, "```\n", *(f"line {i}\n" for i in range(40)), "```"]))
    lines = [line.strip() for line in shown(terminal).splitlines()]
    assert "First paragraph" in lines and "of two lines with <b>tags</b>." in lines
    assert "<div>" in lines and "• link (https://example.com)" in lines
    assert [line for line in lines if line.startswith("line")][-40:] == [
        f"line {i}" for i in range(40)
    ]
    assert printable("\x1b[2J\x9b2J\r\n\ta\x07") == "�[2J�2J\n\ta�"


def test_pipes_get_plain_text(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path += {PATHS.split(':')}\n"
        "from test_repl import FakeLlama; from llama.apps import repl, terminal\n"
        "repl.talk(repl.Session(FakeLlama()), terminal.pick_terminal())"
    )
    lines = "Hi\nof two \\\nlines\n/nope\n/undo\n\nlast"
    done = subprocess.run(
        [*forked_python(), str(script)], input=lines, capture_output=True, text=True, timeout=60,
        cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "one two \none two \ntaken back: of two \nlines\none two \n"
    assert done.stderr.startswith("no command /nope") and done.returncode == 0


def test_a_pipes_messages_without_an_answer_are_counted(monkeypatch, capsys):
    """The others are answered; commands that don't exist aren't messages."""
    lines = iter(["/nope", "Hi", "word " * 40, "Hi", "/exit"])
    terminal = Plain()
    monkeypatch.setattr(terminal, "read", lambda: next(lines))
    assert repl.talk(repl.Session(FakeLlama()), terminal) == 1
    printed = capsys.readouterr()
    assert printed.out == "one two \none two \n" and "shorten it" in printed.err


def test_chat_in_a_pipe_ends_with_1_where_an_answer_is_missing(tiny_dir):
    chat = ["chat", tiny_dir, "--device=cpu", "--max-seq-len=64", "--max-gen-len=2"]
    for text, code, says in (("Hi\n", 0, ""), ("a" * 99 + "\nHi\n", 1, "error: 1 of the ")):
        done = subprocess.run(
            [*llama_command(), *map(str, chat)], input=text, capture_output=True, text=True,
            timeout=120, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == code and says in done.stderr, done


def test_a_dumb_terminal_gets_plain_text_and_ctrl_c_as_a_signal(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time; from test_repl import FakeLlama; from llama.apps import repl, terminal\n"
        "class Words(FakeLlama):\n"
        "    def stream_chat(self, *args, **kwargs):\n"
        "        self.words = [f'w{i}\\x1b ' for i in range(1000)]\n"
        "        for event in super().stream_chat(*args, **kwargs):\n"
        "            time.sleep(0.02); yield event\n"
        "repl.talk(repl.Session(Words(max_seq_len=5000)), terminal.pick_terminal())"
    )
    environment = {**os.environ, "PYTHONPATH": PATHS, "TERM": "dumb"}
    child = pexpect.spawn(
        sys.executable, [str(script)], env=environment, timeout=60, encoding="utf-8"
    )
    child.expect("> ")
    child.sendline("Hi")
    child.expect("w3\ufffd ")
    child.send("\x03")
    child.expect(r"\(interrupted\)")
    child.expect("> ")
    child.send("\x03")
    child.expect("/exit or Ctrl-D leaves")
    child.sendline("/undo")
    child.expect("taken back: Hi")
    leave(child, "\n")


@pytest.fixture
def dumb(monkeypatch):
    """(the other end of a terminal that is standard input, what reads lines from it)."""
    keyboard, own = os.openpty()
    with open(own) as lines, open(keyboard, "wb", buffering=0) as keys:
        monkeypatch.setattr(sys, "stdin", lines)
        yield keys, Plain()


def test_ctrl_c_just_before_the_read_is_not_lost(dumb, capsys):
    """Before the system's read(), but too late for Python to see it: read() isn't interrupted.

    It is so too where another thread is the one that gets the signal.
    """
    keys, terminal = dumb
    ended = threading.Event()

    def press():
        while "> " not in capsys.readouterr().err:
            time.sleep(0.01)
        time.sleep(0.3)  # until the main thread waits for a line
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        if not ended.wait(240):
            keys.write(b"too late\n")

    for _ in range(2):  # what the first one left doesn't matter
        ended.clear()
        thread = threading.Thread(target=press)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                terminal.read()
        finally:
            ended.set()
            thread.join()
    keys.write(b"one \\\ntwo\n")
    assert terminal.read() == "one \ntwo"
    keys.write(b"\x04")
    assert terminal.read() is None


def test_other_signals_do_not_end_a_line(dumb, capsys, monkeypatch):
    keys, terminal = dumb
    seen = []
    old = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))

    def tell():
        while "> " not in capsys.readouterr().err:
            time.sleep(0.01)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        time.sleep(0.1)
        keys.write(b"a line\n")

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        assert terminal.read() == "a line" and seen == [1]
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, old)


def test_ctrl_c_anywhere_ends_no_conversation(session, dumb, capfd, monkeypatch):
    """As a second one does that comes when the answer has just been broken off by the first."""
    keys, terminal = dumb
    complain = terminal.complain

    def press(text):
        monkeypatch.setattr(terminal, "complain", complain)
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "complain", press)
    session.llama.reason = "length"  # of which is complained
    keys.write(b"Hi\n/undo\n/exit\n")
    repl.talk(session, terminal)
    out, _ = capfd.readouterr()
    assert "/exit or Ctrl-D leaves\ntaken back: Hi" in out


# --- both, with the real model -------------------------------------------------------------------

DEMO = str(ROOT / "checkpoints" / "SmolLM2-135M-Instruct")
PROMPT = r"\?2004h"  # prompt_toolkit asks for pasted text to be marked


def start(tmp_path, command=(sys.executable,), max_gen_len=200):
    script = tmp_path / "script.py"
    script.write_text(
        "from llama.apps.cli import parse\n"
        f"parse(['chat', {DEMO!r}, '--max_seq_len=256', '--max_gen_len={max_gen_len}', "
        "'--temperature=0', '--device=cpu', '--dtype=fp32', "
        f"'--history', {str(tmp_path / 'history')!r}])()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"}
    child = pexpect.spawn(
        command[0], [*command[1:], str(script)], env=environment, cwd=str(tmp_path), timeout=60,
        encoding="utf-8", dimensions=(24, 200),
    )  # fmt: skip
    child.expect(PROMPT)
    return child


def tell(child, line, *expected):
    child.send(line + "\r")
    for text in (*expected, PROMPT):
        child.expect(text)


def leave(child, enter="\r"):
    child.send("/exit" + enter)
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


@pytest.mark.slow
def test_a_conversation_in_a_terminal(tmp_path):
    child = start(tmp_path)
    saved = tmp_path / "dialog.json"
    tell(child, "What is the capital of France?", "The capital of France is Paris")
    tell(child, "And of Italy?", "Rome")
    child.send("Tell me a very long story about a lighthouse.\r")
    child.expect("The story of")
    child.send("/sa\x03")  # typed ahead, and an end to the answer
    child.expect(r"\(interrupted\)")
    child.expect("/sa")
    tell(child, f"ve {saved}", "6 messages saved")
    dialog = json.loads(saved.read_text())
    assert [message["role"] for message in dialog] == ["user", "assistant"] * 3
    assert "Paris" in dialog[1]["content"] and "Rome" in dialog[3]["content"]
    assert 0 < len(dialog[5]["content"]) < 600

    child.send("\x03")
    child.expect("/exit or Ctrl-D leaves")
    child.expect(PROMPT)
    tell(child, "/undo", "taken back: Tell me")
    tell(child, "/stats", r"tokens/s; context \d+ / 256")
    tell(child, "word " * 300, "max_seq_len is 256")
    tell(child, f"/load {saved}", "6 messages loaded")
    tell(child, "/undo", "taken back: Tell me")
    tell(child, "/undo", "taken back: And of Italy")
    tell(child, "/regenerate", "The capital of France is Paris")
    leave(child)


def test_a_second_turn_is_the_same_with_what_the_first_left(smollm2_path):
    """Prefix caching and speculative decoding change nothing of what is said."""
    lines = "What is the capital of France?\nSay that again.\n/stats\n"
    command = [*llama_command(), "chat", str(smollm2_path)]
    command += ["--temperature", "0", "--dtype", "fp32", "--device", "cpu", "--max_gen_len", "30"]
    said = []
    for options in (["--prefix_cache_mb", "0"], ["--speculate", "lookup"]):
        done = subprocess.run(
            [*command, *options], input=lines, capture_output=True, text=True, timeout=120, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert said[0][:-1] == said[1][:-1] and "Paris" in said[0][0]
    assert "tokens accepted" in said[1][-1] and "accepted" not in said[0][-1]


@pytest.mark.slow
def test_a_conversation_on_three_ranks(tmp_path):
    """torchrun is in the foreground: as a signal, Ctrl-C would end it and all ranks."""
    child = start(tmp_path, torchrun(3, [sys.executable]))
    tell(child, "word " * 300, "max_seq_len is 256")
    child.send("Tell me a very long story about a lighthouse.\r")
    child.expect("The story of")
    child.send("\x03")
    child.expect(r"\(interrupted\)")
    child.expect(PROMPT)
    tell(child, "/reset", "a new dialog")
    tell(child, "What is the capital of France?", "The capital of France is Paris")
    leave(child)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(repl, "is_capable", lambda: True)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(ValueError, match="prompt_toolkit: pip install prompt_toolkit"):
        cli.parse(["chat", DEMO])()
