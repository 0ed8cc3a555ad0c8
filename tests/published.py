"""Tiny checkpoints as others quantize them: packed as documented, or by the libraries themselves.

A quantizer takes a weight (out, in) and gives its tensors, by what follows the module's name, and
what these mean, dense.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Tuple

import numpy as np
import scipy.linalg
import torch
from conftest import TINY, random_weights
from safetensors.torch import save_file
from test_model import to_hugging_face

from llama.checkpoint import meta

Quantizer = Callable[[torch.Tensor], Tuple[Dict[str, torch.Tensor], torch.Tensor]]

# Widths of whole groups of 64 on 4 ranks, of 128 on 2; heads that the CPU kernels take.
ARGS = replace(TINY, dim=256, hidden_dim=512, n_heads=8, n_kv_heads=2, head_dim=32)
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of AWQ's outputs in a word


class Case(NamedTuple):
    """A way of quantizing."""

    config: Dict[str, Any]  # quantization_config
    quantize: Quantizer
    kind: str  # what it is stored as: a block type, or what people read


def publish(path: Path, case: Case, args=ARGS, dtype=torch.float32):
    """Write a checkpoint of random weights; returns transformers' model with what they mean."""
    model, tensors = to_hugging_face(args, random_weights(args)), {}
    dense = dict(model.state_dict())
    for name, weight in model.state_dict().items():
        if ".layers." in name and weight.dim() == 2:
            parts, dense[name] = case.quantize(weight)
            stem = name.removesuffix("weight")
            tensors |= {stem + part: tensor.contiguous() for part, tensor in parts.items()}
        elif not (args.tied_embeddings and name == "lm_head.weight"):
            tensors[name] = weight.to(dtype).contiguous()
    model.load_state_dict(dense)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": case.config}
    (path / "config.json").write_text(json.dumps(config))
    return model


