"""How a model is built: one dataclass for the Python API, every sub-command and the benchmarks.

torch isn't imported, so that `llama --help` needn't wait for it.
"""

from dataclasses import KW_ONLY, dataclass
from functools import wraps
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Literal, Optional, ParamSpec, TypeAlias, TypeVar

if TYPE_CHECKING:
    import torch

    Device: TypeAlias = str | torch.device
    DType: TypeAlias = str | torch.dtype
else:  # the command line reads these hints, and has names only
    Device = DType = str


DEVICES = ("cuda", "mps", "cpu")


@dataclass(frozen=True)
class ModelOptions:
    """How a model is built. The first six are Meta's, in Meta's order.

    Attributes:
        ckpt_dir: a directory with Meta's params.json and consolidated.*.pth, with Hugging Face's
            config.json and *.safetensors, or with a .gguf file; or a .gguf file. It may be remote
            (hf://owner/repo on the Hugging Face Hub, https://, gs://, az://): then it is downloaded
            once, into a cache.
        tokenizer_path: Llama 3's tokenizer.model, a tokenizer.json or a .gguf file, remote or not;
            by default the one found with the checkpoint.
        max_seq_len: tokens of prompt and answer together, 1 or more.
        max_batch_size: sequences computed at once, 1 or more.
        model_parallel_size: ranks that share one copy of the model; all of them by default.
        seed: of the random numbers of requests that give none of their own, 0 or more.
        device: cuda, mps or cpu; by default the first of these that is available.
        dtype: bf16, fp16 or fp32, of weights, activations and cache; by default bf16 where the
            hardware has it, else fp32.
        quantize: quantize matrices to 8 or 4 bits as they are loaded; those that a GGUF file
            already holds in no more bits are kept as they are. By default the CPU kernels compute
            with what the file holds, quantized or not, and other layers with dense weights, as
            with dense everywhere.
        kv_cache: int8 stores keys and values in 8 bits, half the memory of bf16.
        compile: the CPU kernels, compiled once per machine in some seconds, or torch.compile on
            other devices. By default the kernels wherever they can serve, else the plain layers;
            False, or --no-compile: the plain layers, for training, hooks and masks.
        draft_ckpt_dir: a smaller model with the same tokenizer, for speculative decoding.
        draft_quantize: like quantize, for the draft model.
        prefix_cache_mb: memory for prefix caching, in MB (10^6 bytes) on each rank: keys and values
            of earlier prompts, which prompts that begin alike need not compute again. 0: none.
        adapter_dir: a LoRA adapter in PEFT's layout, merged into the weights as they are loaded.
        offload: auto streams the layers that don't fit into memory from disk for each pass; slow,
            but any model runs that fits on the disk.
        broadcast_weights: ranks that don't find the checkpoint, on other machines, get it from
            rank 0, each its part of the weights, into memory.
        rank_timeout: seconds without a sign of life of another rank, as it is dead, stopped or cut
            off, after which this one ends, 1 or more. They have five times that for starting.

    Raises:
        ValueError: a value out of range, by name.
    """

    ckpt_dir: str | Path
    tokenizer_path: Optional[str | Path] = None
    max_seq_len: int = 2048
    max_batch_size: int = 8
    model_parallel_size: Optional[int] = None
    seed: int = 1
    _: KW_ONLY
    device: Optional[Device] = None
    dtype: Optional[DType] = None
    quantize: Optional[Literal["int8", "int4", "dense"]] = None
    kv_cache: Optional[Literal["int8"]] = None
    compile: Optional[bool] = None
    draft_ckpt_dir: Optional[str | Path] = None
    draft_quantize: Optional[Literal["int8", "int4", "dense"]] = None
    prefix_cache_mb: int = 0
    adapter_dir: Optional[str | Path] = None
    offload: Optional[Literal["auto"]] = None
    broadcast_weights: bool = False
    rank_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_batch_size", "seed", "prefix_cache_mb"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"{name}={getattr(self, name)!r} isn't a whole number")
        if self.seed >= 1 << 63:
            raise ValueError(f"seed={self.seed} must be less than 2**63")
        for name, least in (
            ("max_seq_len", 1), ("max_batch_size", 1), ("seed", 0), ("prefix_cache_mb", 0),
            ("rank_timeout", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if isinstance(self.device, str) and self.device.partition(":")[0] not in DEVICES:
            raise ValueError(f"device={self.device!r}: choose one of {', '.join(DEVICES)}")
        for name, known in (
            ("quantize", ("int8", "int4", "dense")),
            ("draft_quantize", ("int8", "int4", "dense")),
            ("kv_cache", ("int8",)),
            ("offload", ("auto",)),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}, or None")
        if self.draft_quantize and self.draft_ckpt_dir is None:
            raise ValueError(
                f"draft_quantize={self.draft_quantize!r}: there is no draft model; name it as "
                "draft_ckpt_dir"
            )
        if self.offload and self.broadcast_weights:
            raise ValueError("offload streams from each machine's disk: not with broadcast_weights")


P = ParamSpec("P")
Options = TypeVar("Options")
T = TypeVar("T")


def takes(options: Callable[P, Options]) -> Callable[[Callable[[Options], T]], Callable[P, T]]:
    """Decorator: a function of one options object is called with that object's fields instead."""

    def decorate(function: Callable[[Options], T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return function(options(*args, **kwargs))

        call.__signature__ = signature(options)  # type: ignore[attr-defined]
        return call

    return decorate
