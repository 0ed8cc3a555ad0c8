"""A model as it was asked for: dense or in blocks, its cache too, plain or compiled."""

from typing import Literal, Optional

import torch

from llama import checkpoint, native
from llama import quantize as quantization
from llama.cache import Int8KVCache
from llama.checkpoint import Checkpoint
from llama.model import ModelArgs, Transformer


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
