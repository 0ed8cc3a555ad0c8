"""A model as it was asked for: dense or in blocks, plain or compiled, with an adapter, a draft."""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import torch

from llama import checkpoint
from llama.backends import cpu, memory, offloaded, quantized
from llama.backends.options import ModelOptions
from llama.checkpoint import Checkpoint, remote
from llama.checkpoint.adapter import Merged, read_adapter
from llama.layers import parallel
from llama.layers.cache import Int8KVCache
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer


class Built(NamedTuple):
    """Result of `assemble`."""

    model: Transformer
    tokenizer: Tokenizer
    draft: Optional[Transformer]
    source: Checkpoint


def assemble(options: ModelOptions) -> Built:
    """Open, check and load. Errors are those of `Llama.build`."""
    start = time.monotonic()
    device = parallel.initialize(options.model_parallel_size, options.device)
    dtype = parallel.pick_dtype(options.dtype, device)
    source = open_checkpoint(options.ckpt_dir, options.adapter_dir)
    args = replace(
        source.args, max_seq_len=options.max_seq_len, max_batch_size=options.max_batch_size
    )
    world = parallel.world_size()
    parallel.check_world(world, args.n_heads)
    quantize, kv_cache, offload = options.quantize, options.kv_cache, options.offload
    reserve = options.prefix_cache_mb * 1_000_000
    say(memory.preflight(args, world, dtype, device, quantize, kv_cache, reserve, offload))
    if args.max_seq_len > source.args.max_seq_len:
        say(f"note: {options.ckpt_dir} was trained for {source.args.max_seq_len} tokens at most")
    tokenizer = open_tokenizer(source, options.tokenizer_path)
    draft, draft_path = None, None
    if options.draft_ckpt_dir is not None:
        draft_path = remote.local_path(options.draft_ckpt_dir)
        reserve += draft_bytes(draft_path, args, dtype, options.draft_quantize)
    model = prepare(
        source, args, device=device, dtype=dtype, quantize=quantize,
        kv_cache=kv_cache, compile=options.compile, offload=offload, reserve=reserve,
    )  # fmt: skip
    if draft_path is not None:
        draft = prepare_draft(
            draft_path, args, tokenizer, device=device,
            dtype=dtype, quantize=options.draft_quantize, compile=options.compile,
        )  # fmt: skip
    took = f"{time.monotonic() - start:.1f} s"
    placement = getattr(model, "placement", None)  # of an offloaded one
    say(f"loaded {options.ckpt_dir} in {took}" + (f"; {placement}" if placement else ""))
    return Built(model, tokenizer, draft, source)


def open_checkpoint(ckpt_dir: str | Path, adapter_dir: Optional[str | Path] = None) -> Checkpoint:
    """A checkpoint, with an adapter in its weights if there is to be one; each remote or not.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a broken checkpoint, or an adapter of another model.
    """
    source = checkpoint.open(remote.local_path(ckpt_dir))
    if adapter_dir is None:
        return source
    return Merged(source, read_adapter(remote.local_path(adapter_dir), source.args))


def open_tokenizer(source: Checkpoint, tokenizer_path: Optional[str | Path] = None) -> Tokenizer:
    """The tokenizer at a path, or the one that is found with a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one with more tokens than the model knows.
    """
    path = tokenizer_path or source.tokenizer_path
    if path is None:
        raise FileNotFoundError(
            f"no tokenizer.model in {source.path}: copy it there or pass tokenizer_path"
        )
    tokenizer = Tokenizer(remote.local_path(path))
    if tokenizer.n_words > source.args.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.n_words} tokens and the model in {source.path} "
            f"knows {source.args.vocab_size}: they don't belong together"
        )
    return tokenizer


def prepare(
    source: Checkpoint,
    args: ModelArgs,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Optional[Literal["int8", "int4"]] = None,
    kv_cache: Optional[Literal["int8"]] = None,
    compile: bool = False,
    offload: Optional[Literal["auto"]] = None,
    reserve: int = 0,
) -> Transformer:
    """Load this rank's part of a checkpoint; the arguments are those of `Llama.build`.

    Args:
        reserve: bytes that offload leaves to others (prefixes, a draft).

    Raises:
        ValueError: an unknown quantize, kv_cache or offload, what can't be compiled, or what can't
            fit even so; and what `checkpoint.load` raises.
    """
    if compile and device.type == "cpu":
        cpu.check(args, device, dtype)  # before what may take minutes
    plan = None
    if offload is not None:
        plan = offloaded.plan(
            source, args, parallel.world_size(), dtype, device,
            quantize=quantize, kv_cache=kv_cache, compile=compile, reserve=reserve,
        )  # fmt: skip
    if plan is not None:
        model = offloaded.load(source, args, plan, dtype=dtype, device=device)
    elif quantize is None:
        model = Transformer(args, device="meta")
        checkpoint.load(source, model, dtype=dtype, device=device)
    else:
        model = Transformer(args, device="meta")
        quantized.load(source, model, quantize, dtype=dtype, device=device)
    if kv_cache is not None:
        model.new_cache = partial(model.new_cache, cache_type=Int8KVCache)  # type: ignore[method-assign]
    if compile and device.type == "cpu":
        cpu.swap(model)
    elif compile:
        from llama.backends import compiled

        compiled.swap(model)
    return model


def draft_bytes(
    path: Path, args: ModelArgs, dtype: torch.dtype, quantize: Optional[Literal["int8", "int4"]]
) -> int:
    """What `prepare_draft` is going to take on each rank."""
    args = _draft_args(checkpoint.open(path), args)
    return memory.estimate(args, parallel.world_size(), dtype, quantize).total


def _draft_args(source: Checkpoint, args: ModelArgs) -> ModelArgs:
    return replace(source.args, max_seq_len=args.max_seq_len, max_batch_size=args.max_batch_size)


def prepare_draft(
    path: Path,
    args: ModelArgs,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Optional[Literal["int8", "int4"]] = None,
    compile: bool = False,
) -> Transformer:
    """Load the model that guesses for one with these arguments and this tokenizer.

    Raises:
        ValueError: one with another vocabulary, or too little memory; and what `prepare` raises.
    """
    source = checkpoint.open(path)
    if source.args.vocab_size != args.vocab_size or (
        source.tokenizer_path is not None and not tokenizer.agrees(Tokenizer(source.tokenizer_path))
    ):
        raise ValueError(
            f"{path} has another vocabulary ({source.args.vocab_size} tokens) than the model "
            f"({args.vocab_size}): a draft is a smaller model with the same tokenizer"
        )
    args = _draft_args(source, args)
    world = parallel.world_size()
    parallel.check_world(world, args.n_heads)
    memory.preflight(args, world, dtype, device, quantize)
    return prepare(source, args, device=device, dtype=dtype, quantize=quantize, compile=compile)


def say(text: str) -> None:
    """A line about progress, on stderr, from one rank."""
    if parallel.is_rank_zero():
        print(text, file=sys.stderr, flush=True)
