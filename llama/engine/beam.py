"""Beam search: approximates the most probable answers by extending several at each step.

It decides as transformers' `generate(num_beams=...)` does, including when to stop. A beam is
finished by a stop token or at the maximum length, and its score is its log-probability divided by
length ** length_penalty.
"""

from typing import Any, List, Literal, NamedTuple, Sequence, Set, Tuple

from llama.engine.engine import Engine
from llama.engine.predictions import BeamPrediction
from llama.engine.rows import check, check_batch


class Beam(NamedTuple):
    """An answer and its score."""

    tokens: List[int]
    score: float  # log-probability (natural) / length ** length_penalty
    stopped: bool  # by a stop token, which isn't among the tokens but counts for the score


def beam_predictions(
    engine: Engine, prompts: Sequence[Sequence[int]], max_gen_len: int, num_beams: int, **how: Any
) -> List[List[BeamPrediction]]:
    """`beam_search` for each prompt, with the tokenizer's stop tokens, as far as the context goes.

    Raises:
        ValueError: prompts that the model can't take, too many of them, and what it raises.
    """
    tokenizer, args = engine.tokenizer, engine.model.params
    check_batch(args, len(prompts), 1)
    check(engine.model, prompts, max_gen_len, 1)
    found: List[List[BeamPrediction]] = []
    for prompt in prompts:
        length = min(max_gen_len, args.max_seq_len - len(prompt))
        how["stop_tokens"] = tokenizer.stop_tokens
        found.append([
            {
                "generation": tokenizer.decode(beam.tokens),
                "finish_reason": "stop" if beam.stopped else "length",
                "score": beam.score,
            }
            for beam in beam_search(engine, prompt, length, num_beams, **how)
        ])  # fmt: skip
    return found


def beam_search(
    engine: Engine,
    prompt: Sequence[int],
    max_gen_len: int,
    num_beams: int,
    *,
    stop_tokens: Set[int],
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> List[Beam]:
    """The best answers to a prompt of token ids, at most num_beams, the best first.

    Args:
        length_penalty: above 0 favours long answers, below 0 short ones.
        early_stopping: True stops as soon as there are num_beams finished beams; False when no
            unfinished beam scores higher, at its current length, than the worst finished one;
            "never" when none could score higher at any length.

    Raises:
        ValueError: num_beams or max_gen_len below 1, or an unknown early_stopping.
    """
    if num_beams < 1 or max_gen_len < 1:
        raise ValueError(f"num_beams={num_beams} and max_gen_len={max_gen_len} must be at least 1")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping={early_stopping!r}: choose True, False or 'never'")
    running: List[Tuple[List[int], float]] = [([], 0.0)]  # tokens, log-probability
    finished: List[Beam] = []
    # Enough that num_beams of them continue, even if the others end in stop tokens.
    keep = max(2, 1 + len(stop_tokens)) * num_beams
    for length in range(1, max_gen_len + 1):
        nexts = _likeliest(engine, [[*prompt, *tokens] for tokens, _ in running], keep)
        found = [
            (before + logprob, beam, token)
            for beam, ((_, before), best) in enumerate(zip(running, nexts, strict=True))
            for token, logprob in best
        ]
        found = sorted(found, key=lambda one: (-one[0], *one[1:]))[:keep]
        full = len(finished) == num_beams
        going_on: List[Tuple[int, int, float]] = []  # beam, token, log-probability
        for rank, (logprob, beam, token) in enumerate(found):
            if token not in stop_tokens and length < max_gen_len:
                going_on.append((beam, token, logprob))
            elif rank < num_beams and not (full and early_stopping is True):
                stopped = token in stop_tokens
                tokens = running[beam][0] + ([] if stopped else [token])
                finished.append(Beam(tokens, logprob / length**length_penalty, stopped))
        finished = sorted(finished, key=lambda beam: -beam.score)[:num_beams]
        going_on = going_on[:num_beams]
        if not going_on:
            break
        if len(finished) == num_beams:
            reach = max_gen_len if early_stopping == "never" and length_penalty > 0 else length
            best = going_on[0][2] / reach**length_penalty
            if early_stopping is True or best <= finished[-1].score:
                break
        running = [(running[beam][0] + [token], logprob) for beam, token, logprob in going_on]
    engine.tidy()
    return finished


def _likeliest(
    engine: Engine, texts: Sequence[Sequence[int]], n: int
) -> List[List[Tuple[int, float]]]:
    """For each text the n most probable next tokens, with their log-probabilities.

    All but the last token of each is in the cache, whose blocks the beams share.
    """
    n = min(n, engine.model.vocab_size)
    options = dict(temperature=0, top_logprobs=n, stop_tokens=set(), speculate="off")
    requests = [engine.add(text, 1, **options) for text in texts]
    found = []
    for request in requests:
        [event] = engine.events(request)
        found.append(event.top_logprobs or [])
    return found
