"""A loaded model behind the server: admits requests, and counts what they get."""

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any, AsyncIterator, Dict, List, Mapping, Optional, Sequence, Tuple, Type

from starlette.requests import Request

from llama._version import __version__
from llama.engine.async_engine import Answer, AsyncEngine
from llama.engine.params import SamplingParams
from llama.engine.predictions import Event
from llama.engine.seeing import laid_out, takes_several
from llama.generation import Llama
from llama.layers.paged import PAGE
from llama.server.bodies import B, Generation, StreamOptions, read
from llama.server.errors import ApiError, busy, invalid
from llama.server.images import Held, Images
from llama.server.metrics import Metrics
from llama.server.sampling import constraint_name, options_of
from llama.server.settings import Settings

FINGERPRINT = f"llama-reference-{__version__}"


def load(options: Mapping[str, Any], settings: Settings) -> Llama:
    """The model, with the adapters of the settings; see `Llama.build` for options and errors."""
    name = settings.served_name or model_name(str(options["ckpt_dir"]))
    if name in settings.adapters:
        raise ValueError(
            f"adapter={name}={settings.adapters[name]}: that is the model's own name for clients; "
            "rename one of them (--served_name)"
        )
    llama = Llama.build(**options)
    for name, path in settings.adapters.items():
        llama.add_adapter(name, path)
    return llama


def limits(llama: Llama, settings: Settings) -> Dict[str, Any]:
    """Those of the engine: in a cache for max_batch_size whole contexts, four times as many rows,
    since most requests are shorter."""
    return {
        "max_rows": 4 * llama.model.params.max_batch_size,
        "max_tokens_per_step": settings.max_tokens_per_step,
        "cache_tokens": settings.cache_tokens,
    }


def model_name(path: str) -> str:
    """The last part of a checkpoint's path, without .gguf."""
    return Path(path.rstrip("/")).name.removesuffix(".gguf")


