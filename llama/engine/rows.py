"""Rows: the texts of a call in the making, and what a call may say of them."""

from dataclasses import dataclass, field
from typing import Callable, List, Literal, Mapping, Optional, Sequence, Set, TypedDict

import torch

from llama.engine.params import SamplingParams
from llama.engine.predictions import Speculation
from llama.engine.sampling import Numbers
from llama.engine.stopping import StopStrings
from llama.engine.structured import Constraint, ResponseFormat, Structures
from llama.model import Transformer
from llama.tokenizer import StreamDecoder, Tokenizer

# Between the seeds of a prompt's samples, so that neighbours' seeds don't meet.
SEED_STEP = 0x9E3779B97F4A7C15


class Options(TypedDict, total=False):
    """What every way to generate takes beside Meta's arguments, each by its name.

    params: all that can be said of sampling, in place of temperature and top_p.
    seed: of the random numbers, one for all prompts or one each. A row's tokens depend on its
        prompt, its parameters and its seed, and not on the batch that it is in. By default drawn
        from the seed given to `build`, and different for each call.
    n: samples of each prompt (1); they share its prefill and stand next to each other.
    stop: strings at the first of which a text ends, itself left out.
    stop_tokens: ids that end a row, themselves left out; the tokenizer's by default.
    top_logprobs: as many most probable tokens are returned for each one of the answer (0).
    should_stop: asked after each step, on rank 0; True ends all rows.
    speculate: guess tokens, so that a pass of the model may give several; the text is the same
        (see `llama.engine.speculative`). "lookup" guesses what followed the same words before, for
        answers that repeat their prompt; "draft" asks the draft model, the default where there is
        one; "off".
    response_format: what the text must be like: {"type": "json_schema", "schema": {...}}, or one of
        the others in `llama.engine.structured`. One for all prompts, or one or None for each. A row
        that is cut off by its length holds the beginning of such a text.
    """

    params: Optional[SamplingParams]
    seed: Optional[int | Sequence[int]]
    n: int
    stop: Sequence[str]
    stop_tokens: Optional[Set[int]]
    top_logprobs: int
    should_stop: Optional[Callable[[], bool]]
    speculate: Optional[Literal["lookup", "draft", "off"]]
    response_format: Optional[ResponseFormat | Sequence[Optional[ResponseFormat]]]


@dataclass
class Row:
    """One text in the making.

    Args:
        index: of its prompt, among those of the call.
        sample: which of the prompt's samples it is, from 0.
        max_len: tokens of prompt and answer together.
        seed: of its random numbers. Its tokens depend on this, on its prompt and its parameters,
            and not on its neighbours in the batch.
    """

    index: int
    sample: int
    prompt: Sequence[int]
    max_len: int
    params: SamplingParams
    seed: int
    stop: Sequence[str]
    constraint: Optional[Constraint] = None  # what its text must be like; rank 0 follows it
    answer: List[int] = field(default_factory=list)
    speculation: Optional[Speculation] = None  # counts, if its tokens are guessed

    @property
    def full(self) -> bool:
        return len(self.prompt) + len(self.answer) >= self.max_len

    def __post_init__(self) -> None:
        self.stops = StopStrings(self.stop)
        self.is_argmax = self.params.is_argmax

    def begin(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """What it takes to draw tokens and to turn them into text."""
        self.numbers = Numbers(self.seed, device)
        self.decoder: StreamDecoder = tokenizer.stream()


def check(model: Transformer, prompts: Sequence[Sequence[int]], max_gen_len: int, n: int) -> None:
    """Raises ValueError for prompts that can't be generated from, by number, limit and way out."""
    params = model.params
    if not prompts:
        raise ValueError("no prompts: pass at least one")
    if len(prompts) * n > params.max_batch_size:
        samples = f" of {n} samples" if n > 1 else ""
        raise ValueError(
            f"{len(prompts)} prompts{samples}, and max_batch_size is {params.max_batch_size}: "
            "pass fewer at a time, or build with a larger max_batch_size"
        )
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if max_gen_len < 0:
        raise ValueError(f"max_gen_len={max_gen_len} must be 0 or more")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: it takes at least one token")
        if len(prompt) > params.max_seq_len:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, and max_seq_len is "
                f"{params.max_seq_len}: shorten it, or build with a larger max_seq_len"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= params.vocab_size:
            raise ValueError(
                f"prompt {row} has the token id {low if low < 0 else high}: "
                f"this model knows 0 to {params.vocab_size - 1}"
            )


def make_rows(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_gen_len: int,
    params: SamplingParams,
    generator: torch.Generator,
    options: Options,
) -> List[Row]:
    """The rows of a call, n for each prompt; seeds that aren't given come from the generator.

    Raises:
        ValueError: what `check` raises, and a wrong number of seeds.
    """
    n, seed = options.get("n", 1), options.get("seed")
    check(model, prompts, max_gen_len, n)
    if seed is None:
        seeds = torch.randint(1 << 62, (len(prompts),), generator=generator).tolist()
    else:
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: pass one for each")
    return [
        Row(
            index, sample, prompt, min(model.params.max_seq_len, len(prompt) + max_gen_len), params,
            (seeds[index] + sample * SEED_STEP) % (1 << 63), options.get("stop", ()),
        )
        for index, prompt in enumerate(prompts)
        for sample in range(n)
    ]  # fmt: skip


def constrain(
    rows: List[Row],
    structures: Structures,
    formats: ResponseFormat | Sequence[Optional[ResponseFormat]],
    stop_tokens: Set[int],
) -> None:
    """Give rows the response format of their prompts: one for all, or one or None for each.

    Raises:
        ValueError: what isn't a format, or another number of them than of prompts.
    """
    prompts = 1 + max(row.index for row in rows)
    of_each = [formats] * prompts if isinstance(formats, Mapping) else list(formats)
    wrong = [one for one in of_each if one is not None and not isinstance(one, Mapping)]
    if isinstance(formats, str) or wrong:
        raise ValueError(f'response_format={formats!r}: a dict, like {{"type": "json_object"}}')
    if len(of_each) != prompts:
        raise ValueError(f"{len(of_each)} response formats for {prompts} prompts: one for each")
    for row in rows:
        format_ = of_each[row.index]
        if format_ is not None:
            row.constraint = structures.constraint(format_, stop_tokens)
