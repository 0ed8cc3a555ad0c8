"""Embeddings of texts: the last hidden states of their tokens, pooled."""

from typing import Iterator, List, Literal, Sequence, Tuple

import torch
import torch.nn.functional as F

from llama.engine.engine import Engine
from llama.engine.readings import States, read
from llama.layers.ids import check_ids, padded
from llama.model import ModelArgs

Pooling = Literal["last", "mean"]


def embed(
    engine: Engine,
    texts: Sequence[str],
    pooling: Pooling = "mean",
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
        ValueError: another pooling; batch_size below 1; a text without tokens, or longer than
            max_seq_len, by number.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one text: pass a list of texts")
    if pooling not in ("last", "mean"):
        raise ValueError(f"pooling={pooling!r}: choose 'last' or 'mean'")
    tokenizer, args = engine.tokenizer, engine.model.params
    encoded = [tokenizer.encode(text, bos=tokenizer.add_bos, eos=False) for text in texts]
    check_texts(encoded, args, batch_size)
    found = [pooled_states(ids, pooling) for ids in encoded]
    read(engine, zip(encoded, found, strict=True), batch_size)
    rows = [pooled(states) for states in found]
    vectors = torch.stack(rows) if rows else torch.empty(0, args.dim)
    return F.normalize(vectors, dim=-1) if normalize else vectors


def pooled_states(ids: Sequence[int], pooling: Pooling) -> States:
    """A reading of the states that are to be pooled, for `pooled`."""
    return States(0 if pooling == "mean" else len(ids) - 1)


def pooled(states: States) -> torch.Tensor:
    """Their mean: (dim,)."""
    return states.states.mean(0)


def batches(
    texts: Sequence[Sequence[int]], args: ModelArgs, batch_size: int, device: torch.device
) -> Iterator[Tuple[List[int], torch.Tensor, torch.Tensor]]:
    """Texts of token ids in batches of similar lengths: which texts, tokens (B, T), lengths (B,).

    Raises:
        ValueError: batch_size below 1, ids outside of the vocabulary; a text without tokens, or
            longer than max_seq_len, by number.
    """
    check_texts(texts, args, batch_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        lengths = torch.tensor([len(texts[i]) for i in rows], device=device)
        yield rows, padded([texts[i] for i in rows], device), lengths


def check_texts(texts: Sequence[Sequence[int]], args: ModelArgs, batch_size: int) -> None:
    """Raises what `batches` raises."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for row, ids in enumerate(texts):
        if not 1 <= len(ids) <= args.max_seq_len:
            raise ValueError(
                f"text {row} has {len(ids)} tokens: it takes 1 to max_seq_len, {args.max_seq_len}"
            )
    check_ids(texts, args.vocab_size, "text")
