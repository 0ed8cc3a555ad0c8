"""Prints the tests of what has changed since upstream's main, for `make check`.

Tests mirror the packages: llama/engine/ has tests/engine/, llama/model.py has tests/test_model.py.
"""

import subprocess
from pathlib import Path

ALWAYS = "tests/test_architecture.py"
OTHERS = {  # what has a test of another name
    "README.md": "tests/test_docs.py",
    "benchmarks": "tests/test_benchmarks.py",
    "docs": "tests/test_docs.py",
    "download.sh": "tests/apps/test_download.py",
    "example_chat_completion.py": "tests/test_examples.py",
    "example_multimodal_completion.py": "tests/test_examples.py",
    "example_text_completion.py": "tests/test_examples.py",
    "tests/forked.py": "tests/apps/test_cli.py",
    "llama/ray/ingress.py": "tests/server/test_replicas.py",
    "llama/ray/routing.py": "tests/server/test_replicas.py",
    "llama/ray/serving.py": "tests/server/test_replicas.py",
    "tests/ranks.py": "tests/layers",
    "tests/scripted.py": "tests/server/test_page.py",
    "tests/simulated.py": "tests/backends",
    "tests/web.py": "tests/checkpoint/test_remote.py",
}


def tests_of(path: str) -> str:
    """A test's file or directory, which may not exist."""
    top, *below = Path(path).parts
    if path in OTHERS or top in OTHERS:
        return OTHERS.get(path, OTHERS.get(top, ""))
    if top == "llama" and below:
        return f"tests/{below[0]}" if below[1:] else f"tests/test_{below[0]}"
    return path if top == "tests" and Path(path).name.startswith("test_") else ""


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed() -> list[str]:
    """Committed since upstream's main (or origin's, or the last commit), or not yet, or new."""
    bases = ("upstream/main", "origin/main", "HEAD")
    base = next(found[0] for name in bases if (found := git("merge-base", name, "HEAD")))
    return git("diff", "--name-only", base) + git("ls-files", "--others", "--exclude-standard")


if __name__ == "__main__":
    found = {ALWAYS} | {test for path in changed() if (test := tests_of(path))}
    print(*sorted(test for test in found if Path(test).exists()))
