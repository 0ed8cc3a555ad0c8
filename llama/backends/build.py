"""Builds a model: dtype, quantization, compilation, offloading, adapters, draft model."""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Literal, Mapping, NamedTuple, Optional, Tuple

import torch

from llama import checkpoint
from llama.backends import cpu, memory, nodes, offloaded, quantized
from llama.backends.options import ModelOptions
from llama.checkpoint import Checkpoint
from llama.checkpoint.adapter import Merged, read_adapter
from llama.families.registry import build, family_of
from llama.layers import parallel
from llama.layers.cache import Int8KVCache
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer


class Built(NamedTuple):
    """Result of `assemble`."""

    model: Transformer
    tokenizer: Tokenizer
    draft: Optional[Transformer]
    fingerprint: Callable[[], str]  # `checkpoint.fingerprint`'s
    quantize: Optional[str]  # one of `quantized.KINDS`; None: dense


def assemble(options: ModelOptions) -> Built:
    """Open, check and load. Errors are those of `Llama.build`."""
    start = time.monotonic()
    device = parallel.initialize(options.model_parallel_size, options.device, options.rank_timeout)
    dtype = parallel.pick_dtype(options.dtype, device)
    lend = options.broadcast_weights
    same = ("max_seq_len", "max_batch_size", "quantize", "kv_cache", "prefix_cache_mb")
    settings = {"dtype": dtype, **{name: getattr(options, name) for name in same}}
    source = open_checkpoint(options.ckpt_dir, options.adapter_dir, lend, settings)
    args = replace(
        source.args, max_seq_len=options.max_seq_len, max_batch_size=options.max_batch_size
    )
    world = parallel.world_size()
    parallel.check_world(world, args.n_heads)
    kv_cache, offload = options.kv_cache, options.offload
    compile, obstacle = resolve_compile(
        options.compile, args, device, dtype, source, options.quantize
    )
    if obstacle:
        say(f"note: plain layers, several times slower than the CPU kernels: {obstacle}")
    quantize = resolve_quantize(options.quantize, source, device, compile)
    reserve = options.prefix_cache_mb * 1_000_000
    say(memory.preflight(args, world, dtype, device, quantize, kv_cache, reserve, offload, source))
    if cut := quantized.cut(source, quantize):
        say(
            f"note: {len(cut)} weights, as {cut[0]}, aren't kept as they are stored: their blocks "
            f"can't be shared out to {world} ranks"
        )
    if args.max_seq_len > source.args.max_seq_len:
        say(f"note: {options.ckpt_dir} was trained for {source.args.max_seq_len} tokens at most")
    if left_out := getattr(source, "left_out", 0):
        say(f"note: {left_out} weights of {options.ckpt_dir} are left out: text alone is computed")
    tokenizer = open_tokenizer(source, options.tokenizer_path, lend)
    draft, draft_source = None, None
    if options.draft_ckpt_dir is not None:
        draft_source = open_checkpoint(options.draft_ckpt_dir, lend=lend)
        reserve += draft_bytes(draft_source, args, dtype, options.draft_quantize)
    model = prepare(
        source, args, device=device, dtype=dtype, quantize=options.quantize,
        kv_cache=kv_cache, compile=options.compile, offload=offload, reserve=reserve,
    )  # fmt: skip
    if draft_source is not None:
        draft = prepare_draft(
            draft_source, args, tokenizer, device=device,
            dtype=dtype, quantize=options.draft_quantize, compile=options.compile,
        )  # fmt: skip
    for borrowed in (source, draft_source):
        if isinstance(borrowed, nodes.Borrowed):
            borrowed.close()
    known = source.fingerprint if isinstance(source, nodes.Borrowed) else None
    took = f"{time.monotonic() - start:.1f} s"
    placement = getattr(model, "placement", None)  # of an offloaded one
    say(f"loaded {options.ckpt_dir} in {took}" + (f"; {placement}" if placement else ""))

    def fingerprint() -> str:
        return known or checkpoint.fingerprint(source, args)

    return Built(model, tokenizer, draft, fingerprint, quantize)


def open_checkpoint(
    ckpt_dir: str | Path,
    adapter_dir: Optional[str | Path] = None,
    lend: bool = False,
    settings: Optional[Mapping[str, Any]] = None,
) -> Checkpoint:
    """Open a checkpoint, with an adapter merged into its weights if given; either may be remote.

    Args:
        lend, settings: see `nodes.open_on_all_ranks`; of remote files, only rank 0 has a copy then.

    Raises:
        FileNotFoundError: no checkpoint or adapter there.
        ValueError: a broken checkpoint, an adapter of another model, or other ones on other ranks.
    """

    def find() -> Checkpoint:
        source = checkpoint.open(nodes.local_path(ckpt_dir, lend))
        if adapter_dir is None:
            return source
        return Merged(source, read_adapter(nodes.local_path(adapter_dir, lend), source.args))

    return nodes.open_on_all_ranks(find, settings or {}, lend)


