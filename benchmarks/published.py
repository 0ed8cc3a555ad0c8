"""Decoding and memory of published quantizations against GGUF's type of the same width.

    python -m benchmarks.published compare [--shape 1b] [--kinds awq,nf4,fp8] [--rounds 5]

Weights are random, of a real shape. For each kind both models are loaded by one process and take
turns decoding; the embedding is bf16 in both. Memory is what a process of its own takes more once
the model is loaded. The last line of stdout is JSON.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Sequence

import fire
import gguf
import psutil
import torch
from safetensors.torch import save_file

from benchmarks import shapes
from llama import ModelArgs, Transformer, checkpoint
from llama.backends import build
from llama.checkpoint import floats
from llama.checkpoint.huggingface import config_of
from llama.checkpoint.shapes import weight_shapes
from llama.families.names import HF
from llama.layers import parallel

Tensors = Dict[str, torch.Tensor]
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
CONFIGS: Dict[str, Dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
    "w4a16": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    },
    "fp8": {"quant_method": "fbgemm_fp8"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
PEERS = {"fp8": "q8_0"}  # others: q4_0


def nf4(rows: int, cols: int) -> Tensors:
    """The tensors of a random matrix as bitsandbytes has them, double quantization included."""
    n = rows * cols // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, cols]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
    return {
        "weight": torch.randint(256, (rows * cols // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.randint(256, (n,), dtype=torch.uint8),
        "weight.quant_map": floats.CODES["NF4"].clone(),
        "weight.nested_absmax": torch.full((-(-n // 256),), 0.01),
        "weight.nested_quant_map": torch.linspace(-1, 1, 256),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def parts_of(kind: str, rows: int, cols: int) -> Tensors:
    """The tensors of a random matrix."""

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64).int()

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape) * 0.0008 + 0.0036

    groups = cols // 128
    if kind == "nf4":
        return nf4(rows, cols)
    if kind == "fp8":
        codes = (torch.randn(rows, cols) * 100).to(floats.E4M3)
        return {"weight": codes, "weight_scale": torch.full((rows, 1), 0.0002)}
    if kind == "awq":
        zeros = torch.full((groups, rows // 8), 0x77887788, dtype=torch.int32)
        scale = scales(groups, rows).half()
        return {"qweight": words(cols, rows // 8), "qzeros": zeros, "scales": scale}
    if kind == "gptq":
        zeros = torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
        index, scale = torch.arange(cols, dtype=torch.int32) // 128, scales(groups, rows).half()
        about = {"qzeros": zeros, "scales": scale, "g_idx": index}
        return {"qweight": words(cols // 8, rows), **about}
    about = {"weight_scale": scales(rows, groups).bfloat16()}
    about["weight_shape"] = torch.tensor([rows, cols])
    return {"weight_packed": words(rows, cols // 8), **about}


def write(kind: str, args: ModelArgs, path: Path) -> Path:
    """A directory in Hugging Face's format."""
    tensors: Tensors = {}
    for name, shape in weight_shapes(args).items():
        module = HF.theirs(name).removesuffix("weight")
        if not name.startswith("layers.") or len(shape) == 1:
            tensors[module + "weight"] = (torch.randn(shape) * 0.02 + (len(shape) == 1)).bfloat16()
        else:
            tensors |= {module + part: tensor for part, tensor in parts_of(kind, *shape).items()}
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = config_of(args, torch.bfloat16, 1, [2]) | {"quantization_config": CONFIGS[kind]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_peer(shape: str, kind: str, path: Path) -> Path:
    """The same shape as a .gguf file, with an embedding in bf16."""
    chosen = shapes.block_type
    try:
        shapes.block_type = lambda name, *of: (  # type: ignore[assignment]
            gguf.GGMLQuantizationType.BF16 if name == "token_embd.weight" else chosen(name, *of)
        )
        return shapes.write(shape, kind, path)
    finally:
        shapes.block_type = chosen  # type: ignore[assignment]


def load(path: Path, threads: int) -> Transformer:
    torch.set_num_threads(threads)
    device = parallel.initialize(device="cpu")
    source = checkpoint.open(path)
    args = replace(source.args, max_seq_len=512, max_batch_size=1)
    return build.prepare(source, args, device=device, dtype=torch.bfloat16)


def decode(model: Transformer, steps: int) -> float:
    """Tokens per second."""
    cache = model.new_cache(1)
    model(torch.tensor([[1, 2, 3, 4]]), 0, cache)
    start = time.perf_counter()
    for at in range(4, 4 + steps):
        model(torch.tensor([[at]]), at, cache)
    return steps / (time.perf_counter() - start)


def resident(path: str, threads: int) -> None:
    """Print the bytes by which this process grows as a model is loaded and used once."""
    process = psutil.Process()
    before = process.memory_info().rss
    model = load(Path(path), threads)
    decode(model, 1)
    print(process.memory_info().rss - before)


@torch.inference_mode()
def main(
    shape: str = "1b",
    kinds: str | Sequence[str] = ("awq", "gptq", "w4a16", "fp8", "nf4"),
    rounds: int = 5,
    steps: int = 16,
    threads: int = 2,
) -> None:
    args, found = shapes.SHAPES[shape], {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            of_peer = PEERS.get(kind, "q4_0")
            file = Path(folder) / f"{of_peer}.gguf"
            peer = load(file if file.exists() else write_peer(shape, of_peer, file), threads)
            path = write(kind, args, Path(folder) / kind)
            command = [sys.executable, "-m", "benchmarks.published", "resident", str(path)]
            run = subprocess.run(
                [*command, str(threads)], capture_output=True, text=True, check=True
            )
            model, speeds = load(path, threads), []
            for _ in range(rounds):
                speeds.append((decode(model, steps), decode(peer, steps)))
            ratios = [ours / theirs for ours, theirs in speeds]
            nbytes = (path / "model.safetensors").stat().st_size
            found[kind] = {
                "file_bytes": nbytes,
                "resident_over_file": round(int(run.stdout.split()[-1]) / nbytes, 3),
                "tokens_per_s": round(statistics.median(ours for ours, _ in speeds), 2),
                f"{of_peer}_tokens_per_s": round(
                    statistics.median(theirs for _, theirs in speeds), 2
                ),
                f"over_{of_peer}": round(statistics.median(ratios), 3),
                f"over_{of_peer}_range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
            print(kind, found[kind], flush=True)
            del model, peer
            (path / "model.safetensors").unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    fire.Fire({"compare": main, "resident": resident})
