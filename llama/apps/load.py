"""Load for a server with OpenAI's API: requests at random times, and how long each waited."""

import http.client
import json
import random
import re
import statistics
import threading
import time
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, Dict, List, NamedTuple, Optional, Sequence
from urllib.parse import urlsplit

WORDS = re.findall(
    r"\w+",
    """time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work night point
home water room mother area money story fact month lot right study book eye job word""",
)
SYSTEM = 1000  # words of the system prompt that a third of the requests share


class Job(NamedTuple):
    """A request: words are about a token each."""

    at: float  # seconds after the beginning
    prompt: str
    max_tokens: int


class Timing(NamedTuple):
    """What a request saw, in seconds from when it was sent."""

    tokens: int
    first: float
    between: List[float]
    whole: float


def make_jobs(
    count: int,
    rate: Optional[float],
    seed: int,
    vocabulary: Sequence[str] = WORDS,
    space: str = " ",
) -> List[Job]:
    """Requests of three kinds in equal shares: short chats, long prompts, a shared system prompt.

    Args:
        rate: requests per second, at exponentially distributed intervals (Poisson arrivals); None:
            all at once.
        vocabulary: of which texts are made, joined by `space`; each should be about a token.
    """
    rng = random.Random(seed)

    def words(n: int) -> str:
        return space.join(rng.choices(vocabulary, k=n))

    system, at, found = words(SYSTEM), 0.0, []
    for i in range(count):
        kind = i % 3
        if kind == 0:
            prompt, most = words(rng.randint(10, 60)), rng.randint(32, 96)
        elif kind == 1:
            prompt, most = words(rng.randint(300, 900)), rng.randint(16, 48)
        else:
            prompt, most = f"{system}{space}{words(rng.randint(10, 60))}", rng.randint(16, 64)
        found.append(Job(at, prompt, most))
        at += rng.expovariate(rate) if rate else 0.0
    return found


def run(
    url: str,
    jobs: Sequence[Job],
    concurrency: int,
    *,
    model: Optional[str] = None,
    api_key: Optional[str] = None,
    ignore_eos: bool = True,
) -> Dict[str, Any]:
    """Send all jobs, `concurrency` of them at a time, and summarize the answers.

    Args:
        ignore_eos: ask for answers of full length; False for servers that don't know this.

    Raises:
        ValueError: an address that isn't http's; the server answers with an error, which is named.
        OSError: it can't be reached, or is no HTTP server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"url={url!r}: give http://HOST:PORT, as `llama serve` prints it")
    began, ended, left = time.perf_counter(), threading.Event(), iter([*jobs])
    replies: SimpleQueue[Timing | BaseException] = SimpleQueue()

    def work() -> None:
        for job in left:
            if ended.wait(max(0.0, began + job.at - time.perf_counter())):
                return
            try:
                replies.put(_ask(url, job, model, api_key, ignore_eos))
            except BaseException as error:
                replies.put(error)

    for _ in range(min(concurrency, len(jobs))):
        threading.Thread(target=work, daemon=True).start()  # Ctrl-C doesn't wait for its request
    found = []
    try:
        for _ in jobs:
            reply = replies.get()
            if isinstance(reply, BaseException):
                raise reply
            found.append(reply)
    finally:
        ended.set()
    return summary(found, time.perf_counter() - began, concurrency)


def summary(found: Sequence[Timing], seconds: float, concurrency: int) -> Dict[str, Any]:
    """Rates, and what requests saw, as percentiles in seconds."""
    tokens = sum(timing.tokens for timing in found)
    return {
        "requests": len(found), "concurrency": concurrency, "seconds": round(seconds, 3),
        "requests/s": round(len(found) / seconds, 3), "tokens/s": round(tokens / seconds, 2),
        "first token": percentiles([timing.first for timing in found]),
        "between tokens": percentiles([gap for timing in found for gap in timing.between]),
        "whole answer": percentiles([timing.whole for timing in found]),
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> Dict[str, float]:
    """p50, p95 and p99, in seconds."""
    if len(values) < 2:
        return dict.fromkeys(("p50", "p95", "p99"), round(sum(values), 4))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{q}": round(cuts[q - 1], 4) for q in (50, 95, 99)}


def _ask(
    url: str, job: Job, model: Optional[str], api_key: Optional[str], ignore_eos: bool
) -> Timing:
    """Send a request and read its stream to the end."""
    try:
        return _timed(url, job, model, api_key, ignore_eos)
    except (OSError, http.client.HTTPException) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{url}: {why}; give the address that `llama serve` prints") from None


def _timed(
    url: str, job: Job, model: Optional[str], api_key: Optional[str], ignore_eos: bool
) -> Timing:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=600)
    body = {
        "prompt": job.prompt, "max_tokens": job.max_tokens, "temperature": 0, "stream": True,
        **({"ignore_eos": True} if ignore_eos else {}), **({"model": model} if model else {}),
    }  # fmt: skip
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    sent = time.perf_counter()
    try:
        connection.request("POST", f"{parts.path}/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            said = " ".join(response.read(500).decode(errors="replace").split())
            raise ValueError(f"{url} answers {response.status}: {said}")
        times: List[float] = []
        reason = None
        for line in response:
            data = line.removeprefix(b"data:").lstrip()
            if data != line and data.startswith(b"{"):
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ValueError(f"{url} failed in the middle of an answer: {chunk['error']}")
                for choice in chunk.get("choices") or ():
                    reason = choice.get("finish_reason") or reason
                    if choice.get("text") or not times:  # some end with a chunk without text
                        times.append(time.perf_counter())
    finally:
        connection.close()
    if not times:
        raise ValueError(f"{url}: a stream without any token")
    whole = ignore_eos and reason == "length"  # several tokens may come at once
    return timing(job.max_tokens if whole else len(times), sent, times)


def timing(tokens: int, sent: float, times: Sequence[float]) -> Timing:
    """What a request saw, by when its tokens came."""
    gaps = [after - before for before, after in pairwise(times)]
    return Timing(tokens, times[0] - sent, gaps, times[-1] - sent)
