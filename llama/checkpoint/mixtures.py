"""What llama.cpp quantizes each weight to: its K-quant files are mixtures of several types.

Source: github.com/ggml-org/llama.cpp, src/llama-quant.cpp. The output, which a tied embedding is as
well, and in some layers wv and w2 get more bits: rounding them costs the most.
"""

import re

from llama.checkpoint import ggml
from llama.checkpoint.source import Shape
from llama.model import ModelArgs

# The type of most weights, and the one of those that get more bits.
MIXTURES = {
    "Q4_K_S": ("Q4_K", "Q5_K"),
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q5_K_S": ("Q5_K", "Q5_K"),
    "Q5_K_M": ("Q5_K", "Q6_K"),
    "Q6_K": ("Q6_K", "Q6_K"),
}

# Types of blocks of 32 values, for rows that aren't whole blocks of 256.
NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def kind_of(name: str, shape: Shape, args: ModelArgs, wanted: str) -> str:
    """The dtype or quantization type in which a weight is written.

    Args:
        name: Meta's.
        wanted: what most weights are to be, or a mixture: "Q8_0", "Q4_K_M", ...
    """
    if len(shape) == 1 or name.endswith(".router.weight"):
        return "F32"
    kind = _chosen(name, args, wanted) if wanted in MIXTURES else wanted
    for fits in (kind, NARROW.get(kind, "F16")):
        if shape[-1] % ggml.block(fits)[0] == 0:
            return fits
    return "F16"


def _chosen(name: str, args: ModelArgs, mixture: str) -> str:
    most, more = MIXTURES[mixture]
    if name == ("tok_embeddings.weight" if args.tied_embeddings else "output.weight"):
        return "Q6_K"
    layer = re.fullmatch(r"layers\.(\d+)\.(attention\.wv|feed_forward\..*w2)\.weight", name)
    if layer is None:
        return most
    i, n, is_values = int(layer[1]), args.n_layers, layer[2] == "attention.wv"
    if mixture.endswith("_S"):
        better = i < (4 if is_values else n // 8)
    else:
        better = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    if better:
        return more
    # Llama 2 70B's and Llama 3 70B's wv is small, as 8 heads share keys and values.
    is_70b = n == 80 and args.n_kv_heads != args.n_heads
    return "Q5_K" if is_70b and is_values and most == "Q4_K" else most
