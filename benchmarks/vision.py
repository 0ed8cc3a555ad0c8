"""Llama 3.2 11B Vision's shape with random weights: memory, decoding, and encoding an image.

    python -m benchmarks.vision decode
    python -m benchmarks.vision encode --layers 8

`decode` compares tokens per second after an image of four tiles with those of the same model
without one, which is the text model of 8B, in turns, with 4-bit weights. `encode` compares the time
that the processor works on the encoder's first blocks for an image, by default of four tiles, with
transformers', in the same dtype. The last line is JSON.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import fire
import gguf
import numpy as np
import psutil
import torch

from benchmarks.shapes import random_rows
from llama.backends import build, memory
from llama.backends.cpu.vision import swap_encoder
from llama.backends.quantized import is_quantizable
from llama.checkpoint import weight_shapes
from llama.families.vision import views
from llama.families.vision_encoder import VisionArgs, VisionEncoder
from llama.families.vision_files import grids
from llama.layers import parallel
from llama.layers.paged import PAGE, PagedRows, blocks_for

SHAPE = VisionArgs(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128256,
    use_scaled_rope=True, max_seq_len=2048, max_batch_size=4,
)  # fmt: skip


@dataclass
class RandomWeights:
    """A checkpoint that is made as it is read: matrices of text in Q4_0, all else in bf16."""

    args: VisionArgs
    path: Path = Path("(random)")
    tokenizer_path: Optional[Path] = None

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        return dict(weight_shapes(self.args))

    def stored_as(self, name: str) -> str:
        return "Q4_0" if is_quantizable(name) else "BF16"

    def _shape(self, name: str, axis: int, start: int, stop: int) -> Tuple[int, ...]:
        shape = weight_shapes(self.args)[name]
        return shape[:axis] + (stop - start,) + shape[axis + 1 :]

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        found = torch.empty(self._shape(name, axis, start, stop), dtype=torch.bfloat16)
        return found.fill_(1) if "norm" in name else found.uniform_(-0.03, 0.03)

    def read_blocks(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_0
        return torch.from_numpy(random_rows(rng, self._shape(name, axis, start, stop), kind))


def decode(steps: int = 16, rounds: int = 4, dtype: str = "bf16") -> None:
    """Tokens per second with an image and without, in turns, and the process's peak memory."""
    device = parallel.initialize(device="cpu")
    kind = parallel.pick_dtype(dtype, device)
    source: Any = RandomWeights(SHAPE)
    print(memory.preflight(SHAPE, 1, kind, device, "stored", source=source))
    model: Any = build.prepare(source, SHAPE, device=device, dtype=kind)
    tokens = SHAPE.vision_max_num_chunks * SHAPE.tokens_per_tile
    shape = (SHAPE.vision_num_cross_attention_layers, SHAPE.n_kv_heads, tokens, SHAPE.head_dim)
    encoded = tuple(torch.randn(shape).to(kind) for _ in range(2))
    pool = model.new_cache(1 + blocks_for(SHAPE.max_seq_len), PAGE)
    table = [*range(1, 1 + blocks_for(SHAPE.max_seq_len))]
    speeds: Dict[str, List[float]] = {"text": [], "image": []}
    with torch.inference_mode():
        for _ in range(rounds):
            for what, found in speeds.items():
                seen = views([0], [encoded]) if what == "image" else []  # type: ignore[list-item]
                first = SHAPE.vocab_size if seen else 1
                length = 0
                for n, ids in enumerate([[first, *range(100)]] + [[n] for n in range(steps)]):
                    cache = PagedRows(pool, [table], [length], images=[seen])
                    if n == 1:
                        begin = time.perf_counter()
                    model.logits(model.hidden_of_rows([ids], cache)[-1:])
                    length += len(ids)
                found.append(steps / (time.perf_counter() - begin))
    best = {what: max(found) for what, found in speeds.items()}
    report = {
        **{f"{what}_tokens_per_second": round(speed, 2) for what, speed in best.items()},
        "ratio": round(best["image"] / best["text"], 3),
        "peak_gb": round(psutil.Process().memory_info().rss / 1e9, 2),
    }
    print(json.dumps(report))


def encode(
    layers: int = 4,
    dtype: str = "bf16",
    rounds: int = 2,
    rows: int = 2,
    columns: int = 2,
    compile: bool = True,
) -> None:
    """Seconds for an image, in turns with transformers, of encoders with as few blocks.

    Args:
        rows, columns: of the image's tiles.
        compile: attend with the CPU kernels.
    """
    from transformers import MllamaVisionConfig, MllamaVisionModel

    args = replace(SHAPE, vision_layers=layers, vision_global_layers=1, vision_features=(1,))
    kind = parallel.pick_dtype(dtype, parallel.initialize(device="cpu"))
    ours: Any = VisionEncoder(args, lambda module: module.to(kind)).to(kind)
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    if compile:
        swap_encoder(ours)
    config = MllamaVisionConfig(
        image_size=args.vision_chunk_size, num_hidden_layers=layers, num_global_layers=1,
        intermediate_layers_indices=[0], vision_output_dim=2 * args.vision_width,
    )  # fmt: skip
    theirs: Any = MllamaVisionModel(config)
    theirs = theirs.to(kind).eval()
    n, size = rows * columns, args.vision_chunk_size
    tiles = torch.zeros(4, 3, size, size, dtype=kind)
    tiles[:n].normal_()
    seconds: Dict[str, List[float]] = {"ours": [], "transformers": []}
    with torch.inference_mode():
        for _ in range(rounds):
            for what, found in seconds.items():
                begin = time.process_time()
                if what == "ours":
                    ours(tiles[:n], (rows, columns))
                else:
                    theirs(
                        pixel_values=tiles[None, None],
                        aspect_ratio_ids=torch.tensor([[1 + grids(args).index((rows, columns))]]),
                        aspect_ratio_mask=(torch.arange(4) < n).long()[None, None],
                    )
                found.append(time.process_time() - begin)
    best = {what: min(found) for what, found in seconds.items()}
    ratio = best["ours"] / best["transformers"]
    print(json.dumps({**{k: round(v, 2) for k, v in best.items()}, "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    fire.Fire({"decode": decode, "encode": encode})