class Service:
    """What the endpoints share.

    Attributes:
        name: the model's, for clients.
        images: of its requests; paths are read if they are local.
        rows: sequences that wait or run.
    """

    def __init__(
        self,
        llama: Llama,
        engine: AsyncEngine,
        settings: Settings,
        name: str,
        replica: Optional[str] = None,
        local: bool = False,
    ):
        self.llama, self.engine, self.settings, self.name = llama, engine, settings, name
        labels = {"model_name": name} | ({"replica": replica} if replica else {})
        self.metrics = Metrics(labels, lambda: engine.stats)
        self.images = Images(llama.model, settings, local)
        self.created, self.rows = int(time.time()), 0
        self.defaults = SamplingParams()

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer: what the model, and the cache, can hold."""
        return min(self.llama.model.params.max_seq_len, self.engine.stats.blocks * PAGE)

    @property
    def models(self) -> List[str]:
        return [self.name, *self.settings.adapters]

    def adapter(self, model: Optional[str]) -> Optional[str]:
        """The adapter that a model's name stands for; None: the model itself.

        Raises:
            ApiError: 404, there is no such model.
        """
        if model is None or model == self.name:
            return None
        if model in self.settings.adapters:
            return model
        raise ApiError(
            404, f"there is no model {model[:100]!r}; this server has {', '.join(self.models)}",
            param="model", code="model_not_found",
        )  # fmt: skip

    def head(self, prefix: str, kind: str, model: Optional[str]) -> Dict[str, Any]:
        """What an answer begins with, and each of its chunks.

        Args:
            model: as the request names it.
        """
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": model or self.name, "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    def check_length(self, ids: Sequence[int], param: str, answer: int = 1) -> None:
        """Raises ApiError: a prompt that leaves less than `answer` tokens of the context."""
        if len(ids) + answer > self.context:
            rest = f", of which the answer takes at least {answer}" if answer else ""
            raise invalid(
                f"the prompt has {len(ids)} tokens, and the context {self.context}{rest}: shorten "
                "it", param, "context_length_exceeded",
            )  # fmt: skip

    def admit(self, rows: int) -> None:
        """Raises ApiError: more than may wait or run, now or ever."""
        limit = self.settings.max_queue
        if rows > limit:
            raise invalid(f"{rows} answers at once, and the server takes {limit}: ask for fewer")
        if self.rows + rows > limit:
            raise busy(f"{self.rows} answers wait or run, and the server takes {limit}: come again")

    async def computed(self, ids: List[int], sources: Sequence[Any]) -> Sequence[int]:
        """A prompt as it is computed, from its ids and the sources of its images.

        Raises:
            ApiError: 400 for an image that can't be loaded, 429 for too many at once.
        """
        if not sources or not takes_several(self.llama.model):
            return ids
        held = await self.images.load(sources)
        try:
            [found] = laid_out(self.llama.model, self.llama.tokenizer, [ids], [held.tiles])
        finally:
            held.release()
        return found

    async def submit(
        self,
        request: Request,
        prompts: Sequence[Sequence[int]],
        body: Generation,
        max_tokens: Optional[int],
        sources: Sequence[Any] = (),
        **more: Any,
    ) -> "Running":
        """Queue prompts.

        Args:
            sources: of the images of a single prompt.
            more: options of the engine beside those in the body.

        Raises:
            ApiError: too many requests; a parameter out of range.
            ValueError: what the engine raises.
        """
        options = {**options_of(body, self.llama.tokenizer), **more}
        adapter = self.adapter(body.model)
        if adapter is not None:
            options["adapter"] = adapter
        if getattr(request.state, "seed", None) is not None:  # for what gives none of its own
            options.setdefault("seed", request.state.seed)
        if max_tokens is not None and max_tokens < 0:
            raise invalid(f"max_tokens={max_tokens} must be 0 or more", "max_tokens")
        rows = len(prompts) * options["n"]
        self.admit(rows)
        for ids in prompts:
            self.check_length(ids, "messages" if hasattr(body, "messages") else "prompt")
        running = Running(self, rows, request.state.notes)
        try:
            if sources:
                running.images = await self.images.load(sources)
                options["images"] = [running.images.tiles]
                model, tokenizer = self.llama.model, self.llama.tokenizer
                prompts = laid_out(model, tokenizer, prompts, options["images"])
                self.check_length(prompts[0], "messages")
            for ids in prompts:
                limit = self.context - len(ids)
                limit = limit if max_tokens is None else min(limit, max_tokens)
                running.answers.append(await self.engine.submit(ids, limit, **options))
                running.prompt_tokens += len(ids)
        except BaseException as error:
            running.end()
            text = str(error)
            if isinstance(error, ValueError) and text.startswith("response_format"):
                name = constraint_name(body)
                raise invalid(text.replace("response_format", name, 1), name) from None
            raise
        running.each = options["n"]
        return running


class Running:
    """Prompts that are being answered.

    Attributes:
        answers: one for each prompt.
        each: samples of each.
        prompt_tokens, completion_tokens, cached_tokens: so far.
    """

    def __init__(self, service: Service, rows: int, notes: Dict[str, Any]):
        self._service, self._rows, self._notes = service, rows, notes
        self._began, self._ended = time.perf_counter(), False
        self.answers: List[Answer] = []
        self.each = 1
        self.images: Optional[Held] = None
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        service.rows += rows

    async def events(self) -> AsyncIterator[Tuple[int, Event]]:
        """The events of all, with the number of the choice that each belongs to.

        Ending the iteration early cancels what isn't finished.
        """
        metrics = self._service.metrics
        last: Dict[int, float] = {}  # when each choice had its last token
        try:
            async for prompt, event in _merged(self.answers):
                choice, now = prompt * self.each + event.sample, time.perf_counter()
                if event.token is not None and not event.echoed:
                    self.completion_tokens += 1
                    histogram = metrics.between if choice in last else metrics.first
                    histogram.observe(now - last.get(choice, self._began))
                    last[choice] = now
                if event.finish_reason is not None:
                    self.cached_tokens += (event.cached_tokens or 0) if not event.sample else 0
                    metrics.ended(event.finish_reason)
                    metrics.whole.observe(now - self._began)
                yield choice, event
        finally:
            self.end()

    def end(self) -> None:
        """Cancel what isn't finished; tell what was computed. Once: further calls do nothing."""
        if self._ended:
            return
        self._ended = True
        for answer in self.answers:
            answer.cancel()
        if self.images is not None:
            self.images.release()
        self._service.rows -= self._rows
        self._service.metrics.prompt_tokens.inc(self.prompt_tokens)
        self._service.metrics.generation_tokens.inc(self.completion_tokens)
        self._notes.update(prompt=self.prompt_tokens, completion=self.completion_tokens)

    def usage_of_chunk(self, options: Optional[StreamOptions]) -> Dict[str, Any]:
        """What a stream's chunks have beside their choices."""
        if options is None or not options.include_usage:
            return {}
        return {"usage": self.usage() if options.continuous_usage_stats else None}

    def usage(self) -> Dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "cache_write_tokens": self.prompt_tokens - self.cached_tokens,
            },
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[Tuple[int, Event]]:
    """The events of several answers as they come, each with its answer's number."""
    if len(answers) == 1:
        async for event in answers[0]:
            yield 0, event
        return
    found: asyncio.Queue[Tuple[int, Event | Exception | None]] = asyncio.Queue()

    async def forward(i: int) -> None:
        try:
            async for event in answers[i]:
                found.put_nowait((i, event))
            found.put_nowait((i, None))
        except Exception as error:
            found.put_nowait((i, error))

    tasks = [asyncio.create_task(forward(i)) for i in range(len(answers))]
    try:
        unfinished = len(tasks)
        while unfinished:
            i, what = await found.get()
            if isinstance(what, Exception):
                raise what
            if what is None:
                unfinished -= 1
            else:
                yield i, what
    finally:
        for task in tasks:
            task.cancel()


async def received(request: Request, kind: Type[B]) -> Tuple[Service, B, Dict[str, str]]:
    """The service, the request's body, and headers for the answer.

    Raises:
        ApiError: a bad body; 503 while the model is being loaded, or after the engine has failed.
    """
    state = request.app.state
    body, ignored = await read(request, kind, state.settings.lenient)
    service = ready(request)
    names = ", ".join(name.encode("ascii", "replace").decode() for name in ignored)
    return service, body, {"X-Ignored-Parameters": _printable(names)} if ignored else {}


def ready(request: Request) -> Service:
    """Raises ApiError: 503 while the model is being loaded, or after the engine has failed."""
    service: Optional[Service] = request.app.state.service
    if service is None:
        raise busy("the model is being loaded", 5, 503)
    if service.engine.failure is not None:
        raise ApiError(500, f"the engine has failed: {service.engine.failure}", kind="server_error")
    return service


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:1000]
