"""Meta's own way to its models: signed links, sent by e-mail, each for one family of models."""

import contextlib
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple
from urllib.parse import urlsplit

from llama.checkpoint import transfer
from llama.checkpoint.transfer import is_right, say

REQUEST_PAGE = "https://llama.meta.com/llama-downloads/"
tell = partial(print, flush=True)  # results; what goes on meanwhile is said on stderr

# Meta's models: name, path in the link (or paths: the server's names changed with time),
# number of shards, GB, and the folder here if it isn't the name. Facts: download.sh of Meta's
# repositories llama, llama3 and llama-models, and models/sku_list.py of the last.
CATALOG = """\
Llama-2-7b llama-2-7b 1 13.5
Llama-2-7b-chat llama-2-7b-chat 1 13.5
Llama-2-13b llama-2-13b 2 26
Llama-2-13b-chat llama-2-13b-chat 2 26
Llama-2-70b llama-2-70b 8 138
Llama-2-70b-chat llama-2-70b-chat 8 138
8B 8b_pre_trained,Llama-3-8B 1 16.1 Meta-Llama-3-8B
8B-instruct 8b_instruction_tuned,Llama-3-8B-Instruct 1 16.1 Meta-Llama-3-8B-Instruct
70B 70b_pre_trained,Llama-3-70B 8 141 Meta-Llama-3-70B
70B-instruct 70b_instruction_tuned,Llama-3-70B-Instruct 8 141 Meta-Llama-3-70B-Instruct
Llama-3.1-8B Llama-3.1-8B,Meta-Llama-3.1-8B 1 16.1
Llama-3.1-8B-Instruct Llama-3.1-8B-Instruct,Meta-Llama-3.1-8B-Instruct 1 16.1
Llama-3.1-70B Llama-3.1-70B,Meta-Llama-3.1-70B 8 141
Llama-3.1-70B-Instruct Llama-3.1-70B-Instruct,Meta-Llama-3.1-70B-Instruct 8 141
Llama-3.1-405B-MP8 Llama-3.1-405B-MP8,Meta-Llama-3.1-405B-MP8 8 812
Llama-3.1-405B-MP16 Llama-3.1-405B-MP16,Meta-Llama-3.1-405B-MP16 16 820
Llama-3.1-405B-Instruct-MP8 Llama-3.1-405B-Instruct-MP8,Meta-Llama-3.1-405B-Instruct-MP8 8 812
Llama-3.1-405B-Instruct-MP16 Llama-3.1-405B-Instruct-MP16,Meta-Llama-3.1-405B-Instruct-MP16 16 820
Llama-3.2-1B Llama-3.2-1B 1 2.5
Llama-3.2-1B-Instruct Llama-3.2-1B-Instruct 1 2.5
Llama-3.2-3B Llama-3.2-3B 1 6.4
Llama-3.2-3B-Instruct Llama-3.2-3B-Instruct 1 6.4
Llama-3.2-11B-Vision Llama-3.2-11B-Vision 1 21.3
Llama-3.2-11B-Vision-Instruct Llama-3.2-11B-Vision-Instruct 1 21.3
Llama-3.2-90B-Vision Llama-3.2-90B-Vision 8 177
Llama-3.2-90B-Vision-Instruct Llama-3.2-90B-Vision-Instruct 8 177
Llama-Guard-3-11B-Vision Llama-Guard-3-11B-Vision 1 21.3
Llama-3.3-70B-Instruct Llama-3.3-70B-Instruct 8 141
Llama-4-Scout-17B-16E Llama-4-Scout-17B-16E 8 218
Llama-4-Scout-17B-16E-Instruct Llama-4-Scout-17B-16E-Instruct 8 218
Llama-4-Maverick-17B-128E Llama-4-Maverick-17B-128E 8 804
Llama-4-Maverick-17B-128E-Instruct Llama-4-Maverick-17B-128E-Instruct 8 803
"""


