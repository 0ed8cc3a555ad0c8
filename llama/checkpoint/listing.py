"""Which files of a directory make up a checkpoint, asked of whatever holds the directory."""

import itertools
import json
import re
from typing import Callable, Collection, List

from llama.checkpoint.config import check_config
from llama.checkpoint.schemes import APART
from llama.text.gguf_header import are_parts
from llama.text.vocabulary.config import PROCESSOR_TEMPLATE, TOOL_TEMPLATE

PROCESSOR = "preprocessor_config.json"  # how images are prepared
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or NAME.index.json and what it names
BESIDE_HF_WEIGHTS = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", PROCESSOR_TEMPLATE,
    TOOL_TEMPLATE, PROCESSOR, "processor_config.json", *APART,
)  # fmt: skip


def format_of(has: Callable[[str], bool], ggufs: Collection[str]) -> str:
    """What a directory holds: "meta", "hf", "gguf", or "" for none of them.

    Beside Hugging Face's files, Mistral's have a params.json, and GGUF files a config.json. `has`
    says whether it has a file; `ggufs` are those that it has.
    """
    shards = ("consolidated.00.pth", "consolidated.pth")
    if has("params.json") and (any(map(has, shards)) or not has("config.json")):
        return "meta"
    weights = (f"{name}{end}" for name in HF_WEIGHTS for end in ("", ".index.json"))
    if has("config.json") and (not ggufs or any(map(has, weights))):
        return "hf"
    return "gguf" if ggufs else ""


def checkpoint_files(
    where: str,
    has: Callable[[str], bool],
    read: Callable[[str], bytes],
    names: Collection[str] = (),
) -> List[str]:
    """The files of the checkpoint or adapter in a directory; none if there is none in it.

    `has` says whether it has a file, `read` what is in one; `names` are all, where they are known;
    `where` is what to call it in messages.

    Raises:
        FileNotFoundError: a checkpoint that lacks files.
        ValueError: several checkpoints, a broken index, or a config.json that can't be read.
    """
    ggufs = sorted(name for name in names if re.fullmatch(r"[^/]+\.gguf", name))
    kind = format_of(has, ggufs)
    if kind == "meta":
        shards = itertools.takewhile(has, (f"consolidated.{n:02d}.pth" for n in itertools.count()))
        single = filter(has, ["consolidated.pth"])  # Llama 3.2 11B Vision's, on the Hub
        if not (files := [*shards] or [*single]):
            raise FileNotFoundError(f"{where} has params.json, but no consolidated.00.pth")
        scales = itertools.takewhile(has, (f"fp8_scales_{n}.pt" for n in range(len(files))))
        return ["params.json", *files, *scales, *filter(has, ["tokenizer.model"])]
    if kind == "hf":
        apart = {name: read(name) for name in APART if has(name)}
        check_config(f"{where}: config.json", read("config.json"), apart)
        for weights in HF_WEIGHTS:
            if has(index := f"{weights}.index.json"):
                files = _indexed(f"{where}: {index}", read(index))
                for name in files:
                    if not has(name):
                        raise FileNotFoundError(f"{where} has {index}, but not its {name}")
                return ["config.json", index, *files, *filter(has, BESIDE_HF_WEIGHTS)]
            if has(weights):
                return ["config.json", weights, *filter(has, BESIDE_HF_WEIGHTS)]
        raise FileNotFoundError(
            f"{where} has config.json, but no model.safetensors and no pytorch_model.bin"
        )
    for weights in ("adapter_model.safetensors", "adapter_model.bin"):
        if has("adapter_config.json") and has(weights):
            return ["adapter_config.json", weights]
    if len(ggufs) > 1 and not are_parts(ggufs):
        raise ValueError(f"{where} holds several models, name one: {', '.join(ggufs)}")
    return ggufs


def _indexed(index: str, content: bytes) -> List[str]:
    try:
        names = sorted(set(json.loads(content)["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f"{index} is no index of weights: {problem}") from None
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", str(name)):  # it becomes the name of a file here
            raise ValueError(f"{index} names {name!r}, which is no file name")
    return names
