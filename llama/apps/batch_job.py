"""What `llama batch` does: requests are answered, kept at once, and written at the end."""

import hashlib
import json
import signal
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Generator, Iterator, List, Mapping, Optional, Sequence, Tuple

from tqdm import tqdm

from llama.apps.batch_lines import Line, read, written
from llama.apps.completion import fingerprint
from llama.engine.leader import follow
from llama.layers import parallel
from llama.server.offline import Offline, Reply, Request, beginning
from llama.server.service import limits, load
from llama.server.settings import Settings
from llama.text.files import Results, check_apart

Cluster = Tuple[Optional[str], Optional[int], Optional[float]]  # address, engines, CPUs of each


@dataclass
class Job:
    """A file of requests to be answered.

    Attributes:
        build: options of `Llama.build`.
        plain: what the bodies say that are made of prompts.
        given: options on the command line that say it.
    """

    source: Path
    target: Path
    build: Mapping[str, Any]
    settings: Settings
    plain: Mapping[str, Any]
    given: Sequence[str]
    force: bool

    @property
    def failures(self) -> Path:
        return self.target.with_name(f"{self.target.name}.errors.jsonl")


def run(job: Job, cluster: Optional[Cluster]) -> None:
    """Answer what isn't finished; then write all of it.

    Args:
        cluster: on Ray.

    Raises:
        ValueError, OSError: what `llama batch` does. RuntimeError: no engine answers any more.
        KeyboardInterrupt: Ctrl-C; it says how much is finished.
    """
    lines: List[Line] = []
    opened: List[Results] = []  # by rank 0

    def prepare() -> bool:
        """Whether there is something to compute."""
        try:
            content = job.source.read_bytes()  # once: it may be a pipe
        except FileNotFoundError:
            raise FileNotFoundError(f"no file at {job.source}") from None
        lenient = job.settings.lenient
        lines.extend(read(job.source, content, job.plain, job.build["seed"], lenient))
        for text in _unheeded(job, lines):
            print(f"note: {text}", file=sys.stderr)
        opened.append(_open(job, content, sum(isinstance(line.request, Request) for line in lines)))
        return bool(_unfinished(lines, opened[0]))

    try:
        if not parallel.on_rank_zero(prepare):
            pass
        elif opened:
            _answer(job, lines, opened[0], cluster)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends first, and then this one
            llama = load(job.build, job.settings)
            follow(llama.engine(**limits(llama, job.settings)))
        for results in opened:
            _write(job, lines, results)
    finally:
        for results in opened:
            results.close()


def _unheeded(job: Job, lines: List[Line]) -> Iterator[str]:
    """What is given and heeded by nothing."""
    plain = [line for line in lines if line.plain]
    if job.given and not plain:
        options = ", ".join(job.given)
        yield f"{options}: of prompts and messages; here are requests, whose bodies say it"
    keys = {key for line in plain for key in line.value.keys() & {*job.plain, "tools"}}
    if keys:
        names = ", ".join(sorted(keys))
        yield (
            f"{names} in lines: kept, and not heeded; options are given on the command line, or in "
            "the bodies of requests"
        )


def _open(job: Job, source: bytes, count: int) -> Results:
    """What is finished of a job.

    Args:
        source: the content of its input.
        count: its requests.
    """
    content = [hashlib.sha256(source).hexdigest(), job.plain]
    names = {"served_name": job.settings.served_name, "lenient": job.settings.lenient}
    settings = {**job.build, **names, "adapters": job.settings.adapters}
    check_apart(job.source, job.target, job.failures)
    begun = job.target.with_name(f".{job.target.name}.partial").exists()
    if job.failures.exists() and not begun and not job.force:
        raise FileExistsError(
            f"{job.failures} exists: choose another name, or overwrite it with --force"
        )
    return Results(job.target, fingerprint(content, settings), count, job.force)


def _unfinished(lines: List[Line], results: Results) -> List[Request]:
    """In an order in which prompts that begin alike are neighbours."""
    requests = (line.request for line in lines if isinstance(line.request, Request))
    return sorted((r for r in requests if r.number not in results.found), key=beginning)


def _answer(job: Job, lines: List[Line], results: Results, cluster: Optional[Cluster]) -> None:
    requests, before = _unfinished(lines, results), len(results.found)
    count, began = before + len(requests), time.monotonic()
    try:
        with (
            closing(_replies(job, requests, cluster)) as replies,
            tqdm(
                total=count, initial=before, unit="line", desc=job.target.name,
                disable=None,  # unless stderr is a terminal
            ) as bar,
        ):  # fmt: skip
            for some in replies:
                results.add_all({
                    reply.number: {"status": reply.status, "body": json.loads(reply.body)}
                    for reply in some
                })  # fmt: skip
                bar.update(len(some))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: {len(results.found)} of {count} requests are finished, and the same "
            "command goes on with the others"
        ) from None
    seconds = time.monotonic() - began
    rate = f"{len(requests) / seconds:.1f} requests/s"
    print(f"{len(requests)} requests in {seconds:.1f} s, {rate}", flush=True)


def _replies(
    job: Job, requests: List[Request], cluster: Optional[Cluster]
) -> Generator[List[Reply], None, None]:
    if cluster is None:
        with Offline(job.build, job.settings) as model:
            yield from model.answers(requests)
    else:
        from llama.ray.bulk import answers

        yield from answers(requests, job.build, job.settings, *cluster)


def _write(job: Job, lines: List[Line], results: Results) -> None:
    """The results and the errors, in the order of the input."""
    seed, failed = job.build["seed"], []

    def reply(line: Line) -> Tuple[int, Dict[str, Any]]:
        if not isinstance(line.request, Request):
            return 400, line.request
        return tuple(results[line.number].values())  # type: ignore[return-value]

    for line in lines:
        if reply(line)[0] != 200:
            failed.append(line)
    if failed:
        records = (line.record(seed, *reply(line)) for line in failed)
        results.publish(job.failures, written(job.failures, records))
        print(f"{len(failed)} of {len(lines)} lines failed: {job.failures}")
    else:
        job.failures.unlink(missing_ok=True)
    numbers = {line.number for line in failed}
    good = (line for line in lines if line.number not in numbers)
    print(f"{len(lines) - len(failed)} of {len(lines)} lines: {job.target}")
    results.finish(written(job.target, (line.record(seed, *reply(line)) for line in good)))
    if len(failed) == len(lines):
        raise ValueError(f"no line succeeded: {job.failures} says why")
