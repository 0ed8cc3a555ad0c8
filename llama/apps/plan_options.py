"""What `llama plan` is asked."""

from dataclasses import KW_ONLY, dataclass
from math import isfinite
from typing import Literal, Optional


@dataclass(frozen=True)
class PlanOptions:
    """What is to be served, on which machines, to whom.

    Attributes:
        model: a checkpoint, of which only the shape is read, or the name of a published shape: 1b,
            3b, 8b, 70b, 405b.
        machine: h100, h200, a100, l40s, l4 or xeon, with the figures of their vendors' data sheets;
            or a file that --measure has written.
        dtype: of activations, cache and dense weights.
        quantize: int8 or int4; by default weights as a file stores them on CPUs, else dense.
        kv_cache: int8 stores keys and values in 8 bits.
        rate: requests per second, in the busiest hour.
        per_day: requests of a day, in place of a rate: all its hours are simulated.
        peak: the busiest hour's share of a day, over that of the average hour.
        prompt: tokens of a prompt, the median, after the shared ones.
        answer: tokens of an answer, the median.
        shared: tokens with which all prompts begin, such as a system prompt.
        first: seconds to the first token, which 99 % of requests shall not exceed.
        between: seconds between two tokens, which 95 % shall not exceed.
        replicas: copies of the model; by default as few as meet `first` and `between`.
        tensor: devices that share a copy; by default 1, 2, 4, ... are compared.
        network: Gbit/s of each machine, where a copy spans several.
        max_seq_len: tokens of prompt and answer together.
        max_rows: sequences that a replica computes at once.
        max_tokens_per_step: tokens of a forward pass at most.
        requests: of each simulated window.
        seed: of the random numbers.

    Raises:
        ValueError: a value out of range, by name.
    """

    model: str
    _: KW_ONLY
    machine: str = "h100"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    quantize: Optional[Literal["int8", "int4", "dense"]] = None
    kv_cache: Optional[Literal["int8"]] = None
    rate: float = 10.0
    per_day: Optional[float] = None
    peak: float = 1.6
    prompt: int = 1020
    answer: int = 129
    shared: int = 0
    first: float = 2.0
    between: float = 0.1
    replicas: Optional[int] = None
    tensor: Optional[int] = None
    network: float = 100.0
    max_seq_len: int = 8192
    max_rows: int = 64
    max_tokens_per_step: int = 512
    requests: int = 400
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("prompt", 1), ("answer", 1), ("shared", 0), ("replicas", 1), ("tensor", 1),
            ("max_rows", 1), ("max_tokens_per_step", 1), ("requests", 20), ("max_seq_len", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        for name in ("rate", "per_day", "first", "between", "network"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ValueError(f"{name}={value} must be more than 0, and finite")
        if not 1 <= self.peak <= 2:
            raise ValueError(f"peak={self.peak} must be between 1 and 2")
        needed = self.shared + self.prompt + self.answer
        if needed > self.max_seq_len:
            raise ValueError(
                f"shared={self.shared}, prompt={self.prompt} and answer={self.answer} are {needed} "
                f"tokens, and max_seq_len={self.max_seq_len}: raise it, or shorten these"
            )
