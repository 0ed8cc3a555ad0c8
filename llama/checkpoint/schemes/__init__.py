"""Quantizations as others publish them: a file each, chosen by what a config calls them.

A scheme turns the tensors of a module (X.qweight, X.scales, ...) into one weight, X.weight, that is
read by slices: dense, for any device, rank or format; and, where a block type holds it exactly, as
blocks, which stay compressed in memory.
"""

import re
from typing import Any, Dict, Mapping, Optional, Protocol, Tuple

from llama.checkpoint.schemes.awq import Awq
from llama.checkpoint.schemes.bitsandbytes import BitsAndBytes
from llama.checkpoint.schemes.compressed import CompressedTensors
from llama.checkpoint.schemes.fp4 import MXFP4
from llama.checkpoint.schemes.fp8 import Fbgemm, FineGrained
from llama.checkpoint.schemes.gptq import Gptq
from llama.checkpoint.schemes.modelopt import ModelOpt
from llama.checkpoint.schemes.weight import QuantizedWeight, whole
from llama.checkpoint.source import DTYPES, Stored

PARTS = re.compile(r"(.+?)\.((?:adaptor\.[AB]\.)?weight(?:\..+)?|[^.]+)")


class Scheme(Protocol):
    """Made from a quantization config, which it checks: ValueError for what can't be read."""

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        """The weight of a module, from its tensors; None: it isn't quantized.

        What computing doesn't need may be taken out of `parts`; what is left of an unquantized
        module's are plain weights.

        Raises:
            ValueError: tensors that are missing or don't go together. The module's name is added.
        """


class SchemeType(Protocol):
    def __call__(self, config: Mapping[str, Any]) -> Scheme: ...


# By quantization_config's quant_method.
SCHEMES: Dict[str, SchemeType] = {
    "awq": Awq,
    "gptq": Gptq,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
    "fbgemm_fp8": Fbgemm,
    "fp8": FineGrained,
    "mxfp4": MXFP4,
    "modelopt": ModelOpt,
}
# Where older tools say it instead, beside a config.json that doesn't: ModelOpt, AutoGPTQ, AutoAWQ.
APART = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def config_apart(name: str, found: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
    """What one of the files `APART` holds, as a `quantization_config`; None: nothing of that."""
    if name == "hf_quant_config.json":
        inner = found.get("quantization")
        return {"quant_method": "modelopt", **inner} if isinstance(inner, dict) else None
    if {"w_bit", "q_group_size"} & found.keys():  # early AutoAWQ gave its file the other's name
        own = {"w_bit": "bits", "q_group_size": "group_size"}
        return {"quant_method": "awq", **{own.get(key, key): found[key] for key in found}}
    marlin = {"checkpoint_format": "marlin"} if found.get("is_marlin_format") else {}
    method = "awq" if name == "quant_config.json" else "gptq"
    return {"quant_method": method, **found, **marlin}


def open_scheme(config: Any) -> Scheme:
    """The scheme of a `quantization_config`.

    Raises:
        ValueError: one that can't be read, with what could be done instead.
    """
    method = config.get("quant_method") if isinstance(config, dict) else config
    if not isinstance(method, str) or method not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise ValueError(
            f"quantization_config has quant_method={method!r}; read here: {known}. Take the dense "
            "weights or a .gguf file of this model, and quantize on loading (--quantize int4)"
        )
    try:
        return SCHEMES[method](config)
    except ValueError as error:
        raise ValueError(f"quantization_config of {method}: {error}") from None


def assemble(
    scheme: Optional[Scheme], tensors: Mapping[str, Stored]
) -> Tuple[Dict[str, Stored], Dict[str, QuantizedWeight]]:
    """The plain and the quantized weights that a checkpoint's tensors make up, by name.

    Raises:
        ValueError: tensors that don't make up a weight, or aren't of floats.
    """
    plain: Dict[str, Stored] = {}
    quantized: Dict[str, QuantizedWeight] = {}
    modules: Dict[str, Dict[str, Stored]] = {}
    for name, stored in tensors.items():
        match = PARTS.fullmatch(name) if scheme else None
        if match is None:
            plain[name] = stored
        else:
            modules.setdefault(match[1], {})[match[2]] = stored
    for module, parts in modules.items():
        assert scheme is not None
        file, bias = next(iter(parts.values())).file, parts.pop("bias", None)
        try:
            weight = scheme.weight(module, parts) if parts else None
        except ValueError as error:
            raise ValueError(f"{file}: {module} {error}") from None
        if weight is None:
            plain |= {f"{module}.{part}": stored for part, stored in parts.items()}
        else:
            quantized[f"{module}.weight"] = weight
        # Some packers write zeros for every module that they quantize.
        if bias is not None and (weight is None or whole(bias).any()):
            plain[f"{module}.bias"] = bias
    for name, stored in plain.items():
        if stored.dtype not in DTYPES.values():
            hint = (
                ". Quantized weights need a quantization_config in config.json, or a "
                "quantize_config.json beside it"
            )
            raise ValueError(
                f"{stored.file}: {name} has the dtype {stored.dtype}: not a float; unsupported"
                f"{'' if scheme else hint}"
            )
    return plain, quantized