def rounded(weight, bits, groups, zero_points, scale_dtype=torch.float16):
    """Unsigned integers (out, in), scales and zero points (out, groups) of groups of columns."""
    most = (1 << bits) - 1
    x = weight.reshape(len(weight), groups, -1)
    if zero_points:
        low, high = x.amin(2).clamp(max=0), x.amax(2).clamp(min=0)
        scale = ((high - low) / most).to(scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, most)
    else:
        scale = (x.abs().amax(2) / (most // 2)).to(scale_dtype)
        zero = torch.full(scale.shape, float(most // 2 + 1))
    q = (x / scale.float()[..., None]).round() + zero[..., None]
    return q.clamp(0, most).reshape(weight.shape), scale, zero


def meaning(q, scale, zero):
    """fp32, rounded once."""
    x = q.reshape(*scale.shape, -1) - zero[..., None]
    return (x.double() * scale.double()[..., None]).float().view(q.shape)


def words(values, bits, order=None):
    """(rows, n) -> (rows, n · bits / 32), int32: the first value lowest, or in another order."""
    per = 32 // bits
    values = values.numpy().astype(np.uint32).reshape(len(values), -1, per)
    out = np.zeros(values.shape[:2], np.uint32)
    for place, which in enumerate(order or range(per)):
        out |= values[:, :, which] << np.uint32(bits * place)
    return torch.from_numpy(out.view(np.int32))


def awq(group):
    def quantize(weight):
        q, scale, zero = rounded(weight, 4, weight.shape[1] // group, True)
        parts = {"qweight": words(q.T, 4, ORDER), "qzeros": words(zero.T, 4, ORDER)}
        return parts | {"scales": scale.T}, meaning(q, scale, zero)

    return quantize


def gptq(bits, group, zero_points, v2=False, act_order=False):
    def quantize(weight):
        n, columns = weight.shape[1] // group, weight.shape[1]
        index = torch.arange(columns) // group
        if act_order:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        order = index.argsort(stable=True)
        q, scale, zero = rounded(weight[:, order], bits, n, zero_points)
        back = order.argsort()
        dense = meaning(q, scale, zero)[:, back]
        if not v2:  # the packer subtracts 1 from each zero point, of 0 with a borrow
            zero = zero.clamp(min=1)
            dense = meaning(q, scale, zero)[:, back]
        parts = {
            "qweight": words(q[:, back], bits).T,
            "qzeros": words((zero if v2 else zero - 1).T, bits),
            "scales": scale.T,
            "g_idx": index.int(),
            "bias": torch.zeros(len(weight), dtype=torch.float16),
        }
        return parts, dense

    return quantize


def compressed(bits, pack=True, actorder=False, **settings):
    """By compressed-tensors' own compressor, and its decompression, in fp32."""
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    about = QuantizationArgs(num_bits=bits, type="int", **settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=about)
    library = PackedQuantizationCompressor if pack else IntQuantizationCompressor

    def quantize(weight):
        columns, group = weight.shape[1], settings.get("group_size") or weight.shape[1]
        _, scale, zero = rounded(weight, bits, columns // group, not about.symmetric, torch.float32)
        middle = 1 << (bits - 1)
        state = {"weight": weight, "weight_scale": scale}
        state["weight_zero_point"] = (zero - middle).to(torch.int8)
        if settings["strategy"] == "tensor":
            state["weight_scale"] = scale.amax(0, keepdim=False)
            state["weight_zero_point"] = torch.zeros(1, dtype=torch.int8)
        parts = library.compress(state, scheme)
        return parts, library.decompress(parts, scheme)["weight"].float()

    return quantize


def llm_int8(weight):
    """By bitsandbytes' own functions."""
    import bitsandbytes.functional as F

    q, scale, _ = F.int8_vectorwise_quant(weight.half())
    parts = {"weight": q, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, F.int8_vectorwise_dequant(q, scale)


def groups(format, bits, **weights):
    about = {"num_bits": bits, "type": "int", "symmetric": True, "group_size": None, **weights}
    group = {"targets": ["Linear"], "weights": about, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _compressed_case(kind, bits, pack=True, **settings):
    format = "pack-quantized" if pack else "int-quantized"
    return Case(groups(format, bits, **settings), compressed(bits, pack, **settings), kind)


AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "damp_percent": 0.1}
V2 = {**GPTQ, "checkpoint_format": "gptq_v2", "sym": False}

INTEGERS: Dict[str, Case] = {
    "AWQ, groups of 32": Case({**AWQ, "group_size": 32}, awq(32), "I4_32"),
    "AWQ, groups of 128": Case({**AWQ, "group_size": 128}, awq(128), "I4_128"),
    "GPTQ": Case({**GPTQ, "group_size": 64}, gptq(4, 64, False), "I4_64"),
    "GPTQ, zero points": Case({**GPTQ, "group_size": 32, "sym": False}, gptq(4, 32, True), "I4_32"),
    "GPTQ v2": Case({**V2, "group_size": 128}, gptq(4, 128, True, v2=True), "I4_128"),
    "GPTQ, 8 bit": Case({**GPTQ, "bits": 8, "group_size": 32}, gptq(8, 32, False), "I8_32"),
    "GPTQ v2, 8 bit": Case(
        {**V2, "bits": 8, "group_size": 128}, gptq(8, 128, True, v2=True), "I8_128"
    ),
    "GPTQ, activation order": Case(
        {**GPTQ, "group_size": 32, "desc_act": True},
        gptq(4, 32, False, act_order=True),
        "GPTQ 4 bit, groups of 32, activation order",
    ),
    "w4a16": _compressed_case("I4_64", 4, strategy="group", group_size=64, symmetric=True),
    "w4a16, zero points": _compressed_case(
        "I4_32", 4, strategy="group", group_size=32, symmetric=False
    ),
    "w4a16 by rows": _compressed_case("I4_128", 4, strategy="channel", symmetric=False),
    "w8a16": _compressed_case("I8_128", 8, strategy="group", group_size=128, symmetric=True),
    "w8a8": _compressed_case("I8_128", 8, False, strategy="channel", symmetric=True),
    "w8a8, zero points": _compressed_case("I8_128", 8, False, strategy="channel", symmetric=False),
    "w8a8, one scale": _compressed_case("I8_128", 8, False, strategy="tensor", symmetric=True),
    "LLM.int8()": Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8, "I8_128"),
}


def publish_meta(path: Path, spinquant: bool, lora: bool, args=ARGS, group=32):
    """Meta's int4 release of random weights; returns what each weight means, by Meta's names."""
    weights, tensors, scale = random_weights(args), {}, 2.0
    config: Dict[str, Any] = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": group}
    generator = torch.Generator().manual_seed(2)
    dense = dict(weights)
    for name, weight in weights.items():
        if weight.dim() == 1:
            tensors[name] = weight
            continue
        stem, edge = name.removesuffix("weight"), not name.startswith("layers.")
        bits, n = (8, 1) if edge else (4, weight.shape[1] // group)
        q, scales, zero = rounded(weight, bits, n, False, torch.float32)
        tensors[name] = (q - zero[0, 0]).to(torch.int8)
        tensors[stem + "scales"], dense[name] = scales, meaning(q, scales, zero)
        if lora and not edge:
            A = torch.randn(16, weight.shape[1], generator=generator) * 0.05
            B = torch.randn(len(weight), 16, generator=generator) * 0.05
            tensors[stem + "adaptor.A.weight"], tensors[stem + "adaptor.B.weight"] = A, B
            dense[name] = dense[name] + scale * (B @ A)
        if spinquant and name.endswith("w2.weight"):
            width = weight.shape[1]
            matrix = torch.from_numpy(scipy.linalg.hadamard(width)).double() / width**0.5
            dense[name] = (dense[name].double() @ matrix).float()
    path.mkdir(exist_ok=True)
    torch.save(tensors, path / "consolidated.00.pth")
    params = meta.params_of(args) | {"quantization_args": config | {"spinquant": spinquant}}
    if lora:
        params["lora_args"] = {"rank": 16, "scale": scale}
    (path / "params.json").write_text(json.dumps(params))
    return dense
