"""Kinds of machines, and what a pass of a model takes on them."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch

from llama import checkpoint
from llama.apps.plan_options import PlanOptions
from llama.backends.build import resolve_quantize
from llama.checkpoint import Checkpoint, remote
from llama.engine.simulation import Cost, Pass, fit
from llama.families.llama4 import Llama4Args
from llama.model import ModelArgs

LLAMA3: Dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256}
SHAPES = {  # as published with Llama 3.1 and 3.2
    "1b": ModelArgs(2048, 16, 32, hidden_dim=8192, tied_embeddings=True, **LLAMA3),
    "3b": ModelArgs(3072, 28, 24, hidden_dim=8192, tied_embeddings=True, **LLAMA3),
    "8b": ModelArgs(4096, 32, 32, hidden_dim=14336, **LLAMA3),
    "70b": ModelArgs(8192, 80, 64, hidden_dim=28672, **LLAMA3),
    "405b": ModelArgs(16384, 126, 128, hidden_dim=53248, **LLAMA3),
}


class Kind(NamedTuple):
    """A kind of machine; figures of one of its devices."""

    devices: int
    bandwidth: float  # bytes/s of its memory
    flops: float  # of dense bf16 products, per second
    memory: float  # bytes
    link: float  # bytes/s between devices of a machine, in one direction
    device: str = "cuda"


KINDS = {  # from the vendors' data sheets
    "h100": Kind(8, 3.35e12, 989e12, 80e9, 450e9),  # SXM
    "h200": Kind(8, 4.8e12, 989e12, 141e9, 450e9),
    "a100": Kind(8, 2.039e12, 312e12, 80e9, 300e9),  # SXM
    "l40s": Kind(8, 864e9, 362e12, 48e9, 32e9),  # PCIe 4
    "l4": Kind(8, 300e9, 121e12, 24e9, 32e9),
    "xeon": Kind(1, 307e9, 115e12, 512e9, 0, "cpu"),  # Platinum 8480+: AMX, 8 channels of DDR5
}


class Efficiency(NamedTuple):
    """Shares of a machine's figures that passes reach, and the seconds that a row takes beside."""

    bandwidth: float
    flops: float
    row: float


# Rounded from what passes of a 1B model reached on 2 cores of a Xeon with AMX: docs/scaling.md.
EFFICIENCY = {"dense": Efficiency(0.9, 0.6, 2e-4), "quantized": Efficiency(0.7, 0.25, 2e-4)}
LAYER = 1e-4  # seconds of a GPU's layer beside its memory's: kernels launched one by one. Assumed
LATENCY = {"link": 2e-5, "network": 1e-4}  # seconds of a collective. Assumed


class Measured(NamedTuple):
    """A file that `llama plan --measure` wrote."""

    model: Dict[str, Any]  # its `identity`
    work: Tuple[float, float]  # of a pass and of a token, see `work`
    kind: Kind
    passes: List[Tuple[Pass, float]]

    @classmethod
    def read(cls, path: str) -> "Measured":
        """Raises ValueError: neither a kind of machine nor a file with measurements."""
        try:
            found = json.loads(Path(path).read_text())
            passes = [(Pass(*map(int, one[:4])), float(one[4])) for one in found["passes"]]
            read, flops = map(float, found["work"])
            return cls(found["model"], (read, flops), Kind(**found["kind"]), passes)
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            raise ValueError(
                f"machine={path!r}: choose one of {', '.join(KINDS)}, or a file that "
                "llama plan --measure has written"
            ) from None

    @property
    def efficiency(self) -> Efficiency:
        """What the measured passes reached of this machine's figures."""
        cost = fit(self.passes)
        (_, one), *_, (n, before), (m, last) = cost.points
        read, flops = self.work
        products = flops * (m - n) / (last - before)
        return Efficiency(read / one / self.kind.bandwidth, products / self.kind.flops, cost.row)


def opened(model: str) -> Tuple[ModelArgs, Optional[Checkpoint]]:
    """Raises FileNotFoundError: neither a checkpoint nor the name of a shape."""
    if model in SHAPES:
        return SHAPES[model], None
    try:
        source = checkpoint.open(remote.local_path(model))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or name a shape: {', '.join(SHAPES)}") from None
    return source.args, source


def stored(
    options: PlanOptions, source: Optional[Checkpoint], device: torch.device
) -> Optional[str]:
    """How weights are quantized; None: dense."""
    if source is None:
        return None if options.quantize == "dense" else options.quantize
    return resolve_quantize(options.quantize, source, device, True)


def identity(args: ModelArgs, options: PlanOptions, quantize: Optional[str]) -> Dict[str, Any]:
    """What models have in common whose passes take as long, as JSON has it."""
    shape = asdict(replace(args, max_seq_len=1, max_batch_size=1))
    how = {"dtype": options.dtype, "quantize": quantize, "kv_cache": options.kv_cache}
    found: Dict[str, Any] = json.loads(json.dumps({"args": shape, **how}))
    return found


def work(args: ModelArgs, weights: int) -> Tuple[float, float]:
    """Bytes of weights that a pass reads, and floating-point operations of each of its tokens."""
    shapes = {name: math.prod(shape) for name, shape in checkpoint.weight_shapes(args).items()}
    whole = sum(shapes.values())
    used = sum(n for name, n in shapes.items() if not name.startswith("vision_"))  # text has none
    if not args.tied_embeddings:
        used -= shapes["tok_embeddings.weight"]  # of which a token reads one row
    others = 0.0  # experts that a token doesn't take, and those of a pass together do
    if isinstance(args, Llama4Args) and args.num_experts:
        experts = sum(n for name, n in shapes.items() if ".experts." in name)
        others = experts * (1 - args.top_k / args.num_experts)
    return weights * used / whole, 2.0 * (used - others)


def estimated(
    kind: Kind, args: ModelArgs, tensor: int, weights: int, position: float, itemsize: int,
    reached: Efficiency, network: float,
) -> Cost:  # fmt: skip
    """The cost of a pass from a machine's figures (roofline): weights are read, or products
    computed, whichever takes longer; two all-reduces of each layer, in a ring; attention.

    Args:
        tensor: devices that share the model.
        weights, position: bytes of a device's weights, and of its keys and values of a position.
        itemsize: bytes of an activation.
        network: bytes/s between machines.
    """
    whole, flops = work(args, weights)
    bandwidth, speed = kind.bandwidth * reached.bandwidth, kind.flops * reached.flops * tensor
    read, token = whole / bandwidth, flops / speed
    waits, moved = args.n_layers * (LAYER if kind.device == "cuda" else 0.0), 0.0
    if tensor > 1:
        inside, reductions = tensor <= kind.devices, 2 * args.n_layers
        waits += reductions * LATENCY["link" if inside else "network"]
        sent = 2 * (tensor - 1) / tensor * args.dim * itemsize  # of a token, by each device
        moved = reductions * sent / (kind.link if inside else network)
    knee = max(read / token, 2.0)
    at = ((1.0, read), (knee, read), (2 * knee, 2 * knee * token))
    points = tuple((n, waits + n * moved + seconds) for n, seconds in at)
    pair = 4 * args.n_layers * args.n_heads * args.head_dim / speed
    return Cost(points, reached.row, position / bandwidth, pair)
