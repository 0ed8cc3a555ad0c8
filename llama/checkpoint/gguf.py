"""GGUF, llama.cpp's format: one file with weights of many quantization types and the vocabulary.

Names and metadata keys: github.com/ggml-org/ggml, docs/gguf.md. Its converter has already permuted
q and k into the interleaved rotary layout that Meta's weights have, so they are taken as they are.
"""

import re
from pathlib import Path
from typing import Any, Dict, Optional

import gguf
import numpy as np
import torch

from llama.checkpoint import Shape
from llama.checkpoint.mapped import map_bytes, read_slice
from llama.gguf_header import Header, read_header
from llama.model import ModelArgs, rope_frequencies

TO_META = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_norm": "attention_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "ffn_norm": "ffn_norm",
}
ROPE_FACTORS = "rope_freqs.weight"  # what scaled RoPE divides each frequency by

_PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


def meta_name(name: str) -> str:
    """Meta's name of a GGUF tensor; one that Llama doesn't have stays as it is."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in TO_META:
        return name
    return (f"layers.{match[1]}." if match[1] else "") + TO_META[match[2]] + ".weight"


class GGUFCheckpoint:
    """A .gguf file of the architecture `llama`."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.tokenizer_path: Optional[Path] = self.path
        header = read_header(self.path)
        self._tensors = {meta_name(name): info for name, info in header.tensors.items()}
        self.args = self._args(header)
        self._tensors.pop(ROPE_FACTORS, None)

    def _args(self, header: Header) -> ModelArgs:
        metadata = header.metadata

        def require(key: str) -> Any:
            if key not in metadata:
                raise ValueError(f"{self.path} lacks the metadata key {key}")
            return metadata[key]

        architecture = require("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{self.path} is of the architecture {architecture!r}, not 'llama'")
        if metadata.get("split.count", 1) > 1:
            raise ValueError(f"{self.path} is one of several parts: join them (llama-gguf-split)")
        if metadata.get("llama.expert_count", 0):
            raise ValueError(f"{self.path} is a mixture of experts, which this model isn't")
        scaling = metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(f"{self.path} scales RoPE by the method {scaling!r}, not supported")
        for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
            if name not in self._tensors:
                raise ValueError(f"{self.path} lacks {name}")
        dim, n_heads = require("llama.embedding_length"), require("llama.attention.head_count")
        head_dim = metadata.get("llama.attention.key_length", dim // n_heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if metadata.get(key, head_dim) != head_dim:
                raise ValueError(
                    f"{self.path}: {key}={metadata[key]}, but heads are {head_dim} wide"
                )
        args: Dict[str, Any] = dict(
            dim=dim,
            n_layers=require("llama.block_count"),
            n_heads=n_heads,
            n_kv_heads=metadata.get("llama.attention.head_count_kv", n_heads),
            head_dim=head_dim,
            hidden_dim=require("llama.feed_forward_length"),
            vocab_size=self._tensors["tok_embeddings.weight"].shape[0],
            # stored as fp32; the shortest decimal that means the same is what was once typed
            norm_eps=float(str(np.float32(require("llama.attention.layer_norm_rms_epsilon")))),
            rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
            tied_embeddings="output.weight" not in self._tensors,
        )
        if ROPE_FACTORS in self._tensors:
            args.update(self._scaled_rope(args))
        return ModelArgs(**args)

    def _scaled_rope(self, args: Dict[str, Any]) -> Dict[str, Any]:
        """The values behind the stored factors: the largest is the factor; checked against all."""
        stored = self.read(ROPE_FACTORS, 0, 0, args["head_dim"] // 2)
        found: Dict[str, Any] = dict(use_scaled_rope=True, rope_scaling_factor=float(stored.max()))
        plain = rope_frequencies(ModelArgs(**args))
        scaled = rope_frequencies(ModelArgs(**args, **found))
        if not torch.allclose(plain / stored, scaled, rtol=1e-4):
            raise ValueError(
                f"{self.path}: {ROPE_FACTORS} isn't Llama 3.1's scaling of RoPE for a context "
                f"of {ModelArgs.rope_original_max_seq_len}"
            )
        return found

    def shapes(self) -> Dict[str, Shape]:
        return {name: info.shape for name, info in self._tensors.items()}

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        info = self._tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(info.type)
        except ValueError:
            raise ValueError(
                f"{self.path}: {name} has the unknown quantization type {info.type}"
            ) from None
        if kind in _PLAIN:
            return read_slice(self.path, info.offset, info.shape, _PLAIN[kind], axis, start, stop)
        # Quantized in blocks along the last axis: whole rows, then the columns asked for.
        values, size = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = info.shape[-1] // values * size
        first, last = (start, stop) if axis == 0 else (0, info.shape[0])
        raw = map_bytes(self.path, info.offset + first * row_bytes, (last - first) * row_bytes)
        try:
            rows = gguf.dequantize(raw.reshape(last - first, row_bytes), kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {name} is quantized as {kind.name}, which can't be read: "
                "requantize the model, to Q8_0 for instance"
            ) from None
        whole = torch.from_numpy(rows)
        return whole if axis == 0 else whole[:, start:stop]
