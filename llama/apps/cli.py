"""The `llama` command."""

import sys
from dataclasses import replace
from functools import wraps
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, get_args, get_type_hints

import fire
import torch

from llama import checkpoint
from llama.backends import memory
from llama.checkpoint import convert as conversion
from llama.checkpoint import remote
from llama.layers.parallel import pick_dtype


def convert(
    src: str,
    dst: str,
    to: str,
    mp: int = 1,
    dtype: Optional[str] = None,
    quant: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    adapter_dir: Optional[str] = None,
    force: bool = False,
    verify: bool = False,
) -> None:
    """Write a checkpoint, with its tokenizer and chat template, in another format.

    Memory: a few blocks of one tensor. An interrupted run leaves nothing under the final name.

    Args:
        src: Meta's or Hugging Face's directory, or a .gguf file.
        dst: the directory, or for gguf the file, to write.
        to: meta, hf or gguf.
        mp: number of shards, for meta.
        dtype: bf16, fp16 or fp32; by default what the weights are stored in (fp32 if quantized).
        quant: q8_0, q4_0 or q4_1, for gguf.
        tokenizer_path: by default what is found with the source.
        adapter_dir: a LoRA adapter in PEFT's layout, added to the weights that are written.
        force: overwrite dst, once the new checkpoint is complete.
        verify: read everything again and compare.
    """
    try:
        from llama.backends.build import open_checkpoint  # here: it isn't cheap to import

        path = conversion.convert(
            open_checkpoint(src, adapter_dir), dst, to, model_parallel_size=mp, dtype=_dtype(dtype),
            quant=quant, tokenizer_path=tokenizer_path, force=force, verify=verify,
        )  # fmt: skip
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written under the final name")
    print(f"{path}: {memory.size(_bytes_under(path))}" + (", verified" if verify else ""))


def inspect(path: str, max_seq_len: int = 2048, max_batch_size: int = 8) -> None:
    """Say what a checkpoint is, and the memory that it needs on each of 1, 2, 4, ... ranks.

    Args:
        path: Meta's or Hugging Face's directory, or a .gguf file.
        max_seq_len: tokens of prompt and answer together, for the cache.
        max_batch_size: rows of the cache.
    """
    for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        if value < 1:
            raise ValueError(f"--{name}={value}: it's a number from 1 up")
    source = checkpoint.open(remote.local_path(path))
    about = conversion.describe(source)
    args = replace(source.args, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    print(f"{source.path}: {about.format}, {about.parameters:,} parameters")
    print("stored as: " + ", ".join(f"{kind} {memory.size(n)}" for kind, n in about.bytes.items()))
    print(f"tokenizer: {source.tokenizer_path or 'none'}")
    for field, value in vars(args).items():
        if field not in ("max_seq_len", "max_batch_size"):
            print(f"  {field} = {value}")
    checkpoint.check_shapes(source)
    print(f"memory per rank with a cache of {max_batch_size} rows of {max_seq_len} tokens:")
    for world in (w for w in range(1, args.n_heads + 1) if args.n_heads % w == 0):
        for dtype in ("bf16", "fp32"):
            need = memory.estimate(args, world, pick_dtype(dtype, torch.device("cpu")))
            parts = f"weights {memory.size(need.weights)} + cache {memory.size(need.cache)}"
            print(f"  {world:3} rank{'s' if world > 1 else ' '} {dtype}: {parts}")


def _dtype(name: Optional[str]) -> Optional[torch.dtype]:
    return None if name is None else pick_dtype(name, torch.device("cpu"))


def _bytes_under(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


COMMANDS: Dict[str, str] = {  # imported when asked for: not each is cheap
    "chat": "llama.apps.repl:chat",
    "complete": "llama.apps.complete:complete",
    "convert": "llama.apps.cli:convert",
    "download": "llama.apps.download:download",
    "eval": "llama.apps.measure:evaluate",
    "finetune": "llama.apps.finetune:main",
    "inspect": "llama.apps.cli:inspect",
    "score": "llama.apps.measure:score",
}


def _load(name: str) -> Callable:
    module, _, function = COMMANDS[name].partition(":")
    return getattr(import_module(module), function)


def _check_options(command: Callable, given: List[str]) -> None:
    """fire would first do all the work, and then complain of an option that it doesn't know."""
    known = {"help", *signature(command).parameters}
    for option in given:
        name = option[2:].partition("=")[0].replace("-", "_")
        if option == "--":
            break
        if option.startswith("--") and not {name, name.removeprefix("no")} & known:
            raise ValueError(f"no such option: --{name}; --help lists those that there are")


def _kind(hint: Any) -> type:
    """The type that an option's value has when it is given: of Optional[int], int."""
    return next((kind for kind in get_args(hint) if kind is not type(None)), hint)


def _quoted(command: Callable, given: List[str]) -> List[str]:
    """Arguments with those that are texts as Python strings, which fire leaves as they are.

    Of --prompt='Hello, world' it would make a tuple, of --stop='["a"]' a list, of 1e3 1000.0.
    """
    kinds = {name: _kind(hint) for name, hint in get_type_hints(command).items()}
    places = [kinds.get(name) for name in signature(command).parameters]
    quoted: List[str] = []
    place, waiting = 0, ""  # among the arguments without a name; an option whose value is next
    for option in given:
        name, is_there, value = option.partition("=")
        if option.startswith("--"):
            name = name[2:].replace("-", "_")
            text = kinds.get(name) is str
            quoted.append(f"--{name}={value!r}" if is_there and text else option)
            waiting = "" if is_there or kinds.get(name) is bool else name
        elif option.startswith("-") and not waiting:
            quoted.append(option)
        elif waiting:
            quoted.append(repr(option) if kinds.get(waiting) is str else option)
            waiting = ""
        else:
            kind = places[min(place, len(places) - 1)] if places else None
            files = "files" in kinds and place > 0  # any number of them
            quoted.append(repr(option) if kind is str or files else option)
            place += 1
    return quoted


def _typed(command: Callable) -> Callable:
    """fire would make what it likes of a value: a number of the path 2024, a text of --force=no."""
    kinds = {name: _kind(hint) for name, hint in get_type_hints(command).items()}
    what = {bool: "a switch and takes no value", int: "a whole number", float: "a number"}

    @wraps(command)
    def checked(*args: Any, **kwargs: Any) -> None:
        bound = signature(command).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            kind = kinds[name]
            if kind is str and value is True:
                raise ValueError(f"--{name} needs a value")
            if kind is str and value is not None:  # where it stands without an option's name
                many = isinstance(value, tuple)
                bound.arguments[name] = tuple(map(str, value)) if many else str(value)
            elif kind is float and type(value) is int:
                bound.arguments[name] = float(value)
            elif kind in what and value is not None and type(value) is not kind:
                raise ValueError(f"--{name}={value}: it's {what[kind]}")
        command(*bound.args, **bound.kwargs)

    return checked


def run(command: Callable, given: List[str], *names: str) -> None:
    """A command with its arguments: mistakes are a line on stderr and exit code 1, no traceback.

    Args:
        names: of the program, and of the command if it is one of several.
    """
    try:
        _check_options(command, given)
        program, *name = names
        component = {name[0]: _typed(command)} if name else _typed(command)
        fire.Fire(component, [*name, *_quoted(command, given)], name=program)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def main() -> None:
    """The entry point."""
    name = "".join(sys.argv[1:2])
    if name in COMMANDS:
        run(_load(name), sys.argv[2:], "llama", name)
    else:
        fire.Fire({each: _typed(_load(each)) for each in COMMANDS}, name="llama")


if __name__ == "__main__":
    main()
