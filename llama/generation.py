"""Llama: a model with its tokenizer and chat format. Meta's API, and additions to it."""

from pathlib import Path
from typing import Any, Callable, Iterator, Literal, Mapping, Optional, Sequence, Unpack

import torch

from llama.backends import adapters, memory
from llama.backends.build import assemble
from llama.backends.options import ModelOptions, takes
from llama.checkpoint import remote
from llama.checkpoint.adapter import read_adapter
from llama.engine import embeddings, scoring
from llama.engine.async_engine import AsyncEngine
from llama.engine.beam import BeamEvent, BeamPrediction, beam_predictions, stream_beams
from llama.engine.calls import Calls, check_trained
from llama.engine.engine import Engine
from llama.engine.events import prediction
from llama.engine.predictions import ChatPrediction, CompletionPrediction, Event, with_calls
from llama.engine.prefixes import Prefixes
from llama.engine.requests import Request
from llama.engine.rows import ChatOptions, Options, check
from llama.engine.sampling import sample_top_p
from llama.engine.scoring import Perplexity, TextScore
from llama.engine.seeing import check_sees, tiles_of_dialogs
from llama.engine.tool_formats import call_format
from llama.layers import low_rank
from llama.model import Transformer
from llama.text.chat import PLAIN, Format, PromptOptions, check_dialogs, encode_parts, read_calls
from llama.text.context import encode_dialogs, without
from llama.text.messages import Answer, image_sources, texts_alone
from llama.text.templates import chat_format
from llama.text.tools import Tool
from llama.tokenizer import Dialog, Message, Tokenizer
from llama.vision.images import Tiles

Prompt = str | Sequence[Any]  # a text, or parts as those of a message

__all__ = ["ChatPrediction", "CompletionPrediction", "Event", "Llama", "sample_top_p"]


