"""What the CPU kernels support."""

import torch

from llama.backends.cpu import kernels
from llama.families.llama4 import Llama4Args
from llama.families.variants import VariantArgs
from llama.layers import parallel
from llama.layers.paged import PAGE
from llama.model import ModelArgs

MAX_HEAD, MAX_GROUP = 256, 64  # as in attention.h: MAX_HEAD, QUERIES
WIDTH = 32  # widths are multiples of this
DTYPES = (torch.float32, torch.bfloat16)  # of activations


def check(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> None:
    """Check, before a model is loaded, that `swap` supports it, and compile the kernels.

    Raises:
        ValueError: an unsupported device, dtype or shape; no compiler.
    """
    if type(args) not in (ModelArgs, Llama4Args, VariantArgs):
        raise ValueError(f"compile=True supports Llama's own network, not {type(args).__name__}'s")
    for what, value, known in (
        ("device", device.type, ("cpu",)),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            choices = " or ".join(map(str, known))
            raise ValueError(f"compile=True supports {what} {choices}, not {value}")
    world = parallel.world_size()
    widths = {
        "dim": args.dim,
        "head_dim": args.head_dim,
        "the heads of a rank": args.n_heads // world * args.head_dim,
        "hidden_dim of a rank": parallel.padded(args.hidden_dim, world) // world,
    }
    if isinstance(args, Llama4Args):
        if args.expert_dim is not None:
            widths["expert_dim of a rank"] = parallel.padded(args.expert_dim, world) // world
        if (args.attention_chunk_size or 0) % PAGE:
            raise ValueError(
                f"compile=True takes chunks of attention of a multiple of {PAGE} positions, not "
                f"{args.attention_chunk_size}: build with compile=False"
            )
    for name, width in widths.items():
        if width % WIDTH:
            raise ValueError(
                f"compile=True takes widths that are multiples of {WIDTH}, and {name} is {width}: "
                "build with compile=False, or on another number of ranks"
            )
    sizes = {"head_dim": (args.head_dim, MAX_HEAD)}
    sizes["n_heads / n_kv_heads"] = (args.n_heads // args.n_kv_heads, MAX_GROUP)
    for name, (size, most) in sizes.items():
        if size > most:
            raise ValueError(
                f"compile=True takes a {name} of at most {most}, and this is {size}: "
                "build with compile=False"
            )
    kernels.library()
