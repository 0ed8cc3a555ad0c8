"""NVIDIA's Model Optimizer (ModelOpt): 8-bit floats (e4m3) and NVFP4, a scheme for each module.

    FP8                        weight (out, in)      e4m3   weight_scale ()
    FP8_PER_CHANNEL_PER_TOKEN  weight (out, in)      e4m3   weight_scale (out,)
    FP8_PB_WO                  weight (out, in)      e4m3   weight_scale (out / 128, 1, in / 128, 1)
    NVFP4, W4A16_NVFP4         weight (out, in / 2)  uint8  weight_scale (out, in / 16)  e4m3
                                                            weight_scale_2 ()            fp32

All mean value = weight_scale · q, of NVFP4 weight_scale · weight_scale_2 · q. Which modules have
which follows from their tensors. Activations and the cache stay as they are (see `fp8`). Older
releases say what they are in hf_quant_config.json beside config.json.

Source: github.com/NVIDIA/Model-Optimizer, modelopt/torch/export.
"""

from typing import Any, Dict, Mapping, Optional

from llama.checkpoint.schemes.fp4 import NVFP4Weight
from llama.checkpoint.schemes.fp8 import UNUSED, Block, FP8Weight
from llama.checkpoint.schemes.weight import QuantizedWeight, only
from llama.checkpoint.source import Stored

ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION",
)  # fmt: skip


class ModelOpt:
    def __init__(self, config: Mapping[str, Any]):
        algorithm = config.get("quant_algo")
        if str(algorithm).upper() not in ALGORITHMS:
            raise ValueError(f"quant_algo={algorithm!r}; read here: {', '.join(ALGORITHMS)}")

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        for name in UNUSED:
            parts.pop(name, None)
        if not any(name.startswith("weight_") for name in parts):
            return None
        if "weight_scale_2" in parts:
            only(parts, "weight", "weight_scale", "weight_scale_2")
            return NVFP4Weight("ModelOpt NVFP4", parts, "weight", "weight_scale_2")
        only(parts, "weight", "weight_scale")
        block: Block = (None, None)
        if "weight_scale" in parts and (shape := parts["weight_scale"].shape):
            block = (1, None) if len(shape) == 1 else (128, 128)
            if len(shape) == 4 and shape[1] == shape[3] == 1:
                parts["weight_scale"] = parts["weight_scale"]._replace(shape=(shape[0], shape[2]))
        return FP8Weight("ModelOpt FP8", parts, "weight_scale", block)
