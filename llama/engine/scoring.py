"""Log-probabilities of texts and of continuations, and perplexity.

Log-probabilities are natural and of the model's own distribution. A text is encoded with bos in
front where the tokenizer adds it; the first token, which nothing comes before, is never scored.
"""

import math
from itertools import accumulate, pairwise
from typing import Iterator, List, Literal, NamedTuple, Optional, Sequence, Tuple

from llama.engine.engine import Engine
from llama.engine.readings import Scores, read
from llama.layers.ids import check_ids
from llama.model import ModelArgs

Convention = Literal["transformers", "llama.cpp"]


class TextScore(NamedTuple):
    tokens: List[int]
    logprobs: List[float]  # of each token given those before it; 0.0 for the first
    total: float  # their sum


class ContinuationScore(NamedTuple):
    total: float  # log-probability of the continuation given its context
    greedy: bool  # whether each of its tokens is the most probable one where it stands


class Perplexity(NamedTuple):
    perplexity: float  # exp(nll / tokens); NaN if no tokens were scored
    nll: float  # minus the sum of log-probabilities, in nats
    tokens: int  # how many were scored


class Span(NamedTuple):
    """Token ids that a model sees at once, of which ids[start:] are scored; start >= 1."""

    ids: Sequence[int]
    start: int


