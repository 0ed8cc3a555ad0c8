"""Images in requests: fetched and tiled beside the event loop, within limits."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, List, Sequence

from llama.engine.seeing import tiles_of
from llama.model import Transformer
from llama.server.errors import busy, invalid
from llama.server.settings import Settings
from llama.vision.fetch import Fetcher, is_address
from llama.vision.images import Limits, Tiles

FETCHES, DECODERS = 32, 2  # at once; slow addresses don't hold up images that are here


class Held:
    """Tiles, which count until they are released."""

    def __init__(self, images: "Images", n: int):
        self._images, self.n = images, n
        self.tiles: List[Tiles] = []

    def release(self) -> None:
        self._images.held -= self.n
        self._images.room.set()
        self.n = 0


class Images:
    """Loads the images of requests for a model.

    Args:
        local: paths are read, too: requests come from whoever started this program. They wait until
            there is room.

    Attributes:
        held: images of requests that wait or run.
        room: set when there are fewer.
    """

    def __init__(self, model: Transformer, settings: Settings, local: bool):
        self._model, self._most, self._local = model, settings.max_images, local
        self._limits = Limits(int(settings.max_image_mb * 1e6), settings.max_image_pixels)
        allowed = (lambda address: True) if settings.allow_private_images else None
        self._fetcher = Fetcher(allowed=allowed)
        self._fetching = ThreadPoolExecutor(FETCHES, "fetch")
        self._tiling = ThreadPoolExecutor(DECODERS, "tile")
        self.held, self.room = 0, asyncio.Event()

    async def load(self, sources: Sequence[Any]) -> Held:
        """Raises ApiError: 400 for what can't be loaded, 429 for too many at once."""
        for source in sources:
            given = is_address(source) or str(source)[:5].lower() == "data:"
            if not given and not self._local:
                raise _invalid("an image is an http(s) address or a data URI")
        if len(sources) > self._most:
            raise _invalid(f"{len(sources)} images: this server takes {self._most} at once")
        while self.held + len(sources) > self._most:
            if not self._local:
                raise busy(f"{self.held} images wait or run, and the server takes {self._most}")
            self.room.clear()
            await self.room.wait()
        self.held += len(sources)
        held = Held(self, len(sources))
        try:
            found = await asyncio.gather(*(self._load(source) for source in sources))
        except BaseException:
            held.release()
            raise
        held.tiles = found
        return held

    async def _load(self, source: Any) -> Tiles:
        loop = asyncio.get_running_loop()
        try:
            if is_address(source):
                fetch, most = self._fetcher.fetch, self._limits.max_bytes
                source = await loop.run_in_executor(self._fetching, fetch, source, most)
            [tiles] = await loop.run_in_executor(
                self._tiling, tiles_of, self._model, [source], self._limits
            )
        except (ValueError, OSError) as error:
            raise _invalid(str(error)) from None
        return tiles


def _invalid(text: str) -> Exception:
    return invalid(text, "messages", "invalid_image")
