"""What the layers of each family of networks are to the CPU kernels."""

from ctypes import addressof
from typing import Any, Iterable, List, Optional

import torch
from fairscale.nn.model_parallel.layers import RowParallelLinear
from torch import nn

from llama.backends.cpu import kernels
from llama.backends.cpu.packing import Packed
from llama.families.llama4 import Llama4Args, MixtureOfExperts
from llama.families.variants import VariantArgs
from llama.families.vision_encoder import VisionArgs
from llama.layers import parallel
from llama.model import ModelArgs, TransformerBlock

MAX_HEAD, MAX_GROUP = 256, 64  # as in attention.h: MAX_HEAD, QUERIES
WIDTH = 32  # the kernels take widths that are multiples of this
DTYPES = (torch.float32, torch.bfloat16)  # of activations


def check(
    args: ModelArgs, device: torch.device, dtype: torch.dtype, types: Iterable[str] = ()
) -> None:
    """Check, before a model is loaded, that `swap` supports it, and compile the kernels.

    Args:
        types: of its weights, as in kernels.KINDS.

    Raises:
        ValueError: what `check_shape` raises; no compiler.
    """
    check_shape(args, device, dtype, parallel.world_size())
    kernels.add_types(types)


def check_shape(args: ModelArgs, device: torch.device, dtype: torch.dtype, world: int) -> None:
    """Check that the kernels compute such a model on each of `world` ranks.

    Raises:
        ValueError: an unsupported device, dtype or shape.
    """
    if type(args) not in (ModelArgs, VisionArgs, Llama4Args, VariantArgs):
        raise ValueError(f"the CPU kernels don't know the network of {type(args).__name__}")
    for what, value, known in (
        ("device", device.type, ("cpu",)),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            choices = " or ".join(map(str, known))
            raise ValueError(f"the CPU kernels take {what} {choices}, not {value}")
    widths = {
        "dim": args.dim,
        "head_dim": args.head_dim,
        "the heads of a rank": args.n_heads // world * args.head_dim,
        "hidden_dim of a rank": parallel.padded(args.hidden_dim, world) // world,
    }
    if isinstance(args, Llama4Args) and args.expert_dim is not None:
        widths["expert_dim of a rank"] = parallel.padded(args.expert_dim, world) // world
    for name, width in widths.items():
        if width % WIDTH:
            way = ": another number of ranks may do" if world > 1 and "rank" in name else ""
            raise ValueError(
                f"the CPU kernels take widths that are multiples of {WIDTH}, and {name} is "
                f"{width}{way}"
            )
    sizes = {"head_dim": (args.head_dim, MAX_HEAD)}
    sizes["n_heads / n_kv_heads"] = (args.n_heads // args.n_kv_heads, MAX_GROUP)
    for name, (size, most) in sizes.items():
        if size > most:
            raise ValueError(f"the CPU kernels take a {name} of at most {most}, and this is {size}")


def linears_of(block: TransformerBlock) -> List[nn.Module]:
    """Those of kernels.MATRICES, and w1, w3 and w2 of each expert beside the shared one."""
    network: Any = block.feed_forward
    mixed = isinstance(network, MixtureOfExperts)
    shared = network.shared_expert if mixed else network
    children = {**dict(block.attention.named_children()), **dict(shared.named_children())}
    experts = [m for one in network.experts for m in (one.w1, one.w3, one.w2)] if mixed else []
    return [*(children[name] for name in kernels.MATRICES), *experts]


def attending(args: ModelArgs, layer: int) -> kernels.Attending:
    """How a layer's attention differs from Llama's."""
    if isinstance(args, VariantArgs):
        no_rope = layer in args.no_rope_layers
        return kernels.Attending(no_rope=no_rope, window=args.sliding_window)
    if not isinstance(args, Llama4Args):
        return kernels.Attending()
    rope, grows = args.has_rope(layer), args.attn_temperature_tuning
    return kernels.Attending(
        no_rope=not rope,
        qk_norm=rope and args.use_qk_norm,
        chunk=(rope and args.attention_chunk_size) or 0,
        floor_scale=args.floor_scale,
        attn_scale=0.0 if rope or not grows else args.attn_scale,
    )


def bias_of(linear: nn.Module) -> Optional[torch.Tensor]:
    """This rank's part of a layer's bias, if it has one; of sums over ranks, rank 0 adds it."""
    bias: Optional[torch.Tensor] = getattr(linear, "bias", None)
    summed = isinstance(linear, RowParallelLinear) or getattr(linear, "reduce", False)
    return None if bias is None or (summed and parallel.rank()) else bias.detach().float()


class Mixture:
    """A layer's experts, as the kernels take them.

    Args:
        packed: w1, w3 and w2 of each.
    """

    def __init__(self, network: MixtureOfExperts, packed: List[Packed]):
        self.router = network.router.weight.detach().float().contiguous()
        self.matrices = (kernels.Weight * len(packed))(*(weight.struct for weight in packed))
        self.n, self.top_k = len(self.router), network.top_k
        self.struct = kernels.Experts(
            self.n, self.top_k, self.router.data_ptr(), addressof(self.matrices)
        )
        self.address = addressof(self.struct)


def mixture_of(network: nn.Module, packed: List[Packed]) -> Optional[Mixture]:
    """The experts of a layer, of whose weights in `linears_of`'s order; None: it has none."""
    if not isinstance(network, MixtureOfExperts):
        return None
    return Mixture(network, packed[len(kernels.MATRICES) :])
