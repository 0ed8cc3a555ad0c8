"""Llama: a model, its tokenizer and its chat format, and the loop that makes text of them."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Set, Tuple

import torch

from llama import checkpoint, memory, parallel, remote
from llama.cache import KVCache
from llama.chat import ChatFormat, Format, check_dialogs, read_calls, warn_of_base_model
from llama.model import Transformer
from llama.predictions import (
    ChatPrediction,
    CompletionPrediction,
    FinishReason,
    Prediction,
    Step,
)
from llama.sampling import sample, sample_top_p
from llama.templates import chat_format
from llama.tokenizer import Dialog, Message, Tokenizer
from llama.tools import Tool

__all__ = ["ChatPrediction", "CompletionPrediction", "Llama", "Step", "sample_top_p"]


class Llama:
    """Generates text. Make one with `Llama.build`.

    Attributes:
        model: the Transformer.
        tokenizer: the Tokenizer.
        formatter: the Format of its dialogs, or None where the checkpoint has none.
    """

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: Optional[str | Path] = None,
        max_seq_len: int = 2048,
        max_batch_size: int = 8,
        model_parallel_size: Optional[int] = None,
        seed: int = 1,
        *,
        device: Optional[str | torch.device] = None,
        dtype: Optional[str | torch.dtype] = None,
    ) -> "Llama":
        """Open a checkpoint, check that it fits into memory, and load this rank's part of it.

        Works in a plain Python process and under torchrun, whatever number of shards the
        checkpoint has.

        Args:
            ckpt_dir: a directory with Meta's params.json and consolidated.*.pth, with Hugging
                Face's config.json and *.safetensors, or with a .gguf file, or the .gguf file. It
                may be remote (https://, gs://, az://): then it is fetched once, into a cache.
            tokenizer_path: Llama 3's tokenizer.model, a tokenizer.json or a .gguf file, remote or
                not; by default what is found with the checkpoint.
            max_seq_len: tokens of prompt and answer together.
            max_batch_size: prompts in one call.
            model_parallel_size: ranks that share one copy of the model; all of them by default.
            seed: of the random numbers for sampling.
            device: "cuda", "mps" or "cpu"; by default the first of these that there is.
            dtype: of weights, activations and cache; by default bf16 where the hardware has it,
                else fp32.

        Raises:
            FileNotFoundError: no checkpoint or tokenizer there.
            ValueError: a broken or unsupported checkpoint, a tokenizer that isn't its own, a
                number of ranks that doesn't divide the heads, or too little memory.
        """
        for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        start = time.monotonic()
        torch_device = parallel.initialize(model_parallel_size, device)
        torch_dtype = parallel.pick_dtype(dtype, torch_device)
        source = checkpoint.open(remote.local_path(ckpt_dir))
        args = replace(source.args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        parallel.check_world(parallel.world_size(), args.n_heads)
        _say(memory.preflight(args, parallel.world_size(), torch_dtype, torch_device))
        if max_seq_len > source.args.max_seq_len:
            _say(f"note: {ckpt_dir} was trained for {source.args.max_seq_len} tokens at most")

        tokenizer_path = tokenizer_path or source.tokenizer_path
        if tokenizer_path is None:
            raise FileNotFoundError(
                f"no tokenizer.model in {ckpt_dir}: copy it there or pass tokenizer_path"
            )
        tokenizer = Tokenizer(remote.local_path(tokenizer_path))
        if tokenizer.n_words > args.vocab_size:
            raise ValueError(
                f"{tokenizer_path} has {tokenizer.n_words} tokens and the model in {ckpt_dir} "
                f"knows {args.vocab_size}: they don't belong together"
            )
        model = Transformer(args, device="meta")
        checkpoint.load(source, model, dtype=torch_dtype, device=torch_device)
        _say(f"loaded {ckpt_dir} in {time.monotonic() - start:.1f} s")
        return Llama(model, tokenizer, seed=seed)

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        formatter: Optional[Format] = None,
        *,
        seed: int = 1,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = formatter or chat_format(tokenizer, model.params.use_scaled_rope)
        self.device = model.norm.weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        stop_tokens: Optional[Set[int]] = None,
    ) -> Tuple[List[List[int]], Optional[List[List[float]]]]:
        """Continue prompts of token ids, of any mixture of lengths.

        Args:
            max_gen_len: new tokens at most; 0 with echo and logprobs scores the prompts.
            temperature: 0 takes the most probable token each time.
            top_p: share of probability to sample from, from the most probable token down.
            logprobs: also return each token's log-probability (natural, of the model's own
                distribution, before temperature and top_p).
            echo: put the prompt before the answer; its first token's log-probability is 0.0.
            stop_tokens: ids that end a row, themselves left out; the tokenizer's by default.

        Returns:
            A list of ids per prompt, and a list of log-probabilities per prompt or None.

        Raises:
            ValueError: no prompts, too many, an empty or too long one, ids outside of the
                vocabulary, or parameters out of range; non-finite logits.
        """
        tokens, scores, _ = self._collect(
            prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, stop_tokens
        )
        return tokens, scores if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> List[CompletionPrediction]:
        """Continue texts. See `generate` for the arguments and errors.

        Args:
            max_gen_len: None fills the context.

        Returns:
            Per prompt `generation` (str) and `finish_reason`; with logprobs also `tokens` (each
            one's text) and `logprobs`.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text: pass a list of texts")
        bos = self.tokenizer.add_bos
        ids = [self.tokenizer.encode(prompt, bos=bos, eos=False) for prompt in prompts]
        return [
            {"generation": self.tokenizer.decode(tokens), **details}
            for tokens, details in self._predict(
                ids, temperature, top_p, max_gen_len, logprobs, echo
            )
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: Optional[int] = None,
        logprobs: bool = False,
        *,
        tools: Optional[Sequence[Tool]] = None,
    ) -> List[ChatPrediction]:
        """Answer dialogs, each a list of {"role": ..., "content": ...}; see `Message` for calls.

        Nothing that a message holds, in role or content, becomes a control token.

        Args:
            max_gen_len: None fills the context.
            tools: what the model may call: JSON schemas, Python functions (which aren't run), and
                names of built-in tools. Its calls are in the message, as `tool_calls`.

        Returns:
            Per dialog `generation` (the assistant's message) and `finish_reason`; with logprobs
            also `tokens` and `logprobs`; with tools, and a call that is malformed and was left in
            the text, also `tool_call_error`.

        Raises:
            ValueError: an empty dialog, one that begins with the assistant, an unknown role, a
                model without a chat format, or tools and a format without them; and what
                `generate` raises.
        """
        if self.formatter is None:
            raise ValueError("this checkpoint has no chat format: use text_completion")
        check_dialogs(dialogs)
        encode = self.formatter.encode_dialog_prompt
        ids = [encode(dialog, tools) if tools else encode(dialog) for dialog in dialogs]
        self._check_trained()
        predictions: List[ChatPrediction] = []
        for tokens, details in self._predict(
            ids, temperature, top_p, max_gen_len, logprobs, echo=False
        ):
            message: Message = {"role": "assistant", "content": self.tokenizer.decode(tokens)}
            error = read_calls(message, tools) if tools else None
            predictions.append({"generation": message, **details})
            if error:
                predictions[-1]["tool_call_error"] = error
        return predictions

    def _check_trained(self) -> None:
        """Warn of a base model, on all ranks alike: each has a part of the embeddings."""
        if isinstance(self.formatter, ChatFormat):
            turns = self.formatter.turn_ids()
            ids = torch.tensor([[*turns, *range(256)]], device=self.device)
            with torch.inference_mode():
                rows = self.model.tok_embeddings(ids)[0]
            if parallel.is_rank_zero():
                warn_of_base_model(rows[: len(turns)], rows[len(turns) :])

    def _predict(
        self,
        ids: List[List[int]],
        temperature: float,
        top_p: float,
        max_gen_len: Optional[int],
        logprobs: bool,
        echo: bool,
    ) -> List[Tuple[List[int], Prediction]]:
        """What both completions have in common: tokens and the rest of a prediction."""
        if max_gen_len is None:
            max_gen_len = self.model.params.max_seq_len
        tokens, scores, reasons = self._collect(
            ids, max_gen_len, temperature, top_p, logprobs, echo, None
        )
        predictions = []
        for row, reason in enumerate(reasons):
            details: Prediction = {"finish_reason": reason}
            if logprobs:
                details["tokens"] = [self.tokenizer.decode([token]) for token in tokens[row]]
                details["logprobs"] = scores[row]
            predictions.append((tokens[row], details))
        return predictions

    def _collect(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool,
        stop_tokens: Optional[Set[int]],
    ) -> Tuple[List[List[int]], List[List[float]], List[FinishReason]]:
        """Run the loop to its end: tokens, log-probabilities and finish reason per row."""
        tokens: List[List[int]] = [[] for _ in prompts]
        scores: List[List[float]] = [[] for _ in prompts]
        reasons: List[FinishReason] = ["length"] * len(prompts)
        for step in self._steps(
            prompts, max_gen_len, temperature, top_p, logprobs, echo, stop_tokens
        ):
            if step.finish_reason is not None:
                reasons[step.row] = step.finish_reason
            if step.token is not None and step.finish_reason != "stop":
                tokens[step.row].append(step.token)
                if step.logprob is not None:
                    scores[step.row].append(step.logprob)
        return tokens, scores, reasons

    @torch.inference_mode()
    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool,
        stop_tokens: Optional[Set[int]],
    ) -> Iterator[Step]:
        """The generation loop: one event per token, in the order in which tokens come about.

        Prompts go through the model whole, those of similar lengths together. Then each step
        feeds every unfinished row's last token at that row's own position; finished rows leave the
        batch and the cache. All ranks run this in step; rank 0 alone draws the tokens.
        """
        self._check(prompts, max_gen_len, temperature, top_p)
        stops = self.tokenizer.stop_tokens if stop_tokens is None else stop_tokens
        lengths = [len(prompt) for prompt in prompts]
        limits = [min(self.model.params.max_seq_len, n + max_gen_len) for n in lengths]

        # In the batch and the cache, rows stand in the order of their lengths.
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        cache = self.model.new_cache(len(prompts), max(limits))
        h, scores = self._prefill([prompts[row] for row in order], cache, echo and logprobs)

        if echo:
            for row, prompt in enumerate(prompts):
                known = scores[order.index(row)] if logprobs else [None] * len(prompt)
                for token, logprob in zip(prompt, known, strict=True):
                    yield Step(row, token, logprob, None)
        for row, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
            if length == limit:
                yield Step(row, None, None, "length")
        unfinished = [i for i, row in enumerate(order) if lengths[row] < limits[row]]
        cache.keep(unfinished)
        rows, h = [order[i] for i in unfinished], h[unfinished]
        while rows:
            logits = self.model.logits(h)
            drawn = self._draw(logits, temperature, top_p, rows)
            tokens: List[int] = drawn.tolist()
            chosen: List[Optional[float]] = [None] * len(rows)
            if logprobs:
                chosen = logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0].tolist()
            unfinished = []  # places in the batch
            for i, row in enumerate(rows):
                lengths[row] += 1
                if tokens[i] in stops:
                    yield Step(row, tokens[i], chosen[i], "stop")
                elif lengths[row] == limits[row]:
                    yield Step(row, tokens[i], chosen[i], "length")
                else:
                    unfinished.append(i)
                    yield Step(row, tokens[i], chosen[i], None)
            if len(unfinished) < len(rows):
                cache.keep(unfinished)
                rows, drawn = [rows[i] for i in unfinished], drawn[unfinished]
            if rows:
                h = self.model.hidden(drawn[:, None], cache.lengths, cache)[:, -1]

    def _prefill(
        self, prompts: List[Sequence[int]], cache: KVCache, score: bool
    ) -> Tuple[torch.Tensor, List[List[float]]]:
        """Fill the cache with prompts of ascending lengths, padded on the right.

        Returns:
            The hidden state of each one's last token, (B, dim), and their scores if asked for.
        """
        lengths = [len(prompt) for prompt in prompts]
        last, scores = [], []
        for start, stop in _similar(lengths):
            tokens = torch.zeros(stop - start, lengths[stop - 1], dtype=torch.long)
            for i, prompt in enumerate(prompts[start:stop]):
                tokens[i, : len(prompt)] = torch.tensor(prompt)
            tokens = tokens.to(self.device)
            h = self.model.hidden(tokens, 0, cache.part(start, stop))
            ends = torch.tensor(lengths[start:stop], device=self.device) - 1
            last.append(h[torch.arange(stop - start, device=self.device), ends])
            if score:
                scores += [
                    row[:length]
                    for row, length in zip(self._score(h, tokens), lengths[start:stop], strict=True)
                ]
        cache.lengths = lengths
        return torch.cat(last), scores

    def _draw(
        self, logits: torch.Tensor, temperature: float, top_p: float, rows: List[int]
    ) -> torch.Tensor:
        """The next token of each row: (B, vocab_size) -> (B,), drawn by rank 0 for all."""
        finite = logits.sum(-1).isfinite()
        if not finite.all():  # the same on every rank, so that none waits for another
            bad = [rows[i] for i in (~finite).nonzero()[:, 0].tolist()]
            raise ValueError(
                f"the model's logits for prompt {bad[0]} aren't finite (prompts {bad}): "
                "broken weights, or a dtype too narrow for them; try dtype=torch.float32"
            )
        if parallel.rank() == 0:
            drawn = sample(logits, temperature, top_p, self.generator)
        else:
            drawn = torch.empty(len(rows), dtype=torch.long, device=self.device)
        return parallel.broadcast(drawn)

    def _score(self, h: torch.Tensor, tokens: torch.Tensor) -> List[List[float]]:
        """Log-probability of each token given those before it; 0.0 for the first.

        The vocabulary is wide, so a few positions are projected at a time.
        """
        scores = torch.zeros(tokens.shape, dtype=torch.float32, device=h.device)
        for begin in range(0, tokens.shape[1] - 1, 64):
            end = min(begin + 64, tokens.shape[1] - 1)
            predicted = self.model.logits(h[:, begin:end]).log_softmax(-1)
            actual = tokens[:, begin + 1 : end + 1, None]
            scores[:, begin + 1 : end + 1] = predicted.gather(-1, actual)[..., 0]
        return scores.tolist()

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float,
        top_p: float,
    ) -> None:
        params = self.model.params
        if not prompts:
            raise ValueError("no prompts: pass at least one")
        if len(prompts) > params.max_batch_size:
            raise ValueError(
                f"{len(prompts)} prompts, and max_batch_size is {params.max_batch_size}: "
                "pass fewer at a time, or build with a larger max_batch_size"
            )
        if not temperature >= 0:  # nor NaN
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
        if not 0 <= top_p <= 1:
            raise ValueError(f"top_p={top_p} must lie between 0 and 1")
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


def _similar(lengths: List[int]) -> Iterator[Tuple[int, int]]:
    """Cut ascending lengths into runs (start, stop) whose padding is at most a quarter of them.

    Up to 256 tokens a pass costs about the same with padding as without.
    """
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop < len(lengths):
            padded, real = (stop + 1 - start) * lengths[stop], sum(lengths[start : stop + 1])
            if padded <= max(256, 1.25 * real):
                continue
        yield start, stop
        start = stop


def _say(text: str) -> None:
    """A line about progress, on stderr, from one rank."""
    if parallel.is_rank_zero():
        print(text, file=sys.stderr, flush=True)
