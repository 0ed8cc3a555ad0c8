"""Beam search: approximates the most probable answers by extending several at each step.

It decides as transformers' `generate(num_beams=...)` does, including when to stop. A beam is
finished by a stop token or at the maximum length, and its score is its log-probability divided by
length ** length_penalty.
"""

from dataclasses import dataclass
from typing import Any, Iterator, List, Literal, NamedTuple, Optional, Sequence, Set, Tuple

from llama.engine.engine import Engine
from llama.engine.predictions import BeamPrediction
from llama.engine.requests import Request
from llama.engine.rows import check, check_batch, model_image_id
from llama.tokenizer import Tokenizer

Early = bool | Literal["never"]


class Beam(NamedTuple):
    """An answer and its score."""

    tokens: List[int]
    score: float  # log-probability (natural) / length ** length_penalty
    stopped: bool  # by a stop token, which isn't among the tokens but counts for the score


@dataclass(frozen=True)
class BeamEvent:
    """More of the text that the best answer to a prompt begins with."""

    index: int  # of the prompt
    text: str
    beams: Optional[List[BeamPrediction]]  # in a prompt's last event: its answers, the best first


class Search:
    """The beams of one prompt.

    Args:
        prompt: token ids.
        length_penalty: above 0 favours long answers, below 0 short ones.
        early_stopping: True stops as soon as there are num_beams finished beams; False when no
            unfinished beam scores higher, at its current length, than the worst finished one;
            "never" when none could score higher at any length.

    Raises:
        ValueError: num_beams or max_gen_len below 1, or an unknown early_stopping.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_gen_len: int,
        num_beams: int,
        *,
        stop_tokens: Set[int],
        length_penalty: float = 1.0,
        early_stopping: Early = False,
    ):
        if num_beams < 1 or max_gen_len < 1:
            raise ValueError(
                f"num_beams={num_beams} and max_gen_len={max_gen_len} must be at least 1"
            )
        if early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={early_stopping!r}: choose True, False or 'never'")
        self.prompt, self.max_gen_len, self.num_beams = [*prompt], max_gen_len, num_beams
        self.stop_tokens, self.length_penalty = stop_tokens, length_penalty
        self.early_stopping = early_stopping
        # Enough that num_beams of them continue, even if the others end in stop tokens.
        self.keep = max(2, 1 + len(stop_tokens)) * num_beams
        self.running: List[Tuple[List[int], float]] = [([], 0.0)]  # tokens, log-probability
        self.finished: List[Beam] = []  # the best first
        self.length = 0

    @property
    def agreed(self) -> List[int]:
        """The tokens that all beams begin with, and so all answers will."""
        beams = [tokens for tokens, _ in self.running] + [beam.tokens for beam in self.finished]
        first, last = min(beams), max(beams)  # in the order of words: the others lie between them
        length = next((i for i, token in enumerate(first) if token != last[i]), len(first))
        return first[:length]

    def extend(self, nexts: List[List[Tuple[int, float]]]) -> None:
        """Take a step, with the likeliest next tokens of each running beam and their
        log-probabilities. The search is over when none is running."""
        self.length += 1
        found = [
            (before + logprob, beam, token)
            for beam, ((_, before), best) in enumerate(zip(self.running, nexts, strict=True))
            for token, logprob in best
        ]
        found = sorted(found, key=lambda one: (-one[0], *one[1:]))[: self.keep]
        full = len(self.finished) == self.num_beams
        going_on: List[Tuple[List[int], float]] = []
        for rank, (logprob, beam, token) in enumerate(found):
            tokens, stopped = self.running[beam][0], token in self.stop_tokens
            if not stopped and self.length < self.max_gen_len:
                going_on.append(([*tokens, token], logprob))
            elif rank < self.num_beams and not (full and self.early_stopping is True):
                answer = tokens if stopped else [*tokens, token]
                score = logprob / self.length**self.length_penalty
                self.finished.append(Beam(answer, score, stopped))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.num_beams]
        self.running = going_on[: self.num_beams]
        if self.running and len(self.finished) == self.num_beams:
            at_length = self.early_stopping != "never" or self.length_penalty <= 0
            reach = self.length if at_length else self.max_gen_len
            best = self.running[0][1] / reach**self.length_penalty
            if self.early_stopping is True or best <= self.finished[-1].score:
                self.running = []


def run(engine: Engine, searches: Sequence[Search]) -> Iterator[None]:
    """Steps of all searches together, until each is over.

    All but the last token of each beam is in the cache, whose blocks the beams share.
    """
    requests: List[Request] = []
    image = model_image_id(engine.model)  # no beam's: a prompt with it would need an image
    try:
        while going := [search for search in searches if search.running]:
            requests = [
                _likeliest(engine, [*search.prompt, *tokens], search.keep + (image >= 0))
                for search in going
                for tokens, _ in search.running
            ]
            nexts = (
                [one for one in [*engine.events(request)][-1].top_logprobs or [] if one[0] != image]
                for request in requests
            )
            for search in going:
                search.extend([next(nexts) for _ in search.running])
            yield
    finally:
        for request in requests:  # of a step that failed
            engine.cancel(request)
        engine.tidy()


def _likeliest(engine: Engine, tokens: Sequence[int], n: int) -> Request:
    """A request for the n most probable next tokens, with their log-probabilities."""
    n = min(n, engine.model.vocab_size, engine.tokenizer.n_words)
    return engine.add(tokens, 1, temperature=0, top_logprobs=n, stop_tokens=set(), speculate="off")


def beam_search(
    engine: Engine, prompt: Sequence[int], max_gen_len: int, num_beams: int, **how: Any
) -> List[Beam]:
    """The best answers to a prompt of token ids, at most num_beams, the best first.

    See `Search` for the arguments and errors.
    """
    search = Search(prompt, max_gen_len, num_beams, **how)
    for _ in run(engine, [search]):
        pass
    return search.finished


def stream_beams(
    engine: Engine, prompts: Sequence[Sequence[int]], max_gen_len: int, num_beams: int, **how: Any
) -> Iterator[BeamEvent]:
    """Search for all prompts at once, with the tokenizer's stop tokens, as far as the context
    goes; the text of each as soon as all its beams agree on it.

    Raises:
        ValueError: prompts that the model can't take, too many of them, and what `Search` raises.
    """
    tokenizer, args = engine.tokenizer, engine.model.params
    check_batch(args, prompts, 1)
    check(engine.model, prompts, max_gen_len, 1)
    for row, prompt in enumerate(prompts):
        if len(prompt) == args.max_seq_len:
            raise ValueError(
                f"prompt {row} fills the context, {args.max_seq_len} tokens: shorten it, or build "
                "with a larger max_seq_len"
            )
    lengths = [min(max_gen_len, args.max_seq_len - len(prompt)) for prompt in prompts]
    searches = [
        Search(prompt, length, num_beams, stop_tokens=tokenizer.stop_tokens, **how)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return _events(engine, searches, tokenizer)


def _events(
    engine: Engine, searches: Sequence[Search], tokenizer: Tokenizer
) -> Iterator[BeamEvent]:
    decoders = {index: tokenizer.stream() for index in range(len(searches))}
    sent = [0] * len(searches)
    for _ in run(engine, searches):
        for index, decoder in [*decoders.items()]:
            search, beams = searches[index], None
            tokens = search.agreed if search.running else search.finished[0].tokens
            text = "".join(map(decoder.feed, tokens[sent[index] :]))
            sent[index] = len(tokens)
            if not search.running:
                text += decoder.finish()
                beams = [_prediction(beam, tokenizer) for beam in search.finished]
                del decoders[index]
            if text or beams:
                yield BeamEvent(index, text, beams)


def _prediction(beam: Beam, tokenizer: Tokenizer) -> BeamPrediction:
    return {
        "generation": tokenizer.decode(beam.tokens),
        "finish_reason": "stop" if beam.stopped else "length",
        "score": beam.score,
    }


def beam_predictions(
    engine: Engine, prompts: Sequence[Sequence[int]], max_gen_len: int, num_beams: int, **how: Any
) -> List[List[BeamPrediction]]:
    """The answers to each prompt, the best first; see `stream_beams`."""
    events = stream_beams(engine, prompts, max_gen_len, num_beams, **how)
    found = {event.index: event.beams for event in events if event.beams}
    return [found[index] for index in range(len(prompts))]