class Model(NamedTuple):
    """One of Meta's, as a line of the catalog has it."""

    name: str
    paths: str
    shards: str
    size: str
    own_folder: str = ""

    @property
    def folder(self) -> str:
        return self.own_folder or self.name

    @property
    def family(self) -> str:
        """Llama 2, Llama 3, Llama 3.1, ...: a link serves one of them."""
        if "Vision" in self.name:
            return "Llama 3.2 Vision"
        return "Llama " + (self.name.split("-")[1] if self.name.startswith("Llama-") else "3")


MODELS = [Model(*line.split()) for line in CATALOG.splitlines()]


def table() -> str:
    lines = [f"{'FAMILY':16} {'MODEL':34} {'SIZE':>8}  WEIGHT FILES"]
    lines += [f"{m.family:16} {m.name:34} {m.size:>5} GB  {m.shards}" for m in MODELS]
    lines += ["", "With them come 5 small files (Llama 2: 6): parameters, tokenizer, checksums,"]
    lines += ["licence, use policy. They need a link from Meta."]
    return "\n".join([*lines, "No link needed: smollm2 (98 MB), tokenizer (2 MB), OWNER/NAME"])


def known() -> str:
    """What can be named, for errors."""
    others = "there are smollm2, tokenizer, OWNER/NAME on the Hugging Face Hub, and from Meta"
    return " ".join([others, *(model.name for model in MODELS)])


def find(name: str) -> Model:
    """Raises ValueError if there is no such model."""
    for found in MODELS:
        if name.lower() in (found.name.lower(), found.folder.lower()):
            return found
    raise ValueError(f"unknown model '{name}': {known()}")


def fetch(models: List[Model], out: Path) -> None:
    """Fetch models with the link in PRESIGNED_URL, or else asked for; asks which if none is named.

    Raises:
        FileNotFoundError: the link serves no such file.
        ValueError: no usable link, no access, no network, a wrong checksum.
    """
    link = os.environ.get("PRESIGNED_URL") or _ask("Link from Meta's e-mail: ")
    link = _checked(link.strip())
    if not models:
        family = _family(urlsplit(link).netloc)
        usual = [m for m in MODELS if m.family == family and "-405B" not in m.name]
        chosen = _ask(
            "Models (--list shows all): any, separated by commas,\n"
            f"or Enter for {','.join(model.name for model in usual)}: "
        )
        models = [find(word) for word in re.split(r"[,\s]+", chosen) if word] or usual
    wrong = [model.folder for model in models if not _fetch_model(link, model, out)]
    if wrong:
        raise ValueError(
            f"verification failed for {', '.join(wrong)}. The files named above were left in "
            "place: delete them (and checklist.chk beside them, if all files fail) and run this "
            "again"
        )


def _ask(question: str) -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  without it, macOS's terminals cut lines at 1,024 characters
    return input(question)


def _checked(link: str) -> str:
    """The link, if it can be one.

    Raises:
        ValueError: it can't; the message doesn't repeat it, as it is a secret.
    """
    if not link:
        raise ValueError("no link given: paste the one from Meta's e-mail, or set PRESIGNED_URL")
    if re.fullmatch(r"(mailto:)?[^/@]+@[^/@]+", link):
        raise ValueError(
            "that is an e-mail address. What is needed is the link (https://...) in the e-mail "
            f"that Meta sends once your request at {REQUEST_PAGE} is granted"
        )
    # Plain http would send the signature readable by anyone on the way.
    if not re.match(r"https://|http://(127\.0\.0\.1|localhost)(:[0-9]+)?/", link):
        raise ValueError("that is not a download link: it must start with https://")
    if re.search(r"[\s\"'\\]", link):
        raise ValueError(
            "the link contains a space, quote or backslash: copy it again, in one piece"
        )
    if "*" not in link.partition("?")[0]:
        raise ValueError(
            "the link has no * in it (it stands for the file name). Copy the link's text from the "
            "e-mail rather than its target, which mail programs and browsers like to rewrite"
        )
    return link