def score(engine: Engine, texts: Sequence[str], batch_size: int = 8) -> List[TextScore]:
    """Log-probability of each token of each text, in the order of the texts.

    Raises:
        ValueError: texts is one string; a text longer than the model's context; `score_spans`.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one text: pass a list of texts")
    tokenizer, most = engine.tokenizer, engine.model.params.max_seq_len
    encoded = [tokenizer.encode(text, bos=tokenizer.add_bos, eos=False) for text in texts]
    for row, ids in enumerate(encoded):
        if len(ids) > most:
            raise ValueError(
                f"text {row} has {len(ids)} tokens, and max_seq_len is {most}: ask for its "
                "perplexity, which is computed in windows, or build with a larger max_seq_len"
            )
    found = score_spans(engine, [Span(ids, 1) for ids in encoded], batch_size)
    return [
        TextScore(ids, [0.0] * bool(ids) + logprobs, math.fsum(logprobs))
        for ids, (logprobs, _) in zip(encoded, found, strict=True)
    ]


def score_continuations(
    engine: Engine, pairs: Sequence[Tuple[Sequence[int], Sequence[int]]], batch_size: int = 8
) -> List[ContinuationScore]:
    """Log-probability of each continuation given its context, both as token ids.

    Raises:
        ValueError: an empty context: begin with bos, or eos where there is none; `score_spans`.
    """
    for row, (context, _) in enumerate(pairs):
        if not len(context):
            raise ValueError(f"context {row} is empty: begin it with the id of bos, or of eos")
    spans = [Span([*context, *continuation], len(context)) for context, continuation in pairs]
    return [
        ContinuationScore(math.fsum(logprobs), all(greedy))
        for logprobs, greedy in score_spans(engine, spans, batch_size)
    ]


def perplexity(
    engine: Engine,
    text: str,
    stride: Optional[int] = None,
    context: Optional[int] = None,
    *,
    convention: Convention = "transformers",
    batch_size: int = 8,
) -> Perplexity:
    """Perplexity of a text of any length, by one of two published conventions.

    Args:
        stride: tokens from the begin of one window to that of the next, for "transformers"; half
            of the context by default. The smaller, the more each token sees, and the slower.
        context: tokens of a window; the model's max_seq_len by default.
        convention: "transformers": see `strided_windows`; "llama.cpp": see `halved_chunks`.
        batch_size: windows computed at a time.

    Raises:
        ValueError: a text of which no token can be scored; stride or context out of range;
            `score_spans`.
    """
    if isinstance(text, str):
        (found,) = perplexities(
            engine, [text], stride, context, convention=convention, batch_size=batch_size
        )
        if found.tokens:
            return found
        raise ValueError(
            f"no token of this text of {len(text)} characters can be scored: the first has nothing "
            'before it, and convention="llama.cpp" leaves out what doesn\'t fill a window'
        )
    raise ValueError(f"text is a {type(text).__name__}: pass one str, or use perplexities")


def perplexities(
    engine: Engine,
    texts: Sequence[str],
    stride: Optional[int] = None,
    context: Optional[int] = None,
    *,
    convention: Convention = "transformers",
    batch_size: int = 8,
) -> List[Perplexity]:
    """`perplexity` of each text on its own, the windows of all of them batched together.

    A text without a token to score has 0 tokens and a perplexity of NaN.
    """
    tokenizer, most = engine.tokenizer, engine.model.params.max_seq_len
    context = most if context is None else context
    if not 2 <= context <= most:
        raise ValueError(
            f"context={context} must lie between 2 and the model's max_seq_len of {most}: "
            "build with a larger max_seq_len for more"
        )
    stride = context // 2 if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must lie between 1 and the context of {context}")
    if convention not in ("transformers", "llama.cpp"):
        raise ValueError(f"convention={convention!r} must be 'transformers' or 'llama.cpp'")

    windows: List[List[Span]] = []
    for text in texts:
        ids = tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)
        if convention == "transformers":
            windows.append(list(strided_windows(ids, context, stride)))
        else:
            bos = tokenizer.bos_id if tokenizer.add_bos else None
            windows.append(list(halved_chunks(ids, context, bos)))
    found = score_spans(engine, [span for spans in windows for span in spans], batch_size)
    results = []
    for begin, end in pairwise(accumulate(map(len, windows), initial=0)):
        logprobs = [logprob for row, _ in found[begin:end] for logprob in row]
        nll, tokens = -math.fsum(logprobs), len(logprobs)
        results.append(Perplexity(math.exp(nll / tokens) if tokens else math.nan, nll, tokens))
    return results


def strided_windows(ids: Sequence[int], context: int, stride: int) -> Iterator[Span]:
    """Windows of `context` ids, one every `stride`; what an earlier one scored is only seen.

    Those of transformers' "Perplexity of fixed-length models": bos, if any, only begins the text.
    Each token counts once; the code printed there weights all windows but the first with one
    token less than they score. With stride = context the first token of each window is left out.
    """
    scored = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        yield Span(ids[begin:end], max(scored - begin, 1))
        scored = end
        if end == len(ids):
            break


def halved_chunks(ids: Sequence[int], context: int, bos: Optional[int]) -> Iterator[Span]:
    """Chunks of `context` ids, side by side, of which the second half is scored but its first.

    Those of llama.cpp's `llama-perplexity` (tools/perplexity/perplexity.cpp): bos, if given, takes
    the place of each chunk's first token; what is left at the end of the text isn't scored.
    """
    for begin in range(0, len(ids) - context + 1, context):
        chunk = ids[begin : begin + context]
        yield Span(chunk if bos is None else [bos, *chunk[1:]], context // 2 + 1)


def score_spans(
    engine: Engine, spans: Sequence[Span], batch_size: int = 8
) -> List[Tuple[List[float], List[bool]]]:
    """For each of ids[start:] its log-probability and whether it is the most probable token.

    Memory: the cache of `batch_size` spans, the hidden states of a pass, and the logits of
    `projection.PROJECTED` positions. Under torchrun all ranks call this with the same arguments,
    and each has the result.

    Raises:
        ValueError: ids outside of the vocabulary, more than max_seq_len before the last one,
            batch_size below 1, start below 1, or logits that aren't finite.
    """
    _check(engine.model.params, spans, batch_size)
    scores = [Scores(span.ids, span.start) for span in spans]
    # Longest first, so that what doesn't fit into memory is found out at once; those that begin
    # alike side by side, so that their beginning is still in the cache.
    order = [row for row, span in enumerate(spans) if len(span.ids) > span.start]
    order.sort(key=lambda row: (-spans[row].start, list(spans[row].ids)))
    read(engine, ((list(spans[row].ids[:-1]), scores[row]) for row in order), batch_size)
    for row, found in enumerate(scores):
        if not all(map(math.isfinite, found.logprobs)):  # on every rank alike
            raise ValueError(
                f"the model's logits for text {row} aren't finite: broken weights, or a dtype "
                "too narrow for them; try dtype=torch.float32"
            )
    return [(found.logprobs, found.greedy) for found in scores]


def _check(params: ModelArgs, spans: Sequence[Span], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for row, (ids, start) in enumerate(spans):
        if start < 1:
            raise ValueError(f"text {row}: start={start} must be at least 1")
        if len(ids) > params.max_seq_len + 1:  # the last token is scored, but not fed
            raise ValueError(
                f"text {row} has {len(ids)} tokens, and {params.max_seq_len + 1} can be scored at "
                "once: shorten it, or build with a larger max_seq_len"
            )
    check_ids([span.ids for span in spans], params.vocab_size, "text")