def open_tokenizer(
    source: Checkpoint, tokenizer_path: Optional[str | Path] = None, lend: bool = False
) -> Tokenizer:
    """The tokenizer at a path, by default the one found with the checkpoint.

    Args:
        lend: ranks that find none get rank 0's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has more tokens than the model's vocabulary, or is another on other ranks.
    """
    path = tokenizer_path or source.tokenizer_path

    def find() -> Tokenizer:
        if path is None:
            raise FileNotFoundError(
                f"no tokenizer.model in {source.path}: copy it there or pass tokenizer_path"
            )
        return Tokenizer(nodes.local_path(path, lend))

    tokenizer = nodes.tokenizer_on_all_ranks(find, lend)
    if tokenizer.n_words > source.args.vocab_size + family_of(source.args).extra_ids:
        raise ValueError(
            f"{path} has {tokenizer.n_words} tokens and the model in {source.path} "
            f"knows {source.args.vocab_size}: they don't belong together"
        )
    return tokenizer


def resolve_compile(
    compile: Optional[bool],
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    source: Checkpoint,
    quantize: Optional[str],
) -> Tuple[bool, Optional[str]]:
    """Whether to compile: as asked, or, by default, where the CPU kernels can serve; and why not.

    The kernels are compiled for the types that the weights will have.

    Raises:
        ValueError: compile=True, and they can't.
    """
    if compile and device.type != "cpu" and type(args) is not ModelArgs:
        raise ValueError(
            f"compile=True on {device.type} takes Llama's own network, and this has "
            f"{type(args).__name__}: build with compile=False"
        )
    if device.type != "cpu" or compile is False:
        return bool(compile), None
    kind = resolve_quantize(quantize, source, device, True)
    types = quantized.types(source, kind, dtype)
    try:
        cpu.check(args, device, dtype, types)
    except ValueError as error:
        if compile:
            raise ValueError(f"compile=True can't serve here, compile=False can: {error}") from None
        return False, str(error)
    return True, None


def resolve_quantize(
    quantize: Optional[str], source: Checkpoint, device: torch.device, compile: bool
) -> Optional[str]:
    """The option as one of `quantized.KINDS`, or None for dense weights.

    By default weights stay as they are stored where the kernels compute with them.
    """
    if quantize is None and compile and device.type == "cpu" and quantized.has_blocks(source):
        return "stored"
    return None if quantize == "dense" else quantize


def prepare(
    source: Checkpoint,
    args: ModelArgs,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Optional[str] = None,
    kv_cache: Optional[Literal["int8"]] = None,
    compile: Optional[bool] = None,
    offload: Optional[Literal["auto"]] = None,
    reserve: int = 0,
) -> Transformer:
    """Load this rank's part of a checkpoint; the arguments are those of `Llama.build`.

    Args:
        reserve: bytes that offload leaves free (for the prefix cache and a draft model).

    Raises:
        ValueError: an unknown quantize, kv_cache or offload, a model that can't be compiled, or one
            that doesn't fit even with offload; and what `checkpoint.load` raises.
    """
    # Before loading, which takes long.
    compiled, _ = resolve_compile(compile, args, device, dtype, source, quantize)
    quantize = resolve_quantize(quantize, source, device, compiled)
    plan = None
    if offload is not None:
        plan = offloaded.plan(
            source, args, parallel.world_size(), dtype, device,
            quantize=quantize, kv_cache=kv_cache, compile=compile, reserve=reserve,
        )  # fmt: skip
    if plan is not None:
        model, compiled = offloaded.load(source, args, plan, dtype=dtype, device=device), False
    elif quantize is None:
        model = build(args, device="meta")
        checkpoint.load(source, model, dtype=dtype, device=device)
    else:
        model = build(args, device="meta")
        quantized.load(source, model, quantize, dtype=dtype, device=device)
    if kv_cache is not None:
        model.new_cache = partial(model.new_cache, cache_type=Int8KVCache)  # type: ignore[method-assign]
    if compiled and device.type == "cpu":
        cpu.swap(model)
    elif compiled:
        from llama.backends import compiled as gpu

        gpu.swap(model)
    return model


def draft_bytes(
    source: Checkpoint, args: ModelArgs, dtype: torch.dtype, quantize: Optional[str]
) -> int:
    """Bytes that `prepare_draft` will take on each rank, at most."""
    args, kind = _draft_args(source, args), quantize if quantize != "dense" else None
    return memory.estimate(args, parallel.world_size(), dtype, kind).total


def _draft_args(source: Checkpoint, args: ModelArgs) -> ModelArgs:
    return replace(source.args, max_seq_len=args.max_seq_len, max_batch_size=args.max_batch_size)


def prepare_draft(
    source: Checkpoint,
    args: ModelArgs,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Optional[str] = None,
    compile: Optional[bool] = None,
) -> Transformer:
    """Load the draft model for a model with these arguments and this tokenizer.

    Raises:
        ValueError: it has another vocabulary, or too little memory; and what `prepare` raises.
    """
    if source.args.vocab_size != args.vocab_size or (
        source.tokenizer_path is not None and not tokenizer.agrees(Tokenizer(source.tokenizer_path))
    ):
        raise ValueError(
            f"{source.path} has another vocabulary ({source.args.vocab_size} tokens) than the "
            f"model ({args.vocab_size}): a draft model must have the same tokenizer"
        )
    args = _draft_args(source, args)
    world = parallel.world_size()
    parallel.check_world(world, args.n_heads)
    compiled, _ = resolve_compile(compile, args, device, dtype, source, quantize)
    kind = resolve_quantize(quantize, source, device, compiled)
    memory.preflight(args, world, dtype, device, kind, source=source)
    return prepare(source, args, device=device, dtype=dtype, quantize=quantize, compile=compile)


def say(text: str) -> None:
    """Print a line about progress to stderr, on rank 0."""
    if parallel.is_rank_zero():
        print(text, file=sys.stderr, flush=True)
