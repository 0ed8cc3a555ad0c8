"""Embeddings of texts: the last hidden states of their tokens, pooled."""

from typing import Iterator, List, Literal, Sequence, Tuple

import torch
import torch.nn.functional as F

from llama.layers.ids import check_ids, padded
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer


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
    return embed_ids(model, encoded, pooling, normalize, batch_size)


@torch.inference_mode()
def embed_ids(
    model: Transformer,
    encoded: Sequence[Sequence[int]],
    pooling: Literal["last", "mean"] = "mean",
    normalize: bool = True,
    batch_size: int = 8,
) -> torch.Tensor:
    """`embed` for texts of token ids."""
    device = model.norm.weight.device
    found = torch.empty(len(encoded), model.params.dim)
    for rows, tokens, lengths in batches(encoded, model.params, batch_size, device):
        h = model.hidden(tokens).float()  # (B, T, dim)
        if pooling == "last":
            pooled = h[torch.arange(len(rows), device=device), lengths - 1]
        else:
            real = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
            pooled = (h * real[..., None]).sum(1) / lengths[:, None]
        found[rows] = pooled.cpu()
    return F.normalize(found, dim=-1) if normalize else found


def batches(
    texts: Sequence[Sequence[int]], args: ModelArgs, batch_size: int, device: torch.device
) -> Iterator[Tuple[List[int], torch.Tensor, torch.Tensor]]:
    """Texts of token ids in batches of similar lengths: which texts, tokens (B, T), lengths (B,).

    Raises:
        ValueError: batch_size below 1, ids outside of the vocabulary; a text without tokens, or
            longer than max_seq_len, by number.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for row, ids in enumerate(texts):
        if not 1 <= len(ids) <= args.max_seq_len:
            raise ValueError(
                f"text {row} has {len(ids)} tokens: it takes 1 to max_seq_len, {args.max_seq_len}"
            )
    check_ids(texts, args.vocab_size, "text")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        lengths = torch.tensor([len(texts[i]) for i in rows], device=device)
        yield rows, padded([texts[i] for i in rows], device), lengths
