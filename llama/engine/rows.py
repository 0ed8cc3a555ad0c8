"""Rows, which are the sequences that a call generates, and the options of a call."""

from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Number
from typing import (
    Any,
    Callable,
    Collection,
    Iterable,
    List,
    Literal,
    Mapping,
    Optional,
    Sequence,
    Set,
    SupportsIndex,
    TypedDict,
    cast,
)

import torch

from llama.engine.params import SamplingParams
from llama.engine.predictions import Speculation
from llama.engine.sampling import RandomNumbers
from llama.engine.stopping import StopStrings, stop_strings
from llama.engine.structured import Constraint, GrammarCompiler, ResponseFormat
from llama.layers.ids import check_ids
from llama.layers.low_rank import number
from llama.model import ModelArgs, Transformer
from llama.text.tools import Tool
from llama.tokenizer import StreamDecoder, Tokenizer

# The difference between the seeds of a prompt's samples: prompts with adjacent seeds share none.
SEED_STEP = 0x9E3779B97F4A7C15


class Options(TypedDict, total=False):
    """Keyword arguments of every method that generates, in addition to Meta's.

    params: all sampling parameters, in place of temperature and top_p.
    seed: of the random numbers, one for all prompts or one each. A row's tokens depend on its
        prompt, its parameters and its seed, not on the batch that it is in. By default new ones for
        each call, from the seed given to `build`.
    n: samples of each prompt (1), adjacent in the result; they share its prefill.
    stop: strings: a text ends before the first of them; None: there are none.
    stop_tokens: ids that end a row and aren't returned; the tokenizer's by default.
    top_logprobs: how many most probable tokens to return for each token of the answer (0).
    should_stop: called after each step that gives a token, on rank 0; True ends all rows.
    speculate: speculative decoding, where a forward pass may give several tokens; the text is the
        same (see `llama.engine.speculative`). "lookup" proposes what followed the same tokens
        earlier in the text, for answers that repeat their prompt; "draft" uses the draft model, the
        default if there is one; "off".
    response_format: structured outputs, a constraint on the text: {"type": "json_schema", "schema":
        {...}}, or another of `llama.engine.structured`'s types. One for all prompts, or one or None
        for each. A row that ends with finish_reason "length" holds the beginning of such a text.
    images: for models that see, a list for each prompt, of what `llama.vision.images.tile` returns,
        in the order in which they stand in the prompt: for each the first id after the tokenizer's,
        or, for Llama 4, all the ids that it is to read there.
    adapter: the name of a LoRA adapter that `Llama.add_adapter` loaded, one for all prompts, or one
        or None for each.
    """

    params: Optional[SamplingParams]
    seed: Optional[int | Sequence[int]]
    n: int
    stop: Optional[Sequence[str]]
    stop_tokens: Optional[Set[int]]
    top_logprobs: int
    should_stop: Optional[Callable[[], bool]]
    speculate: Optional[Literal["lookup", "draft", "off"]]
    response_format: Optional[ResponseFormat | Sequence[Optional[ResponseFormat]]]
    images: Optional[Sequence[Sequence[Any]]]
    adapter: Optional[str | Sequence[Optional[str]]]


class ChatOptions(Options, total=False):
    """Further options for dialogs.

    tools: what the model may call: JSON schemas, Python functions (which aren't run), and names of
        built-in tools. Its calls are in the message, as `tool_calls`.
    tool_choice: "auto" (default) lets the model decide whether to call one; "required", or the name
        of a tool, constrains the answer to one call that fits its schema.
    parallel_tool_calls: with such a tool_choice, the answer may also be a list of calls.
    truncate: "oldest_turns" drops the oldest turns of a dialog until it fits into the context with
        max_gen_len tokens of answer (a quarter of the context if that is None, or no less than the
        context); system messages stay. By default a dialog longer than the context is an error.
    continue_final_message: the last message is the assistant's, and is continued: the generation is
        what follows its content.
    template_kwargs: further variables of the checkpoint's chat template, of JSON types.
    """

    tools: Optional[Sequence[Tool]]
    tool_choice: str
    parallel_tool_calls: bool
    truncate: Optional[Literal["oldest_turns"]]
    continue_final_message: bool
    template_kwargs: Optional[Mapping[str, Any]]


