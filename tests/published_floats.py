"""The same for floats of 8 and 4 bits: compressed-tensors, transformers, bitsandbytes, ModelOpt."""

from functools import partial
from typing import Dict

import torch
from published import Case, groups

ROWS, COLS = 128, 128  # of a block


def rounded(weight, tall, wide, most=448.0):
    """e4m3 numbers (out, in) and fp32 scales, one for each block of so many rows and columns."""
    rows, cols = weight.shape
    blocks = weight.view(-(-rows // tall), tall, -(-cols // wide), wide)
    scale = blocks.abs().amax((1, 3)) / most
    q = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return q.view(rows, cols), scale


def compressed_fp8(strategy, **extra):
    """By compressed-tensors' own compressor, and its decompression."""
    settings = {"block_structure": [ROWS, COLS]} if strategy == "block" else {}

    def quantize(weight):
        from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        about = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=about)
        rows, cols = weight.shape
        tall, wide = {"tensor": (rows, cols), "channel": (1, cols), "block": (ROWS, COLS)}[strategy]
        tall, wide = min(tall, rows), min(wide, cols)
        scale = rounded(weight, tall, wide)[1]
        scale = scale.view(1) if strategy == "tensor" else scale
        parts = FloatQuantizationCompressor.compress(
            {"weight": weight, "weight_scale": scale}, scheme
        )
        dense = FloatQuantizationCompressor.decompress(parts, scheme)["weight"].float()
        return parts | {name: torch.ones(1) for name in extra.get("unused", ())}, dense

    return quantize


def fbgemm(weight):
    q, scale = rounded(weight, 1, weight.shape[1])
    parts = {"weight": q, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])}
    return parts, (q.double() * scale.double()).float()


