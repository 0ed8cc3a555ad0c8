"""The options of `llama serve` that concern the server, not the model."""

import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Literal, Mapping, Optional
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# What a program of one's own needn't be kept from; of images, what Python takes.
UNLIMITED: Mapping[str, Any] = {
    "log": "off", "max_queue": sys.maxsize, "max_body_mb": math.inf, "max_image_pixels": 50_000_000
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How the server listens, whom it answers, and what it refuses.

    Attributes:
        host: the address to listen on; anything but the default makes the server public: give it
            keys.
        port: 0 takes a free one.
        api_key_file: a file with one API key per line; requests need one of them. The environment
            variable LLAMA_API_KEY may hold a single one.
        cors: origins of web pages that may read the server's answers, such as https://example.org;
            none by default.
        served_name: the model's name for clients; by default that of its folder or file.
        adapter: NAME=DIR, a LoRA adapter in PEFT's layout, which clients choose as a model; may be
            given several times.
        lenient: ignore unknown parameters, and name them in the header X-Ignored-Parameters; by
            default they are errors.
        log: a line per request on stdout: text, json, or off. Prompts are never logged.
        max_queue: requests that may wait or run at once; further ones are answered with 429.
        max_body_mb: size of a request's body at most, in MB (10^6 bytes).
        max_images: images of requests that wait or run at once; further ones are answered with 429.
        max_image_mb: size of an image's file at most, in MB.
        max_image_pixels: width times height of an image at most.
        allow_private_images: fetch images from private and loopback addresses as well. Then whoever
            may send requests can reach other services of your network through the server.
        max_connections: open connections at most; further ones are closed.
        timeout: seconds that a client may take to send a request, or to read a part of an answer.
        max_tokens_per_step: tokens of a forward pass at most; longer prompts take several.
        cache_tokens: positions of the KV cache; by default max_batch_size times max_seq_len, or
            what half of the available memory holds.
        workers: always 1.

    Raises:
        ValueError: a value out of range, by name.
        FileNotFoundError: no api_key_file.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Optional[str] = None
    cors: List[str] = field(default_factory=list)
    served_name: Optional[str] = None
    adapter: List[str] = field(default_factory=list)
    lenient: bool = False
    log: Literal["text", "json", "off"] = "text"
    max_queue: int = 256
    max_body_mb: float = 8
    max_images: int = 64
    max_image_mb: float = 20
    max_image_pixels: int = 20_000_000
    allow_private_images: bool = False
    max_connections: int = 4096
    timeout: float = 60
    max_tokens_per_step: int = 512
    cache_tokens: Optional[int] = None
    workers: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must lie between 0 (any) and 65535")
        images = ("max_images", "max_image_pixels")
        for name in ("max_queue", "max_connections", "max_tokens_per_step", *images):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_body_mb", "max_image_mb", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        if self.workers != 1:
            raise ValueError(
                f"workers={self.workers}: one process holds one engine, which shares its passes "
                "and its cache among all requests; --ray and --replicas start more"
            )
        for entry in self.adapter:
            if not all(entry.partition("=")[::2]):
                raise ValueError(f"adapter={entry!r}: give NAME=DIR")
        if len(self.adapters) < len(self.adapter):
            names = [entry.partition("=")[0] for entry in self.adapter]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"adapter={twice}: two adapters have this name; rename one")
        for origin in self.cors:
            address = urlsplit(origin)
            whole = address.scheme and address.netloc and address.path in ("", "/")
            if not (whole or origin in ("*", "null")):
                raise ValueError(f"cors={origin!r}: give SCHEME://HOST or SCHEME://HOST:PORT, or *")

    @property
    def public(self) -> bool:
        """Whether other machines can connect."""
        return self.host not in LOOPBACK

    @property
    def adapters(self) -> Dict[str, str]:
        """Directories by name."""
        return dict(entry.split("=", 1) for entry in self.adapter)

    def keys(self) -> List[str]:
        """The API keys that are accepted; none: no key is needed."""
        keys = [os.environ.get("LLAMA_API_KEY", "")]
        if self.api_key_file is not None:
            keys += Path(self.api_key_file).read_text("utf-8").splitlines()
            if not any(map(str.strip, keys)):
                raise ValueError(f"{self.api_key_file}: no key in it; write one per line")
        return [key.strip() for key in keys if key.strip()]


@dataclass(frozen=True)
class Replicas:
    """Replicas of the server on Ray Serve, which share the requests.

    Attributes:
        ray: the cluster to serve on: HOST:PORT, auto (this machine's, or RAY_ADDRESS), or local,
            which starts one on this machine alone. By default there is no Ray.
        replicas: engines, each with the whole model.
        max_replicas: add replicas up to this number while requests queue, and remove them again.
        target_requests: requests of a replica above which one is added.
        imbalance: by how many requests more than the least busy replica's one is overloaded: a
            conversation then goes to another, whose cache doesn't hold it.
        cpus: processors of each replica, and its threads.
        gpus: GPUs of each replica.
        drain: seconds that a replica which is to end has for the requests that it is answering.

    Raises:
        ValueError: a value out of range, by name.
    """

    ray: Optional[str] = None
    replicas: int = 1
    max_replicas: Optional[int] = None
    target_requests: float = 16
    imbalance: int = 8
    cpus: float = 1
    gpus: float = 0
    drain: float = 300

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas={self.replicas} must be at least 1")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is less than replicas={self.replicas}"
            )
        for name in ("imbalance", "cpus", "gpus", "drain"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not self.target_requests > 0:
            raise ValueError(f"target_requests={self.target_requests} must be more than 0")
