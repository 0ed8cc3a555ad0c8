"""A pytest plugin for llama.cpp's tests: their servers are `llama serve`, and the table counts.

A server is kept for as long as the tests ask for the same options; starting one takes seconds.
"""

import atexit
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, List, Optional

import forked
import pytest

from llama import Tokenizer
from llama.text.vocabulary.writing import write_for_hugging_face

ROOT = Path(__file__).resolve().parents[2]
TABLE = tomllib.loads(Path(__file__).with_name("server_tests.toml").read_text())
MODEL = ROOT / "checkpoints/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
PATIENCE = 240  # seconds that a server may take to start
ABSENT = pytest.StashKey[int]()  # tests that don't apply

# Options of llama-server that change no answer, or stand for what `llama serve` always does.
WITHOUT_EFFECT = {
    "n_batch", "n_ubatch", "fa", "offline", "server_embeddings", "jinja", "debug", "server_port",
    "external_server", "model_hf_repo", "model_hf_file", "model_file", "n_predict", "temperature",
    "ready", "pooling", "reasoning",
}  # fmt: skip
TRANSLATED = {
    "n_ctx", "n_slots", "model_alias", "seed", "api_key", "cors_origins", "chat_template_file",
}  # fmt: skip
SAME = {"chat_template": "chatml"}
LOCALHOST = [f"http://{host}" for host in (
    "localhost", "localhost:8080", "127.0.0.1", "127.0.0.1:3000", "[::1]", "[::1]:3000",
)]  # fmt: skip


class Serving:
    """The running server."""

    def __init__(self) -> None:
        self.options: Optional[List[str]] = None
        self.folder = tempfile.TemporaryDirectory(prefix="llama-serving-")
        self.process: Optional[subprocess.Popen] = None
        self.port = 0
        atexit.register(self.stop)

    def start(self, server: Any) -> None:
        """In place of llama.cpp's `ServerProcess.start`."""
        options = self.translated(server)
        if options != self.options:
            self.stop()
            self.launch(options)
        server.server_port = self.port

    def launch(self, options: List[str]) -> None:
        python = forked.PYTHON if forked.ADDRESS in os.environ else [sys.executable]
        command = [*python, "-m", "llama", "serve", str(MODEL), "--port=0", *options]
        log = Path(self.folder.name) / "log"
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        end = time.monotonic() + PATIENCE
        while not (found := re.search(r"http://\S+:(\d+)/v1;", log.read_text())):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text())
            time.sleep(0.05)
        self.port, self.options = int(found[1]), options

    def stop(self) -> None:
        self.options = None
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def translated(self, server: Any) -> List[str]:
        """The options of `llama serve`.

        Raises:
            ValueError: an option that has no counterpart.
        """
        given = {k: v for k, v in vars(server).items() if v not in (None, False)}
        for name, value in given.items():
            if name not in WITHOUT_EFFECT | TRANSLATED and SAME.get(name) != value:
                raise ValueError(f"llama serve has no option for {name}={value!r}")
        options = [
            f"--max_seq_len={given['n_ctx'] // given.get('n_slots', 1)}",
            f"--served_name={given.get('model_alias', 'tinyllama-2')}",
            f"--seed={given['seed']}",
        ]
        if server.api_key:
            keys = Path(self.folder.name) / "keys"
            keys.write_text(server.api_key)
            options.append(f"--api_key_file={keys}")
        origins = {None: ["*"], "localhost": LOCALHOST}[given.get("cors_origins")]
        options += [f"--cors={origin}" for origin in origins]
        if server.chat_template_file:
            folder = Path(self.folder.name) / Path(server.chat_template_file).stem
            if not folder.exists():
                folder.mkdir()
                write_for_hugging_face(Tokenizer(str(MODEL)).vocabulary, folder)
                template = Path(server.chat_template_file).read_text()
                (folder / "chat_template.jinja").write_text(template)
            options.append(f"--tokenizer_path={folder / 'tokenizer.json'}")
        return options


def pytest_configure(config: pytest.Config) -> None:
    import utils  # llama.cpp's

    serving = Serving()
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.ServerProcess.start = lambda self, timeout_seconds=0: serving.start(self)
    utils.ServerProcess.stop = lambda self: None
    config.stash[ABSENT] = 0


def listed(kind: str, name: str) -> Optional[str]:
    """The reason that the table gives for a test."""
    for entry in TABLE[kind]:
        for pattern in entry["tests"]:
            if fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")):
                entry.setdefault("used", set()).add(pattern)
                return entry["reason"]
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    applicable = []
    for item in items:
        name = item.nodeid.removeprefix("unit/")
        if listed("not_applicable", name):
            config.stash[ABSENT] += 1
            continue
        applicable.append(item)
        reason = listed("fails", name)
        if reason:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    if not (config.option.keyword or config.option.file_or_dir):
        unused = [
            pattern
            for entry in TABLE["not_applicable"] + TABLE["fails"]
            for pattern in {*entry["tests"]} - entry.get("used", set())
        ]
        if unused:
            raise pytest.UsageError(f"server_tests.toml: no such tests: {', '.join(unused)}")
    items[:] = applicable


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    stats = {k: len(v) for k, v in terminalreporter.stats.items()}
    passed, failed = stats.get("passed", 0), stats.get("failed", 0) + stats.get("xfailed", 0)
    absent, applicable = config.stash[ABSENT], passed + failed
    if applicable:
        terminalreporter.write_line(
            f"{absent + applicable} tests, {absent} don't apply; of {applicable} that do, {passed} "
            f"pass ({100 * passed / applicable:.1f} %) and {failed} fail"
        )
    for report in terminalreporter.stats.get("xfailed", []):
        terminalreporter.write_line(f"{report.nodeid}: {report.wasxfail}")
