"""What mkdocs calls while it builds: the command reference, and links that leave docs/."""

import os
import re
import subprocess
import sys
from pathlib import Path

from llama.apps.cli import COMMANDS

ROOT = Path(__file__).parent.parent
MARK = "<!-- the help of every sub-command stands here: docs/hooks.py -->"
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((?:\.\./)+(?!docs/)([^)]*)\)")


def help_of(*command: str) -> str:
    """What `llama COMMAND --help` prints, 88 columns wide, without colours.

    Raises:
        RuntimeError: it fails, or prints nothing.
    """
    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "llama", *command, "--help"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"llama {' '.join(command)} --help: {done.stdout}{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def on_page_markdown(markdown: str, page, config, files) -> str:
    if page.file.src_uri == "reference/cli.md":
        sections = [f"```text\n{help_of()}\n```"]
        sections += [f"## llama {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS]
        return markdown.replace(MARK, "\n\n".join(sections))
    # Files beside docs/ aren't part of the site: links to them become their names. Pictures are
    # copied (on_files).
    return OUTSIDE.sub(lambda m: f"![{m[2]}]({m[3]})" if m[1] else m[2], markdown)


def on_files(files, config):
    """Adds the plot that README.md and the pages share, which stands outside of docs/."""
    from mkdocs.structure.files import File

    plot = "benchmarks/results/decode.png"
    files.append(File.generated(config, plot, abs_src_path=str(ROOT / plot)))
    return files
