"""The `llama` command: its sub-commands, its help, and how it ends."""

import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from dataclasses import is_dataclass
from functools import partial
from typing import Annotated, Any, Callable, List, Literal, Optional, Sequence, get_type_hints

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError

from llama._version import __version__

COMMANDS = {  # imported when asked for: most of them need torch
    "batch": "llama.apps.batch:batch Answer a file of requests, on one machine or many.",
    "bench": "llama.apps.bench:bench Measure a running server.",
    "chat": "llama.apps.chat:chat Talk with a model.",
    "complete": "llama.apps.complete:complete Continue a text, or each text of a file.",
    "convert": "llama.apps.convert:convert Write a checkpoint in another format.",
    "download": "llama.apps.download:download Download a model.",
    "eval": "llama.apps.eval:evaluate Run tasks of lm-evaluation-harness.",
    "finetune": "llama.apps.finetune:finetune Fine-tune a model on dialogs or texts.",
    "inspect": "llama.apps.inspect:inspect Describe a checkpoint, and the memory that it needs.",
    "plan": "llama.apps.plan:plan Say how many machines serve a load.",
    "plot": "llama.apps.plot:plot Draw the losses of a fine-tuning run.",
    "score": "llama.apps.score:score Print the perplexity of texts.",
    "serve": "llama.apps.serve:serve Serve a model to clients of OpenAI's API.",
}

ABOUT = """\
Run, convert and fine-tune Llama models.

`llama COMMAND --help` lists the options of a command. They are written with - or _, --max-seq-len
or --max_seq_len. On several ranks: torchrun --nproc_per_node N -m llama COMMAND ...

Exit codes: 0 success; 1 the command failed, a line on stderr says why; 2 wrong usage; 130
interrupted by Ctrl-C; 141 the reader of the output has gone.
"""


class Help:
    """Plain text, as wide as the terminal: the names of options, and beside them what they mean."""

    def render_usage(self, console: Any, options: Any, usage: Any) -> None:
        print(f"Usage: {usage}".rstrip(), end="\n\n")

    def render_description(self, console: Any, options: Any, description: Any) -> None:
        for paragraph in str(description.primary_renderable).strip().split("\n\n"):
            items = re.split(r"\n(?=- )", paragraph)
            print("\n".join(map(self.fill, items)), end="\n\n")

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        if not panel.entries:
            return
        print(f"{panel.title}:")
        for entry in panel.entries:
            names = ", ".join(entry.display_labels_with_metavar).replace("STR|PATH", "PATH")
            notes = [f"choices: {', '.join(entry.choices)}"] if entry.choices else []
            if entry.default not in (None, "False", "[]"):
                notes.append(f"default: {entry.default}")
            notes += ["required"] * entry.required
            about = str(getattr(entry.description, "primary_renderable", ""))
            text = self.fill(" ".join([about, *(f"[{note}]" for note in notes)]), " " * 26)
            print(f"  {names:<23} {text.lstrip()}" if len(names) < 24 else f"  {names}\n{text}")
        print()

    def fill(self, text: str, indent: str = "") -> str:
        """The text wrapped; the line breaks of docstrings mean nothing."""
        return textwrap.fill(
            " ".join(text.split()), min(shutil.get_terminal_size().columns, 100),
            initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False,
        )  # fmt: skip


app = App(
    name="llama", help=ABOUT, version=f"llama {__version__}", help_format="plaintext",
    help_formatter=Help(), default_parameter=Parameter(show_env_var=False, negative_iterable=()),
)  # fmt: skip
for _name, _entry in COMMANDS.items():
    _path, _, _help = _entry.partition(" ")
    app.command(_path, name=_name, help=_help)


@app.command
def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print the completion script of a shell: `source <(llama completion bash)`."""
    print(_completion_script(shell))


@app.command(name="--install-completion")
def install_completion() -> None:
    """Install completion for the shell that this is run from, and exit."""
    from cyclopts.completion.detect import ShellDetectionError, detect_shell

    try:
        shell = detect_shell()
    except ShellDetectionError:
        raise ValueError("unknown shell: see llama completion --help") from None
    path = app.install_completion(shell=shell)
    path.write_text(_completion_script(shell))
    print(f"{path}: start a new {shell}")


def _completion_script(shell: Any) -> str:
    """A shell's script. In bash, its own completion of names of files takes over where there are no
    choices: cyclopts' adds no / to folders, and breaks names with spaces."""
    _complete_both_spellings()
    script = re.sub(
        r"COMPREPLY=\( \$\(compgen -f .*", "COMPREPLY=()", app.generate_completion(shell=shell)
    )
    return script.replace("complete -F _llama", "complete -o default -F _llama")


def _complete_both_spellings() -> None:
    """Gives all options names with _ too: they are accepted anyway, but not completed."""
    left: List[Any] = [app[name].default_command for name in COMMANDS]
    for options in left:  # of a function or a dataclass
        for name, hint in get_type_hints(options, include_extras=True).items():
            if is_dataclass(hint):
                left.append(hint)
            elif "_" in name:
                options.__annotations__[name] = Annotated[hint, Parameter(alias=f"--{name}")]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line, by default sys.argv's. Returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell: llama ... <&-
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        try:
            run = parse(sys.argv[1:] if arguments is None else arguments)
        except (CycloptsError, ValueError) as error:
            return _end(2, f"error: {' '.join(str(error).split())}")
        run()
        _flush()
        return 0
    except KeyboardInterrupt as interrupt:
        return _end(130, str(interrupt) or "interrupted")
    except BrokenPipeError:
        _discard_output()
        return 141
    except (ValueError, OSError) as error:
        return _end(1, f"error: {error}")
    except Exception:
        if "RANK" in os.environ:
            raise  # torch says which rank's it is
        traceback.print_exc()
        return 1


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or no reader
        _discard_output()
        raise


def _discard_output() -> None:
    """Python flushes stdout again as it exits: let that succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(words: Sequence[str]) -> Callable[[], None]:
    """The call that a command line asks for. Raises CycloptsError or ValueError for wrong usage."""
    if words and words[0] in COMMANDS:
        command = app[words[0]]
        command.help = command.default_command.__doc__  # more than the line in the list
    try:
        function, bound, _ = app.parse_args(list(words), exit_on_error=False, print_error=False)
    except UnusedCliTokensError as error:
        word = (error.unused_tokens or [""])[0]
        before = words[words.index(word) - 1] if word in ("true", "false") else ""
        if before.startswith("--"):
            name = before.removeprefix("--").removeprefix("no-")
            switch = f"--{name}" if word == "true" else f"--no-{name}"
            raise ValueError(f"{before} {word}: write {switch}, or --{name}={word}") from None
        raise ValueError(
            f"unexpected argument {word!r}: a text with spaces needs quotes; see llama {words[0]} "
            "--help"
        ) from None
    except MissingArgumentError as error:
        if "--ray" not in words:
            raise
        raise ValueError(
            f"{error} (--ray takes the next word: write it last, or --ray=HOST:PORT)"
        ) from None
    return partial(function, *bound.args, **bound.kwargs)


def _end(code: int, message: str) -> int:
    """Say why the command ends: once, where several ranks have the same to say."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(5)  # when rank 0 ends, torchrun ends this one; else there's nobody to say it
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
