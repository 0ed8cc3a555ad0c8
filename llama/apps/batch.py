"""`llama batch`: a file of requests, on this machine or on many."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from llama.apps.options import NO_OPTIONS, Texts, flat
from llama.apps.serve import MODEL, ServedModel
from llama.engine.params import SamplingParams

UNOFFERED = ("no_repeat_ngram_size", "guidance_scale")  # not in the server's bodies


@flat("Prompts", (*NO_OPTIONS, *UNOFFERED))
class PromptSampling(SamplingParams):
    temperature: float = 0.0


SAMPLING, MAX_GEN_LEN = PromptSampling(), 64  # as defaults


def batch(
    input: str,
    output: str,
    model: ServedModel = MODEL,
    sampling: PromptSampling = SAMPLING,
    *,
    max_gen_len: int = MAX_GEN_LEN,
    stop: Optional[Texts] = None,
    response_format: Optional[str] = None,
    ray: Union[bool, str] = False,
    engines: Optional[int] = None,
    cpus: Optional[float] = None,
    served_name: Optional[str] = None,
    adapter: Optional[List[str]] = None,
    lenient: bool = False,
    cache_tokens: Optional[int] = None,
    force: bool = False,
) -> None:
    """Answer all requests of a file, as `llama serve` would, with one engine or on a Ray cluster.

    A line is a request in the format of OpenAI's Batch API, {"custom_id": ..., "method": "POST",
    "url": "/v1/chat/completions", "body": {...}}; or {"prompt": ...}, or {"messages": [...]}, of
    which other keys are kept. A file whose name ends in neither .jsonl nor .parquet has a prompt on
    each line, unless it begins with a request, as a pipe may. The results stand in the order of the
    input. Lines that fail are in OUTPUT.errors.jsonl.

    The job can be killed at any moment: the same command goes on where it stopped, with or without
    Ray, on as many machines as there are then.

    Args:
        input: JSONL, Parquet (.parquet), or text.
        output: JSONL, or Parquet if its name ends in .parquet.
        max_gen_len: new tokens of a prompt or dialog at most. This, --stop, --response-format and
            the group Prompts aren't for requests, whose bodies say it.
        stop: a string at which a text ends, itself left out; may be given several times, or as a
            JSON list.
        response_format: structured outputs: JSON, or a file of it.
        ray: on a Ray cluster, --ray=HOST:PORT; without an address, on the one that this machine
            belongs to, or else on one of its own, as always with --ray=local.
        engines: how many, with --ray; by default one for each GPU of the cluster, or without any
            one for each machine.
        cpus: of each engine, with --ray and without GPUs; by default a machine's.
        served_name: the model's name in requests; by default that of its folder or file.
        adapter: NAME=DIR, a LoRA adapter in PEFT's layout, which requests choose as a model; may
            be given several times.
        lenient: ignore unknown parameters of requests; by default they are errors.
        cache_tokens: positions of the KV cache of each engine.
        force: replace an existing output, and what is left of an interrupted run with other
            options.

    Raises:
        ValueError: options out of range or that don't go together; missing packages; what
            `Llama.build` raises; when both files are written, that no line succeeded.
        FileNotFoundError, FileExistsError: a file that isn't there, or an output that is.
        OSError: no such cluster, or none of its engines answers.
        RuntimeError: the engine has failed.
    """
    try:
        from llama.apps.batch_job import Job, run
        from llama.server.settings import UNLIMITED, Settings
    except ImportError as error:
        raise ValueError(
            f"llama batch needs {error.name}: pip install llama-reference[server]"
        ) from None
    from llama.apps.completion import read_format, read_stops
    from llama.layers import parallel

    for name, value, least in (("max-gen-len", max_gen_len, 0), ("engines", engines, 1)):
        if value is not None and value < least:
            raise ValueError(f"--{name}={value} must be at least {least}")
    if cpus is not None and cpus <= 0:
        raise ValueError(f"--cpus={cpus:g} must be more than 0")
    if ray is False and (engines is not None or cpus is not None):
        raise ValueError("--engines and --cpus are of a Ray cluster: add --ray")
    parallel.initialize(device="cpu" if ray else model.device, timeout=model.rank_timeout)
    if ray and parallel.world_size() > 1:
        raise ValueError("--ray doesn't go with torchrun: each of its engines is one process")
    names = {field.name for field in fields(SamplingParams)} - {*NO_OPTIONS, *UNOFFERED}
    plain: Dict[str, Any] = {name: getattr(sampling, name) for name in sorted(names)}
    plain |= {"max_tokens": max_gen_len, "model": served_name, "stop": read_stops(stop or [])}
    plain["response_format"] = read_format(response_format)
    settings = Settings(
        served_name=served_name, adapter=adapter or [], lenient=lenient, cache_tokens=cache_tokens,
        **UNLIMITED,
    )  # fmt: skip
    asked = {
        "max_gen_len": max_gen_len != MAX_GEN_LEN,
        "stop": stop,
        "response_format": response_format,
    }
    asked |= {name: getattr(sampling, name) != getattr(SAMPLING, name) for name in sorted(names)}
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value]
    job = Job(Path(input), Path(output), vars(model), settings, plain, given, force)
    run(job, None if ray is False else (None if ray is True else str(ray), engines, cpus))