class Llama:
    """Generates text. Make one with `Llama.build`.

    Attributes:
        model: the Transformer.
        tokenizer: the Tokenizer.
        formatter: the chat format of the checkpoint, or None if it has none.
        prefixes: what the cache knows of earlier texts, with prefix_cache_mb, or None.
    """

    @staticmethod
    @takes(ModelOptions)
    def build(options: ModelOptions) -> "Llama":
        """Open a checkpoint, check that it fits into memory, and load this rank's part of it.

        Works in a plain Python process and under torchrun, regardless of how the checkpoint is
        sharded. Takes the fields of `ModelOptions`, which says what each means:
        `Llama.build(ckpt_dir, max_seq_len=4096, device="cpu")`. The checkpoint may be remote:
        `Llama.build("hf://owner/repo")`.

        Raises:
            FileNotFoundError: no checkpoint or tokenizer there.
            ValueError: a broken or unsupported checkpoint, another model's tokenizer, a number of
                ranks that doesn't divide the number of heads, too little memory, or an option out
                of range.
        """
        built = assemble(options)
        llama = Llama(built.model, built.tokenizer, draft=built.draft, seed=options.seed)
        if options.prefix_cache_mb:
            # Saved prefixes can't be shared between precisions: their keys and values differ.
            kinds = [str(built.model.norm.weight.dtype)[6:], built.quantize]
            kind = " ".join(filter(None, [*kinds, options.kv_cache and "int8 cache"]))
            fingerprint = built.fingerprint
            llama._keep_prefixes(
                options.prefix_cache_mb * 1_000_000, lambda: f"{fingerprint()} {kind}"
            )
        return llama

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        formatter: Optional[Format] = None,
        *,
        draft: Optional[Transformer] = None,
        seed: int = 1,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.formatter = formatter or chat_format(tokenizer, model.params.use_scaled_rope)
        self._draft = draft
        self.prefixes: Optional[Prefixes] = None
        self.device = model.norm.weight.device
        self.generator = torch.Generator().manual_seed(seed)  # of the seeds of rows
        self._calls = Calls(model, tokenizer, self.generator, draft)

    def _keep_prefixes(self, nbytes: int, fingerprint: Callable[[], str]) -> None:
        """Keep what calls compute for those that follow, in so much more memory."""
        self._calls = Calls(self.model, self.tokenizer, self.generator, self._draft, nbytes)
        self.prefixes = Prefixes(self._calls.plain, self.model, fingerprint)

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> tuple[list[list[int]], Optional[list[list[float]]]]:
        """Continue prompts of token ids, which may differ in length.

        Args:
            max_gen_len: new tokens at most; 0 with echo and logprobs scores the prompts.
            temperature: logits are divided by it; 0 is greedy decoding.
            top_p: sample from the most probable tokens that together have this probability.
            logprobs: also return each token's log-probability (natural, of the model's own
                distribution, before temperature and top_p).
            echo: return the prompt too, before the answer; its first log-probability is 0.0.
            options: see `Options`.

        Returns:
            A list of ids per prompt and sample, and one of log-probabilities, or None.

        Raises:
            ValueError: no prompts, too many, an empty or too long one, ids outside of the
                vocabulary, or parameters out of range; non-finite logits.
        """
        request = self._calls.make(
            prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, **options
        )
        found = self._calls.collect(request)
        return [row.tokens for row in found], [r.logprobs for r in found] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[Prompt],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> list[CompletionPrediction]:
        """Continue texts. See `generate` for the arguments and errors, and `Options`.

        Args:
            prompts: each a text, or texts and images in a list, as a message's content.
            max_gen_len: None fills the context.

        Returns:
            Per prompt and sample `generation` (str) and `finish_reason`; with logprobs also
            `tokens` (each one's text) and `logprobs`; with top_logprobs also `top_logprobs`.
        """
        ids = self._encode(prompts)
        self._see([[{"content": prompt}] for prompt in prompts], options)
        request = self._calls.make(ids, max_gen_len, temperature, top_p, logprobs, echo, **options)
        return [
            {"generation": row.text, **prediction(row, self.tokenizer, request)}
            for row in self._calls.collect(request)
        ]

    def stream_text(
        self,
        prompts: Sequence[Prompt],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: bool = False,
        **options: Unpack[Options],
    ) -> Iterator[Event]:
        """Like `text_completion`, but yields an event per token.

        To stop early, close the iterator (on all ranks) or let should_stop return True.
        """
        ids = self._encode(prompts)
        self._see([[{"content": prompt}] for prompt in prompts], options)
        return self._calls.run(
            self._calls.make(ids, max_gen_len, temperature, top_p, logprobs, **options)
        )

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: bool = False,
        **options: Unpack[ChatOptions],
    ) -> list[ChatPrediction]:
        """Answer dialogs, each a list of {"role": ..., "content": ...}; see `Message` for images
        and calls.

        Roles and contents are encoded as ordinary text: they can't contain control tokens. See
        `text_completion` and `ChatOptions` for the arguments.

        Returns:
            Per dialog and sample `generation` (the assistant's message) and `finish_reason`; with
            logprobs also `tokens` and `logprobs`; with tools, if a call is malformed and so left
            in the text, `tool_call_error`; with truncate, the messages dropped, `truncated`.

        Raises:
            ValueError: an empty dialog, one that begins with the assistant, an unknown role, a
                model without a chat format, built-in tools with a format that has none, or what
                `llama.engine.seeing.tiles_of` raises for images; and what `generate` raises.
            FileNotFoundError: no such image.
        """
        tools = options.get("tools")
        request, left_out = self._make_chat(
            dialogs, temperature, top_p, max_gen_len, logprobs, **options
        )
        predictions: list[ChatPrediction] = []
        for row, found in zip(request.rows, self._calls.collect(request), strict=True):
            message: Answer = {"role": "assistant", "content": found.text}
            error = read_calls(message, tools) if tools else None
            details = prediction(found, self.tokenizer, request)
            predictions.append({"generation": message, **details})
            if error:
                predictions[-1]["tool_call_error"] = error
            if left_out[row.index]:
                predictions[-1]["truncated"] = left_out[row.index]
        return predictions

    def stream_chat(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Iterator[Event]:
        """Like `chat_completion`, but yields an event per token; with tools, the text of events is
        what the model wrote, and their deltas say which calls it makes.

        To stop early, close the iterator (on all ranks) or let should_stop return True.
        """
        tools = options.get("tools")
        request, _ = self._make_chat(dialogs, temperature, top_p, max_gen_len, logprobs, **options)
        events = self._calls.run(request)
        return with_calls(events, tools) if tools else events

    def engine(
        self,
        max_tokens_per_step: int = 512,
        max_rows: int = 64,
        cache_tokens: Optional[int] = None,
    ) -> Engine:
        """An engine, to which requests can be added at any time; see `llama.engine.engine`.

        Args:
            max_tokens_per_step: tokens of a forward pass at most; longer prompts take several.
            max_rows: sequences that run at once; others wait.
            cache_tokens: positions of its cache; by default max_rows times a quarter of the
                context, or as many as half of the available memory holds.
        """
        if cache_tokens is None:
            context = self.model.params.max_seq_len
            each = self.model.new_cache(1, 1).nbytes
            room = memory.available_to_each(self.device) // 2 // each
            cache_tokens = max(context, min(room, max_rows * context // 4))
        return Engine(
            self.model, self.tokenizer, max_tokens_per_step=max_tokens_per_step,
            max_rows=max_rows, cache_tokens=cache_tokens, generator=self.generator,
            draft=self._draft,
        )  # fmt: skip

    def async_engine(self, **limits: Any) -> AsyncEngine:
        """An engine for asyncio, with the limits of `engine`: `async with llama.async_engine() as
        engine`; see `llama.engine.async_engine`."""
        return AsyncEngine(self.engine(**limits))

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter (PEFT's layout) beside the weights; option `adapter` chooses it.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: a name that is taken; an adapter of another model, or of another kind than
                plain LoRA; layers that take none (compiled for GPUs, or offloaded).
        """
        adapters.add(self.model, name, read_adapter(remote.local_path(path), self.model.params))

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that were added."""
        return list(low_rank.names(self.model))

    def beam_search(
        self,
        prompts: Sequence[str],
        num_beams: int,
        max_gen_len: int,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> list[list[BeamPrediction]]:
        """Per text up to num_beams continuations, the best first; see `llama.engine.beam`."""
        return beam_predictions(
            self._calls.plain, self._encode(texts_alone(prompts)), max_gen_len, num_beams,
            length_penalty=length_penalty, early_stopping=early_stopping,
        )  # fmt: skip

    def stream_beams(
        self, prompts: Sequence[str], num_beams: int, max_gen_len: int, **how: Any
    ) -> Iterator[BeamEvent]:
        """Like `beam_search`, but yields text as soon as all beams of a prompt agree on it."""
        ids = self._encode(texts_alone(prompts))
        return stream_beams(self._calls.plain, ids, max_gen_len, num_beams, **how)

    def score(self, texts: Sequence[str], batch_size: int = 8) -> list[TextScore]:
        """The log-probability of each token of some texts; see `llama.engine.scoring.score`."""
        return scoring.score(self._calls.plain, texts, batch_size)

    def perplexity(self, text: str, stride: Optional[int] = None) -> Perplexity:
        """Perplexity of a text of any length, in windows of max_seq_len tokens that begin every
        `stride` tokens; see `llama.engine.scoring.perplexity`."""
        return scoring.perplexity(self._calls.plain, text, stride)

    def embed(
        self, texts: Sequence[str], pooling: Literal["last", "mean"] = "mean", **options: Any
    ) -> torch.Tensor:
        """A vector for each text, (len(texts), dim); see `llama.engine.embeddings.embed`."""
        return embeddings.embed(self._calls.plain, texts, pooling, **options)

    def save_prefix(self, path: str | Path, prefix: str | Dialog) -> None:
        """Save the keys and values of a text or dialog to a file, for `load_prefix`.

        Raises:
            ValueError: a Llama built without prefix_cache_mb; an image; a text beyond the context.
            FileExistsError: the file exists and isn't a saved prefix.
        """
        if isinstance(prefix, str):
            [ids] = self._encode([prefix])
        else:
            [ids], _ = self._encode_dialogs([prefix], None, None, None)
            if image_sources(prefix):
                raise ValueError("saved prefixes are of text: save what comes before the image")
        check(self.model, [ids], 0, 1)
        self._prefixes.save(path, ids)

    def load_prefix(self, path: str | Path) -> int:
        """Add a saved prefix, on any number of ranks, to the prefix cache; returns its length.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a saved prefix, or one of another model, or a Llama built without
                prefix_cache_mb.
        """
        return self._prefixes.load(path)

    @property
    def _prefixes(self) -> Prefixes:
        if self.prefixes is None:
            raise ValueError("prefixes take memory: build with prefix_cache_mb, 1000 for example")
        return self.prefixes

    def tiles_of(self, dialogs: Sequence[Sequence[Any]]) -> Optional[list[list[Tiles]]]:
        """The images of dialogs, for `generate`; see `llama.engine.seeing.tiles_of_dialogs`."""
        return tiles_of_dialogs(self.model, dialogs)

    def _see(self, dialogs: Sequence[Sequence[Any]], options: Any) -> None:
        """Put the images of dialogs, if there are any, into the options of the call."""
        options["images"] = self.tiles_of(dialogs) or options.get("images")

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
            what = "one text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
            raise ValueError(f"prompts is {what}: pass a list of texts")
        check_sees(self.model, [[{"content": prompt}] for prompt in prompts])
        start = self.tokenizer.encode("", bos=self.tokenizer.add_bos, eos=False)
        return [start + encode_parts(self.tokenizer, {"content": prompt}) for prompt in prompts]

    def _encode_dialogs(
        self,
        dialogs: Sequence[Dialog],
        tools: Optional[Sequence[Tool]],
        truncate: Optional[str],
        max_gen_len: Optional[int],
        options: PromptOptions = PLAIN,
    ) -> tuple[list[list[int]], list[list[Message]]]:
        """The ids of each dialog, and the messages dropped from it."""
        if self.formatter is None:
            raise ValueError("this checkpoint has no chat format: use text_completion")
        check_dialogs(dialogs)
        check_sees(self.model, dialogs)
        found = encode_dialogs(
            self.formatter, dialogs, tools, truncate, max_gen_len, self.model.params.max_seq_len,
            options,
        )  # fmt: skip
        check_trained(self.model, self.formatter)
        return found

    def _make_chat(
        self,
        dialogs: Sequence[Dialog],
        temperature: float,
        top_p: float,
        max_gen_len: Optional[int],
        logprobs: bool,
        *,
        tools: Optional[Sequence[Tool]] = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = False,
        truncate: Optional[Literal["oldest_turns"]] = None,
        continue_final_message: bool = False,
        template_kwargs: Optional[Mapping[str, Any]] = None,
        **options: Unpack[Options],
    ) -> tuple[Request, list[list[Message]]]:
        """The request for dialogs, and the messages that truncation dropped from each."""
        options["response_format"] = call_format(tools, tool_choice, options, parallel_tool_calls)
        prompt = PromptOptions(None, continue_final_message, template_kwargs or {})
        ids, left_out = self._encode_dialogs(dialogs, tools, truncate, max_gen_len, prompt)
        self._see([*map(without, dialogs, left_out)], options)
        how = temperature, top_p, logprobs
        return self._calls.make(ids, max_gen_len, *how, **options), left_out
