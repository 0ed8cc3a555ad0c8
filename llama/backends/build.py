"""A model as it was asked for: dense or in blocks, plain or compiled, with an adapter, a draft."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import torch

from llama import checkpoint
from llama.backends import cpu, memory, offloaded, quantized
from llama.checkpoint import Checkpoint, remote
from llama.checkpoint.adapter import Merged, read_adapter
from llama.engine.prefixes import PrefixCache
from llama.layers import parallel
from llama.layers.cache import Int8KVCache
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer


class Built(NamedTuple):
    """What a `Llama` is made of."""

    model: Transformer
    tokenizer: Tokenizer
    draft: Optional[Transformer]
    prefixes: Optional[PrefixCache]


def assemble(
    ckpt_dir: str | Path,
    tokenizer_path: Optional[str | Path],
    max_seq_len: int,
    max_batch_size: int,
    model_parallel_size: Optional[int],
    *,
    device: Optional[str | torch.device],
    dtype: Optional[str | torch.dtype],
    quantize: Optional[Literal["int8", "int4"]],
    kv_cache: Optional[Literal["int8"]],
    compile: bool,
    draft_ckpt_dir: Optional[str | Path],
    draft_quantize: Optional[Literal["int8", "int4"]],
    prefix_cache_mb: int,
    adapter_dir: Optional[str | Path],
    offload: Optional[Literal["auto"]],
) -> Built:
    """Open, check and load. Arguments and errors are those of `Llama.build`."""
    for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if prefix_cache_mb < 0:
        raise ValueError(f"prefix_cache_mb={prefix_cache_mb} must be 0 (none) or more")
    start = time.monotonic()
    torch_device = parallel.initialize(model_parallel_size, device)
    torch_dtype = parallel.pick_dtype(dtype, torch_device)
    source = open_checkpoint(ckpt_dir, adapter_dir)
    args = replace(source.args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    world = parallel.world_size()
    parallel.check_world(world, args.n_heads)
    limit = prefix_cache_mb * 1_000_000
    say(
        memory.preflight(args, world, torch_dtype, torch_device, quantize, kv_cache, limit, offload)
    )
    if max_seq_len > source.args.max_seq_len:
        say(f"note: {ckpt_dir} was trained for {source.args.max_seq_len} tokens at most")
    tokenizer = open_tokenizer(source, tokenizer_path)
    draft, reserve = None, limit
    draft_path = remote.local_path(draft_ckpt_dir) if draft_ckpt_dir else None
    if draft_path is not None:
        reserve += draft_bytes(draft_path, args, torch_dtype, draft_quantize)
    model = prepare(
        source, args, device=torch_device, dtype=torch_dtype, quantize=quantize,
        kv_cache=kv_cache, compile=compile, offload=offload, reserve=reserve,
    )  # fmt: skip
    if draft_path is not None:
        draft = prepare_draft(
            draft_path, args, tokenizer, device=torch_device,
            dtype=torch_dtype, quantize=draft_quantize, compile=compile,
        )  # fmt: skip
    say(f"loaded {ckpt_dir} in {time.monotonic() - start:.1f} s{offloaded.placement(model)}")
    prefixes = None
    if limit:
        kind = " ".join(filter(None, (str(torch_dtype)[6:], quantize, kv_cache and "int8 cache")))
        prefixes = PrefixCache(limit, lambda: f"{checkpoint.fingerprint(source)} {kind}")
    return Built(model, tokenizer, draft, prefixes)


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
    if offload not in (None, "auto"):
        raise ValueError(f"offload={offload!r}: choose 'auto' or None, all in memory")
    if kv_cache not in (None, "int8"):
        raise ValueError(f"kv_cache={kv_cache!r}: choose 'int8' or None, the model's dtype")
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
        model.cache_type = Int8KVCache
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
