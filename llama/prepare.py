"""A model as it was asked for: dense or in blocks, its cache too, plain or compiled."""

from dataclasses import replace
from pathlib import Path
from typing import Literal, Optional

import torch

from llama import checkpoint, memory, native, parallel
from llama import quantize as quantization
from llama.cache import Int8KVCache
from llama.checkpoint import Checkpoint
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer


def prepare(
    source: Checkpoint,
    args: ModelArgs,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Optional[Literal["int8", "int4"]] = None,
    kv_cache: Optional[Literal["int8"]] = None,
    compile: bool = False,
) -> Transformer:
    """Load this rank's part of a checkpoint; the arguments are those of `Llama.build`.

    Raises:
        ValueError: an unknown quantize or kv_cache, or what can't be compiled; and what
            `checkpoint.load` raises.
    """
    if kv_cache not in (None, "int8"):
        raise ValueError(f"kv_cache={kv_cache!r}: choose 'int8' or None, the model's dtype")
    if compile and device.type == "cpu":
        native.check(args, device, dtype)  # before what may take minutes
    model = Transformer(args, device="meta")
    if quantize is None:
        checkpoint.load(source, model, dtype=dtype, device=device)
    else:
        quantization.load(source, model, quantize, dtype=dtype, device=device)
    if kv_cache is not None:
        model.cache_type = Int8KVCache
    if compile and device.type == "cpu":
        native.swap(model)
    elif compile:
        from llama import compiled

        compiled.swap(model)
    return model


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
    args = replace(source.args, max_seq_len=args.max_seq_len, max_batch_size=args.max_batch_size)
    world = parallel.world_size()
    parallel.check_world(world, args.n_heads)
    memory.preflight(args, world, dtype, device, quantize)
    return prepare(source, args, device=device, dtype=dtype, quantize=quantize, compile=compile)
