"""Requests for batches, of all kinds, and their results without what tells of a run."""

import os
import random
from dataclasses import replace
from pathlib import Path

from conftest import TINY, shared, write_checkpoint

LINES = int(os.environ.get("LLAMA_BATCH_LINES", 60))  # `make soak` sets more

WITH_KERNELS = replace(
    TINY, n_heads=2, n_kv_heads=1, head_dim=32
)  # widths that the CPU kernels take


def small_model() -> Path:
    """A random checkpoint whose results are bit-identical whatever is computed with them."""

    return shared("batch-model", lambda path: write_checkpoint(path, WITH_KERNELS))


PREFIXES = [f"{name}: " + name.lower() * 6 for name in ("Alpha", "Beta", "Gamma", "Delta")]


def requests(count: int, model: str | None = None, seed: int = 0) -> list[dict]:
    """Lines of OpenAI's format in a random order, most of them alike in what they begin with. Some
    sample, some fail."""
    rng, found = random.Random(seed), []
    for i in range(count):
        prompt = f"{rng.choice(PREFIXES)} {i}"
        body = {"max_tokens": rng.randint(1, 12), "temperature": 0}
        if i % 2:
            body |= {"temperature": 0.9, "seed": i}
        url, rest = [
            ("completions", {"prompt": prompt, "logprobs": 2}),
            ("completions", {"prompt": prompt, "n": 2}),
            ("chat/completions", {"messages": [{"role": "user", "content": prompt[:60]}]}),
            ("completions", {"prompt": "a" * 200}),  # longer than the context
            ("embeddings", {"input": [prompt, "b"]}),
            ("completions", {"prompt": prompt, "top_p": 2}),
            ("chat/completions", {"messages": [], "logprobs": True}),
        ][(0, 0, 2, 0, 1, 2, 0, 3, 4, 1, 0, 5, 0, 2, 6, 0)[i % 16]]
        if url == "embeddings":
            body = {}
        if model is not None:
            body["model"] = model
        line = {"custom_id": f"line-{i}", "method": "POST", "url": f"/v1/{url}"}
        found.append({**line, "body": {**body, **rest}})
    rng.shuffle(found)
    return found


def normal(value):
    """A result without names and times of its making, and without what the cache has known."""
    if isinstance(value, list):
        return [normal(one) for one in value]
    if not isinstance(value, dict):
        return value
    changing = ("created", "cached_tokens", "cache_write_tokens")
    found = {name: normal(one) for name, one in value.items() if name not in changing}
    if "object" in found:  # an answer's; that of a line is made of its custom_id
        found.pop("id", None)
    return found
