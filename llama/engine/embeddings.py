"""Texts as vectors: the last hidden states of their tokens, pooled."""

from typing import Literal, Sequence

import torch
import torch.nn.functional as F

from llama.engine.prefill import padded
from llama.model import Transformer
from llama.tokenizer import Tokenizer


@torch.inference_mode()
def embed(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pooling: Literal["last", "mean"] = "mean",
    normalize: bool = True,
    batch_size: int = 8,
) -> torch.Tensor:
    """A vector for each text: (len(texts), dim), fp32, on the CPU.

    Args:
        pooling: of the states after the model's norm: "last", that of the last token, which alone
            saw all of the text; or their "mean".
        normalize: to length 1, so that dot products are cosines.
        batch_size: texts computed at a time.

    Raises:
        ValueError: another pooling; a text without tokens, or longer than max_seq_len, by number.
    """
    if pooling not in ("last", "mean"):
        raise ValueError(f"pooling={pooling!r}: choose 'last' or 'mean'")
    encoded = [tokenizer.encode(text, bos=tokenizer.add_bos, eos=False) for text in texts]
    most, device = model.params.max_seq_len, model.norm.weight.device
    for row, ids in enumerate(encoded):
        if not 1 <= len(ids) <= most:
            raise ValueError(f"text {row} has {len(ids)} tokens: it takes 1 to max_seq_len, {most}")
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found = torch.empty(len(encoded), model.params.dim)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        lengths = torch.tensor([len(encoded[i]) for i in rows], device=device)
        tokens = padded([encoded[i] for i in rows], device)
        h = model.hidden(tokens).float()  # (B, T, dim)
        if pooling == "last":
            pooled = h[torch.arange(len(rows), device=device), lengths - 1]
        else:
            real = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
            pooled = (h * real[..., None]).sum(1) / lengths[:, None]
        found[rows] = pooled.cpu()
    return F.normalize(found, dim=-1) if normalize else found
