"""The engines behind a Llama's calls, each of which is a request."""

from functools import cached_property
from typing import Any, Iterator, List, Optional, Sequence

import torch

from llama.engine.engine import Engine
from llama.engine.events import Collected, collect
from llama.engine.predictions import Event
from llama.engine.requests import Request
from llama.engine.rows import check_batch
from llama.layers import parallel
from llama.layers.cache import PASS
from llama.layers.paged import PAGE, blocks_for
from llama.model import Transformer
from llama.text.chat import ChatFormat, Format, warn_of_base_model
from llama.tokenizer import Tokenizer


class Calls:
    """Makes and runs the requests of calls. Their caches are made when they are first used.

    Args:
        generator: of the seeds of rows.
        draft: a smaller model, for speculative decoding.
        prefixes: bytes for what is kept from one call to the next; by default nothing is.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        generator: torch.Generator,
        draft: Optional[Transformer] = None,
        prefixes: int = 0,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._generator, self._draft, self._prefixes = generator, draft, prefixes

    @cached_property
    def plain(self) -> Engine:
        """The engine of all calls but those with guidance, with room for max_batch_size rows."""
        more = self._prefixes // self._model.new_cache(1, PAGE).nbytes
        engine = self._engine(self._model.params.max_batch_size, more)
        if not self._prefixes:
            engine.scheduler.blocks.keep_only_known()
        return engine

    @cached_property
    def guided(self) -> Engine:
        """The engine of calls with guidance, whose rows have a second sequence each.

        A CPU's cache takes memory as it is used. Elsewhere another might not fit beside the plain
        one, which takes these calls, too, a few rows at a time.
        """
        if self._model.norm.weight.device.type != "cpu" and self._model.params.max_batch_size > 1:
            return self.plain
        engine = self._engine(2 * self._model.params.max_batch_size + 1, 0)
        engine.scheduler.blocks.keep_only_known()
        return engine

    def make(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: Optional[int],
        *how: Any,
        **options: Any,
    ) -> Request:
        """`Engine.make_all`, for a call; max_gen_len None fills the context."""
        args = self._model.params
        check_batch(args, prompts, options.get("n", 1))
        scale = getattr(options.get("params"), "guidance_scale", 1)
        engine = self.guided if scale != 1 else self.plain
        length = args.max_seq_len if max_gen_len is None else max_gen_len
        return engine.make_all(prompts, length, *how, **options)

    def run(self, request: Request) -> Iterator[Event]:
        """The events of a call, which begins with the first of them."""
        guided = request.parts[0].negative is not None
        return (self.guided if guided else self.plain).run(request)

    def collect(self, request: Request) -> List[Collected]:
        """The events of each row."""
        return collect(self.run(request), request)

    def _engine(self, rows: int, more: int) -> Engine:
        args = self._model.params
        blocks = rows * blocks_for(args.max_seq_len) + more
        return Engine(
            self._model, self._tokenizer, max_tokens_per_step=PASS, max_rows=args.max_batch_size,
            cache_tokens=blocks * PAGE, generator=self._generator, draft=self._draft,
        )  # fmt: skip


def check_trained(model: Transformer, formatter: Format) -> None:
    """Warn of a base model; on all ranks, since each holds some of the embeddings."""
    if not isinstance(formatter, ChatFormat):
        return
    turns = formatter.turn_ids()
    ids = torch.tensor([[*turns, *range(256)]], device=model.norm.weight.device)
    with torch.inference_mode():
        rows = model.tok_embeddings(ids)[0]
    if parallel.is_rank_zero():
        warn_of_base_model(rows[: len(turns)], rows[len(turns) :])