def fine_grained(weight):
    """Dequantized by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    q, scale = rounded(weight, min(ROWS, len(weight)), COLS)
    dense = Fp8Dequantize(None)._dequantize_one(q, scale, torch.float32)
    return {"weight": q, "weight_scale_inv": scale}, dense


def auto_fp8(weight):
    q, scale = rounded(weight, *weight.shape)
    parts = {"weight": q, "weight_scale": scale[0, 0], "input_scale": torch.tensor(0.1)}
    return parts, (q.double() * scale.double()).float()


def modelopt(weight, kind):
    """Packed as NVIDIA's Model Optimizer exports it, whose library takes a GPU for most of it."""
    rows, cols = weight.shape
    if kind == "NVFP4":
        parts, dense = compressed_fp4("nvfp4", 16)(weight)
        shared = 1 / parts["weight_global_scale"].view(())
        found = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]}
        return found | {"weight_scale_2": shared, "input_scale": torch.tensor(0.1)}, dense
    block = {"rows": (1, cols), "blocks": (min(ROWS, rows), min(COLS, cols))}
    q, scale = rounded(weight, *block.get(kind, (rows, cols)))
    shape = {"rows": (rows,), "blocks": (scale.shape[0], 1, scale.shape[1], 1)}.get(kind, ())
    parts = {"weight": q, "weight_scale": scale.view(shape)}
    scale = scale.repeat_interleave(rows // scale.shape[0], 0)
    scale = scale.repeat_interleave(cols // scale.shape[1], 1)
    unused = {"k_scale": torch.ones(()), "input_scale": torch.ones(())} if kind == "whole" else {}
    return parts | unused, (q.double() * scale.double()).float()


def bitsandbytes(code, blocksize=64, nested=True, storage=torch.uint8):
    """By bitsandbytes' own functions."""

    def quantize(weight):
        import bitsandbytes.functional as F

        packed, state = F.quantize_4bit(
            weight.contiguous(), blocksize=blocksize, compress_statistics=nested, quant_type=code,
            quant_storage=storage,
        )  # fmt: skip
        parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        return parts | {"weight": packed}, F.dequantize_4bit(packed, state)

    return quantize


def compressed_fp4(library, group):
    def quantize(weight):
        from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
        from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        by = {"mxfp4": MXFP4PackedCompressor, "nvfp4": NVFP4PackedCompressor}[library]
        strategy = "tensor_group" if library == "nvfp4" else "group"
        about = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=about)
        largest = weight.view(len(weight), -1, group).abs().amax(2)
        if library == "nvfp4":
            whole = (448 * 6 / largest.max()).view(1)
            scale = (largest / 6 * whole).to(torch.float8_e4m3fn).float()
            state = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
        else:
            state = {"weight": weight, "weight_scale": 2 ** largest.log2().floor().sub(2)}
        parts = by.compress(state, scheme)
        if library == "mxfp4":  # exact in the bf16 that decompression gives
            return parts, by.decompress(parts, scheme)["weight"].float()
        codes = unpack_fp4_from_uint8(parts["weight_packed"], *weight.shape, torch.float32)
        scale = parts["weight_scale"].float()
        return parts, dequantize(codes, scale, args=about, global_scale=whole)

    return quantize


def mxfp4(weight):
    """As the experts of gpt-oss, which transformers dequantizes."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts, _ = compressed_fp4("mxfp4", 32)(weight)
    blocks = parts["weight_packed"].view(len(weight), -1, 16)
    dense = convert_moe_packed_tensors(
        blocks[None], parts["weight_scale"][None], dtype=torch.float32
    )
    return {"weight_blocks": blocks, "weight_scales": parts["weight_scale"]}, dense[0].T


def fp8_config(strategy, format="float-quantized", dynamic=True, **weights):
    config = groups(format, 8, type="float", strategy=strategy, **weights)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": dynamic}
    return config


def bits4(code, **settings):
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": code}
    return Case(config, bitsandbytes(code, **settings), code.upper())


BLOCKS = {"block_structure": [ROWS, COLS]}
FINE = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [ROWS, COLS]}

FLOATS: Dict[str, Case] = {
    "FP8 by rows": Case(fp8_config("channel"), compressed_fp8("channel"), "FP8"),
    "FP8, one scale, static": Case(
        fp8_config("tensor", dynamic=False), compressed_fp8("tensor", unused=["input_scale"]), "FP8"
    ),
    "FP8 in blocks": Case(fp8_config("block", **BLOCKS), compressed_fp8("block"), "FP8"),
    "FP8 of weights only": Case(
        fp8_config("channel", "naive-quantized"), compressed_fp8("channel"), "FP8"
    ),
    "fbgemm FP8": Case(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fbgemm, "FP8"
    ),
    "fine-grained FP8": Case(FINE, fine_grained, "FP8"),
    "AutoFP8": Case({"quant_method": "fp8", "activation_scheme": "static"}, auto_fp8, "FP8"),
    "NF4": bits4("nf4"),
    "NF4, one quantization": bits4("nf4", nested=False),
    "NF4, blocks of 128, as bf16": bits4("nf4", blocksize=128, storage=torch.bfloat16),
    "FP4": bits4("fp4"),
    "NVFP4A16": Case(
        groups("nvfp4-pack-quantized", 4, type="float", group_size=16),
        compressed_fp4("nvfp4", 16),
        "E2M1",
    ),
    "MXFP4A16": Case(
        groups("mxfp4-pack-quantized", 4, type="float", group_size=32),
        compressed_fp4("mxfp4", 32),
        "MXFP4",
    ),
    **{
        f"ModelOpt {algorithm}": Case(
            {"quant_method": "modelopt", "quant_algo": algorithm}, partial(modelopt, kind=kind), of
        )
        for algorithm, kind, of in (
            ("FP8", "whole", "FP8"),
            ("FP8_PER_CHANNEL_PER_TOKEN", "rows", "FP8"),
            ("fp8_pb_wo", "blocks", "FP8"),
            ("NVFP4", "NVFP4", "E2M1"),
        )
    },
    "MXFP4": Case({"quant_method": "mxfp4"}, mxfp4, "MXFP4"),
}
