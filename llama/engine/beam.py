"""Beam search: approximates the most probable answers by extending several at each step.

It decides as transformers' `generate(num_beams=...)` does, including when to stop. A beam is
finished by a stop token or at the maximum length, and its score is its log-probability divided by
length ** length_penalty.
"""

from typing import List, Literal, NamedTuple, Sequence, Set, Tuple

import torch

from llama.engine.prefill import prefill
from llama.model import Transformer


class Beam(NamedTuple):
    """An answer and its score."""

    tokens: List[int]
    score: float  # log-probability (natural) / length ** length_penalty
    stopped: bool  # by a stop token, which isn't among the tokens but counts for the score


@torch.inference_mode()
def beam_search(
    model: Transformer,
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
    cache = model.new_cache(num_beams, len(prompt) + max_gen_len)
    h, _ = prefill(model, [prompt], cache)
    running: List[Tuple[List[int], float]] = [([], 0.0)]  # tokens, log-probability
    finished: List[Beam] = []
    for length in range(1, max_gen_len + 1):
        before = torch.tensor([[logprob] for _, logprob in running], device=h.device)
        logprobs = (model.logits(h).log_softmax(-1) + before).flatten()
        # Enough that num_beams of them continue, even if the others end in stop tokens.
        keep = max(2, 1 + len(stop_tokens)) * num_beams
        values, places = (part.tolist() for part in logprobs.topk(min(keep, len(logprobs))))
        full = len(finished) == num_beams
        going_on: List[Tuple[int, int, float]] = []  # beam, token, log-probability
        for rank, (logprob, at) in enumerate(zip(values, places, strict=True)):
            beam, token = divmod(at, model.vocab_size)
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
        cache.gather([beam for beam, _, _ in going_on])
        drawn = torch.tensor([[token] for _, token, _ in going_on], device=h.device)
        h = model.hidden(drawn, cache.lengths, cache)[:, -1]
    return finished