@dataclass
class Row:
    """A sequence being generated: a row of the batch.

    Args:
        index: of its prompt, among those of the call.
        sample: which of the prompt's samples it is, from 0.
        max_len: tokens of prompt and answer together.
        seed: of its random numbers.
        adapter: its number (`llama.layers.low_rank`); 0: none.
        images: in its prompt, how many tokens stand for each, and the id of these tokens.

    Attributes:
        views: what its tokens see of them, while it runs.
    """

    index: int
    sample: int
    prompt: Sequence[int]
    max_len: int
    params: SamplingParams
    seed: int
    stop: Sequence[str]
    adapter: int = 0
    images: Sequence[Any] = ()
    image_tokens: Sequence[int] = ()
    image_id: int = -1
    constraint: Optional[Constraint] = None  # on its text; advanced by rank 0 alone
    answer: List[int] = field(default_factory=list)
    speculation: Optional[Speculation] = None  # with speculative decoding
    echo: bool = False  # whether the events of its prompt are still to come

    @cached_property
    def image_places(self) -> List[int]:
        return [i for i, token in enumerate(self.prompt) if token == self.image_id]

    @property
    def full(self) -> bool:
        return len(self.prompt) + len(self.answer) >= self.max_len

    def __post_init__(self) -> None:
        self.stops = StopStrings(self.stop)
        self.is_argmax = self.params.is_argmax
        self.views: Optional[Sequence[Any]] = None

    def begin(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Create what samples tokens and what decodes them."""
        self.numbers = RandomNumbers(self.seed, device)
        self.decoder: StreamDecoder = tokenizer.stream()


def check_batch(args: ModelArgs, prompts: Sequence[Sequence[int]], n: int) -> None:
    """Raises ValueError for no prompts, ids in their place, and more rows than a call may have."""
    if not len(prompts):
        raise ValueError("no prompts: pass at least one")
    if isinstance(prompts[0], Integral):
        raise ValueError("prompts is one list of token ids: pass a list of such lists")
    if isinstance(n, Integral) and len(prompts) * n > args.max_batch_size:  # else see `check`
        samples = f" of {n} samples" if n > 1 else ""
        raise ValueError(
            f"{len(prompts)} prompts{samples}, and max_batch_size is {args.max_batch_size}: "
            "pass fewer at a time, or build with a larger max_batch_size"
        )


def check(model: Transformer, prompts: Sequence[Sequence[int]], max_gen_len: int, n: int) -> None:
    """Raises ValueError for prompts that the model can't take, with the limit and a way out."""
    params = model.params
    if not isinstance(n, Integral):
        raise ValueError(f"n={n!r} isn't a whole number")
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if not isinstance(max_gen_len, Integral):
        raise ValueError(f"max_gen_len={max_gen_len!r} isn't a whole number")
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
    check_ids(prompts, max(params.vocab_size, model_image_id(model) + 1))


def check_options(options: Options) -> None:
    """Raises ValueError for options that don't exist, or have values of other types."""
    unknown = sorted(options.keys() - Options.__optional_keys__)
    fields = [f"{name}=..." for name in unknown if name in SamplingParams.__dataclass_fields__]
    if unknown:
        way_out = f"; pass params=SamplingParams({', '.join(fields)})" if fields else ""
        raise ValueError(f"unknown options: {', '.join(unknown)}{way_out}")

    stops, top = options.get("stop_tokens"), options.get("top_logprobs", 0)
    several = isinstance(stops, Collection) and not isinstance(stops, (str, bytes))
    if stops is not None and not (several and all(isinstance(id, Integral) for id in stops)):
        raise ValueError(f"stop_tokens={stops!r} isn't a set of token ids")
    if not isinstance(top, Integral) or isinstance(top, bool):
        raise ValueError(f"top_logprobs={top!r} isn't a whole number")
    should_stop = options.get("should_stop")
    if should_stop is not None and not callable(should_stop):
        raise ValueError(f"should_stop={should_stop!r} isn't a function")


def params_of(options: Options, temperature: float, top_p: float) -> SamplingParams:
    """How the rows of a call are sampled.

    Raises:
        ValueError: it is said twice, and differently; or in another way.
    """
    params = options.get("params")
    if params is None:
        return SamplingParams(temperature=temperature, top_p=top_p)
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params={params!r}: a SamplingParams(...), the same for all prompts")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value not in (getattr(SamplingParams, name), getattr(params, name)):
            raise ValueError(
                f"{name}={value} beside params, in whose place it isn't: write "
                f"params=SamplingParams({name}={value}, ...)"
            )
    return params


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises ValueError for token ids in them that the model doesn't know."""
    for name in ("negative_prompt", "logit_bias", "banned_tokens"):
        ids = getattr(params, name)
        for id in () if ids is None else ids:
            if not isinstance(id, Integral) or not 0 <= int(id) < vocab_size:
                raise ValueError(
                    f"{name} has the token id {id!r}: this model knows 0 to {vocab_size - 1}"
                )


def model_image_id(model: Transformer) -> int:
    """The id of images' tokens; -1 for a model that sees none."""
    return getattr(model, "image_id", -1)


def check_images(
    model: Transformer, prompts: Sequence[Sequence[int]], images: Optional[Sequence[Sequence[Any]]]
) -> Sequence[Sequence[Any]]:
    """The images of each prompt.

    Raises:
        ValueError: a model that sees none, a wrong number of them, or tiles of another size.
    """
    found = [()] * len(prompts) if images is None else images
    image_id, args = model_image_id(model), cast(Any, model.params)
    if any(found) and image_id < 0:
        raise ValueError("this model sees no images: it has no image encoder")
    if len(found) != len(prompts):
        raise ValueError(f"images for {len(found)} of {len(prompts)} prompts: pass a list for each")
    for row, (prompt, of_row) in enumerate(zip(prompts, found, strict=True)):
        for tiles in of_row:
            n, size = tiles.pixels.shape[0], tiles.pixels.shape[-1]
            if size != args.vision_chunk_size or n > args.most_tiles:
                raise ValueError(
                    f"an image of {n} tiles of {size} pixels, and this model takes up to "
                    f"{args.most_tiles} of {args.vision_chunk_size}: tile it for these"
                )
        places = sum(token == image_id for token in prompt)
        if sum(tokens_of(model, of_row)) != places:
            raise ValueError(f"prompt {row} has {len(of_row)} images, and {places} tokens for them")
    return found


def tokens_of(model: Transformer, images: Sequence[Any]) -> List[int]:
    """How many tokens stand for each of some images."""
    args: Any = model.params
    return [args.image_tokens(len(tiles.pixels)) for tiles in images]


def make_rows(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_gen_len: int,
    params: SamplingParams,
    generator: torch.Generator,
    options: Options,
) -> List[Row]:
    """The rows of a call, n for each prompt; seeds come from the generator unless given.

    Raises:
        ValueError: what `check`, `check_options` and `check_params` raise, a wrong number of seeds
            or adapters, an unknown adapter.
    """
    check_options(options)
    n, seed = options.get("n", 1), cast(Any, options.get("seed"))
    check(model, prompts, max_gen_len, n)
    prompts = [[int(id) for id in prompt] for prompt in prompts]  # tensors and arrays have others
    top, most = options.get("top_logprobs", 0), model.params.vocab_size
    check_params(params, most)
    if not 0 <= top <= most:
        raise ValueError(f"top_logprobs={top} must lie between 0 (none) and {most}")
    if seed is None:
        seeds = torch.randint(1 << 62, (len(prompts),), generator=generator).tolist()
    else:
        # NumPy's numbers are integral, too.
        seeds = [seed] * len(prompts) if isinstance(seed, Number | str) else [*seed]
    if not all(isinstance(one, SupportsIndex) for one in seeds):
        raise ValueError(f"seed={seed!r} isn't a whole number, nor a list of them")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: pass one for each")
    names = cast(Any, options.get("adapter"))
    several = isinstance(names, Iterable) and not isinstance(names, str)
    names = list(names) if several else [names] * len(prompts)
    if len(names) != len(prompts):
        raise ValueError(f"{len(names)} adapters for {len(prompts)} prompts: pass one for each")
    adapters = [number(model, name) for name in names]
    images = check_images(model, prompts, options.get("images"))
    stop = stop_strings(options.get("stop"))
    return [
        Row(
            index, sample, prompt, min(model.params.max_seq_len, len(prompt) + max_gen_len), params,
            (int(seeds[index]) + sample * SEED_STEP) % (1 << 63), stop,
            adapters[index], images[index], tokens_of(model, images[index]), model_image_id(model),
        )
        for index, prompt in enumerate(prompts)
        for sample in range(n)
    ]  # fmt: skip


def constrain(
    rows: List[Row],
    compiler: GrammarCompiler,
    formats: ResponseFormat | Sequence[Optional[ResponseFormat]],
    stop_tokens: Set[int],
) -> None:
    """Constrain rows to the response formats of their prompts: one for all, or one or None each.

    Raises:
        ValueError: not a response format, or not as many of them as prompts.
    """
    prompts = 1 + max(row.index for row in rows)
    several = isinstance(formats, Sequence) and not isinstance(formats, str)
    of_each: Sequence[Any] = formats if several else [formats] * prompts  # type: ignore[assignment]
    if any(one is not None and not isinstance(one, Mapping) for one in of_each):
        raise ValueError(f'response_format={formats!r}: a dict, like {{"type": "json_object"}}')
    if len(of_each) != prompts:
        raise ValueError(f"{len(of_each)} response formats for {prompts} prompts: one for each")
    for row in rows:
        format_ = of_each[row.index]
        if format_ is not None:
            row.constraint = compiler.constraint(format_, stop_tokens)
