"""Models of real sizes with random weights, as .gguf files that all sides read.

    python -m benchmarks.shapes 1b q4_k_m model.gguf

Speed depends on the shape and on the block types, not on the values. The mixture of block types is
the one that llama.cpp's quantizer writes: for Q4_K_M some of the matrices in Q6_K, and the
embedding and the output layer in Q6_K for all 4-bit types.
"""

from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

import fire
import gguf
import numpy as np

from llama import ModelArgs
from llama.checkpoint import ggml
from llama.checkpoint.shapes import weight_shapes
from llama.families.names import GGUF
from llama.text.files import beside

SHAPES: Dict[str, ModelArgs] = {
    "1b": ModelArgs(  # Llama 3.2 1B
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, vocab_size=128256,
        tied_embeddings=True,
    ),
    "8b": ModelArgs(  # Llama 3 8B, with fewer layers, so that bf16 fits into 24 GB
        dim=4096, n_layers=8, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128256,
    ),
}  # fmt: skip

Type = gguf.GGMLQuantizationType
KINDS = {
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_k_m": (Type.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
}
# fp16 scales (and minima, in place of the weights' middle) that make values of about 0.02.
SCALES = {Type.Q4_0: 0.004, Type.Q8_0: 0.0003, Type.Q4_K: 0.00015, Type.Q6_K: 0.00002}
ROWS = 256  # distinct ones of a matrix


def block_type(name: str, layer: int, n_layers: int, kind: str) -> Type:
    """The type of a matrix in a file of this kind, as llama.cpp's quantizer chooses it."""
    main = KINDS[kind][0]
    if not kind.startswith("q4"):
        return main
    if name in ("token_embd.weight", "output.weight"):
        return Type.Q6_K
    eighth = n_layers // 8
    more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
    finer = kind == "q4_k_m" and more and name.endswith(("attn_v.weight", "ffn_down.weight"))
    return Type.Q6_K if finer else main


def random_rows(rng: np.random.Generator, shape: Tuple[int, ...], kind: Type) -> np.ndarray:
    """(rows, bytes of a row); the same ROWS rows again and again."""
    rows, cols = min(ROWS, shape[0]), shape[1]
    if kind == Type.BF16:
        values = rng.standard_normal((rows, cols), np.float32) * 0.02
        found = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        n, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows, cols // n, size), np.uint8)
        scale = (rng.random(blocks.shape[:2] + (1,)) * 0.2 + 0.9) * SCALES.get(kind, 0.0001)
        for i, at in enumerate(ggml.SCALES[kind.name]):  # the second is of the minima
            halves = (scale * 7**i).astype(np.float16)
            blocks[..., at : at + 2] = halves.view(np.uint8)
        if kind == Type.MXFP4:
            blocks[..., 0] = 120  # a power of two
        found = blocks.reshape(rows, -1)
    return np.tile(found, (-(-shape[0] // rows), 1))[: shape[0]]


def tokens(n: int) -> Iterator[str]:
    """A vocabulary in which every byte is a token, as byte-level BPE needs it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + i) for i in range(256 - len(printable)))
    yield from (chr(byte) if byte in printable else next(others) for byte in range(256))
    yield "ab"  # the one merge
    yield from (f"<{i}>" for i in range(257, n - 2))
    yield from ("<|begin_of_text|>", "<|end_of_text|>")


def write(shape: str, kind: str, path: str | Path, n_layers: Optional[int] = None) -> Path:
    """Write a model of a shape of SHAPES and a kind of KINDS; returns the path."""
    if shape not in SHAPES or kind not in KINDS:
        raise ValueError(f"{shape} {kind}: choose of {', '.join(SHAPES)}, and {', '.join(KINDS)}")
    args, path = SHAPES[shape], Path(path)
    layers, rng = n_layers or args.n_layers, np.random.default_rng(0)
    with beside(path, True) as partial:
        writer = gguf.GGUFWriter(partial, "llama", use_temp_file=True)
        numbers = {
            "block_count": layers, "context_length": 131072, "embedding_length": args.dim,
            "feed_forward_length": args.hidden_dim, "head_count": args.n_heads,
            "head_count_kv": args.n_kv_heads, "key_length": args.head_dim,
            "value_length": args.head_dim, "rope_dimension_count": args.head_dim,
            "rope_freq_base": args.rope_theta, "layer_norm_rms_eps": args.norm_eps,
            "vocab_size": args.vocab_size, "bos_token_id": args.vocab_size - 2,
            "eos_token_id": args.vocab_size - 1,
        }  # fmt: skip
        for key, number in numbers.items():
            getattr(writer, f"add_{key}")(number)
        writer.add_file_type(KINDS[kind][1])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list([*tokens(args.vocab_size)])
        writer.add_token_types([1] * (args.vocab_size - 2) + [3] * 2)
        writer.add_token_merges(["a b"])
        for name, size in weight_shapes(args).items():
            layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
            if layer >= layers:
                continue
            theirs = GGUF.theirs(name)
            if len(size) == 1:
                writer.add_tensor(theirs, np.ones(size, np.float32))
            else:
                block = block_type(theirs, layer, layers, kind)
                writer.add_tensor(theirs, random_rows(rng, size, block), raw_dtype=block)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


if __name__ == "__main__":
    fire.Fire(write)
