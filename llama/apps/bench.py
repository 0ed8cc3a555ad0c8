"""`llama bench`: load for a running server."""

from typing import Literal, Optional


def bench(
    what: Literal["load"],
    url: str = "http://127.0.0.1:8000",
    *,
    requests: int = 48,
    concurrency: int = 16,
    rate: Optional[float] = None,
    model: Optional[str] = None,
    api_key: Optional[str] = None,
    seed: int = 1,
    json: bool = False,
) -> None:
    """Send requests to a server with OpenAI's API, and print how fast it answers.

    A third are short chats, a third have long prompts (300 to 900 words), and a third share a
    system prompt of 1,000 words; answers have 16 to 96 tokens. Any server will do that has
    /v1/completions with streams.

    Args:
        what: load, the only choice so far.
        url: of the server, with or without /v1.
        requests: how many.
        concurrency: at most so many at a time.
        rate: requests per second, at random times (Poisson); by default as fast as answers come.
        model: its name for the server.
        api_key: sent as Authorization: Bearer.
        seed: of the random numbers.
        json: print a line of JSON.

    Raises:
        ValueError: options out of range; the server answers with an error.
        OSError: no server there.
    """
    from json import dumps

    from llama.apps import load

    for name, value in (("requests", requests), ("concurrency", concurrency)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if rate is not None and not rate > 0:
        raise ValueError(f"rate={rate} must be more than 0")
    jobs = load.make_jobs(requests, rate, seed)
    found = load.run(
        url.rstrip("/").removesuffix("/v1"), jobs, concurrency, model=model, api_key=api_key
    )
    if json:
        print(dumps(found))
        return
    for key, entry in found.items():
        if isinstance(entry, dict):
            entry = "  ".join(f"{q} {seconds * 1000:.1f} ms" for q, seconds in entry.items())
        print(f"{key:<16}{entry}")