def _family(host: str) -> str:
    """What a server has: each family has its own."""
    if host == "download.llamameta.net":
        return "Llama 2"
    if host.startswith("llama4"):
        return "Llama 4"
    match = re.match(r"llama3-([123])(-multimodal)?", host)
    return f"Llama 3.{match[1]}{' Vision' * bool(match[2])}" if match else "Llama 3"


def _fetch_model(link: str, model: Model, out: Path) -> bool:
    """Fetch what is missing of a model; returns whether its files have the right checksums."""
    folder = out / model.folder
    say(f"{model.folder} -> {folder}")
    # Llama 2 has one tokenizer for all of its models, with a checksum of its own.
    above = ["tokenizer_checklist.chk", "tokenizer.model"] if model.family == "Llama 2" else []
    names = ["checklist.chk", *above, "params.json", "tokenizer.model"]
    names += [f"consolidated.{shard:02d}.pth" for shard in range(int(model.shards))]
    terms = ["LICENSE", "USE_POLICY" if model.family == "Llama 3" else "USE_POLICY.md"]
    source = transfer.Web()
    places = [f"{path}/" for path in model.paths.split(",")]
    missing: transfer.Files = {}
    folder.mkdir(parents=True, exist_ok=True)
    with transfer.locked(folder):
        for name in dict.fromkeys([*names, *terms]):
            if (folder / name).exists():
                continue
            above_it = name in above or name in terms
            try:
                place, url, size = _locate(source, link, model, name, [""] if above_it else places)
            except (transfer.Refused, FileNotFoundError):
                if name not in terms:
                    raise
                say(f"the link serves no {name}; {model.family}'s terms are at {REQUEST_PAGE}")
                continue
            missing[name] = url, size
            places = [place] if place else places
        if not missing:
            tell(f"{folder} is already there; nothing to download.")
        try:
            transfer.fetch(source, missing, folder, model.folder)
        except (transfer.Refused, FileNotFoundError) as problem:
            raise _explained(problem, model.folder, model) from None
    say(f"verifying {folder}")
    return _verified(folder, [name for name in names if not name.endswith(".chk")])


def _locate(
    source: transfer.Web, link: str, model: Model, name: str, places: List[str]
) -> Tuple[str, str, Optional[int]]:
    """The first place that has a file, its URL there and its size."""
    before, _, after = link.partition("*")
    failures = []
    for place in places:
        url = f"{before}{place}{name}{after}"
        try:
            return place, url, source.size(url)
        except (transfer.Refused, FileNotFoundError) as problem:
            failures.append(_explained(problem, place + name, model))
    raise failures[0]


def _explained(problem: Exception, what: str, model: Model) -> Exception:
    if isinstance(problem, transfer.Refused):
        return transfer.Refused(
            f"the server refuses the link for {what} ({problem}). Links expire after 24 hours and "
            f"after a number of downloads: request a new one at {REQUEST_PAGE} and run this again; "
            f"what has been downloaded is kept. Also make sure that the link is for {model.family}"
        )
    return FileNotFoundError(
        f"the server has no {what} ({problem}). Is the link for {model.family}, and not for "
        "another model family? A link only serves the models it was requested for"
    )


def _verified(folder: Path, names: List[str]) -> bool:
    """Whether files are what the checklists say; files missing there count as failures too."""
    listed = {}
    for checklist in sorted(folder.glob("*checklist.chk")):
        for line in checklist.read_text(errors="replace").splitlines():
            total, _, name = line.partition(" ")
            listed[name.strip().removeprefix("*").removeprefix("./")] = total
    good = True
    for name in dict.fromkeys(names):
        if is_right(folder / name, listed.get(name, "")):
            tell(f"{folder / name}: ok")
        else:
            problem = "checksum mismatch" if name in listed else "not in checklist.chk"
            say(f"{problem}: {folder / name}")
            good = False
    return good
