"""`llama complete`: texts continued, one to stdout or a file of them, plain or shown by example."""

import hashlib
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Literal, Optional, Tuple

from tqdm import tqdm

from llama.checkpoint import remote
from llama.engine.params import SamplingParams
from llama.generation import Llama
from llama.layers import parallel
from llama.text.few_shot import TEMPLATE, FewShot, read_shots
from llama.text.json_files import Results, decode, objects, read_text, string


def complete(
    ckpt_dir: str,
    prompt: Optional[str] = None,
    prompt_file: Optional[str] = None,
    shots: Optional[str] = None,
    template: Optional[str] = None,
    instruction: Optional[str] = None,
    max_gen_len: int = 64,
    temperature: float = 0.0,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int = 1,
    n: int = 1,
    stop: Optional[str] = None,
    input: Optional[str] = None,
    output: Optional[str] = None,
    force: bool = False,
    tokenizer_path: Optional[str] = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 8,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    quantize: Optional[Literal["int8", "int4"]] = None,
    kv_cache: Optional[Literal["int8"]] = None,
    compile: bool = False,
    response_format: Optional[str] = None,
    speculate: Optional[Literal["lookup", "draft", "off"]] = None,
    draft_ckpt_dir: Optional[str] = None,
    draft_quantize: Optional[Literal["int8", "int4"]] = None,
    prefix_cache_mb: int = 500,
    adapter_dir: Optional[str] = None,
    offload: Optional[Literal["auto"]] = None,
) -> None:
    """Continue a text, and print what follows; or all the texts of a JSONL file, into another.

    With shots, an instruction or a template, the text is not continued but put in the place of
    {input}, and what the model has for {output} is printed.

    A file of texts can be interrupted at any moment: the same command goes on where it stopped,
    and ends with the same file, byte for byte.

    Args:
        ckpt_dir: Meta's or Hugging Face's directory, or a .gguf file.
        prompt: the text; "-" for stdin, which is also read if there is none and it's no terminal.
        prompt_file: UTF-8 text. One newline at the end of a file or of stdin is taken off.
        shots: examples: 'sea => mer; bread => pain' (a ; or => of the text is written with a \\
            before it), or a file with {"input": ..., "output": ...} on each line.
        template: how an example is written. What follows {output}, or else a newline, ends it.
        instruction: what stands above the examples.
        max_gen_len: new tokens at most.
        temperature: 0 takes the most probable token each time.
        top_p: share of probability to sample from.
        top_k: number of most probable tokens to sample from; 0 for all.
        seed: of the random numbers.
        n: samples of each text; with input, "generation" and "finish_reason" become lists.
        stop: a string to stop at, itself left out; or several as JSON, '["\\n", "Q:"]'.
        input: JSONL: {"prompt": ...}, or with examples {"input": ...}; what else there is is kept.
        output: JSONL: the lines of input, each with "generation" and "finish_reason".
        force: replace an output, and what is left of an interrupted run with other options.
        tokenizer_path: by default what is found with the checkpoint.
        max_seq_len: tokens of text and continuation together.
        max_batch_size: texts, or samples of them, continued at once.
        device: cuda, mps or cpu.
        dtype: bf16, fp16 or fp32.
        quantize: int8 or int4, for weights of 8 or 4 bits.
        kv_cache: int8, for a cache of half the size.
        compile: compute much faster, for some seconds once (CPU).
        response_format: JSON, or a file of it, that says what the text must be like:
            '{"type": "choice", "choice": ["yes", "no"]}'; see `llama.engine.structured`.
        speculate: guess tokens, for the same text in less time: lookup, where the text repeats what
            it has, or draft, with a draft model.
        draft_ckpt_dir: a smaller model with the same tokenizer.
        draft_quantize: int8 or int4, for the draft model's weights.
        prefix_cache_mb: memory for what the texts of a file begin with, which is computed once.
        adapter_dir: a LoRA adapter in PEFT's layout, added to the weights.
        offload: auto brings in what doesn't fit into memory for each pass; slow.

    Raises:
        ValueError: options that don't go together or are out of range; a broken line, by file and
            number; what `Llama.build` and `text_completion` raise.
        FileNotFoundError, FileExistsError: a file that isn't there, or an output that is.
    """
    for name, value, least in (
        ("max_gen_len", max_gen_len, 0), ("top_k", top_k, 0), ("seed", seed, 0), ("n", n, 1),
        ("max_seq_len", max_seq_len, 1), ("max_batch_size", max_batch_size, 1),
        ("prefix_cache_mb", prefix_cache_mb, 0),
    ):  # fmt: skip
        if type(value) is not int or value < least:
            raise ValueError(f"--{name}={value}: it's a whole number from {least} up")
    if n > max_batch_size:
        raise ValueError(f"n={n} is more than max_batch_size={max_batch_size}: raise that")
    params = SamplingParams(
        temperature=_number("temperature", temperature), top_p=_number("top_p", top_p), top_k=top_k
    )
    few_shot = None
    if any(given is not None for given in (shots, template, instruction)):
        examples = [] if shots is None else read_shots(shots)
        few_shot = FewShot(examples, TEMPLATE if template is None else template, instruction)
    build: Dict[str, Any] = {
        "ckpt_dir": ckpt_dir, "tokenizer_path": tokenizer_path, "max_seq_len": max_seq_len,
        "max_batch_size": max_batch_size, "device": device, "dtype": dtype,
        "quantize": quantize, "kv_cache": kv_cache, "compile": compile,
        "draft_ckpt_dir": draft_ckpt_dir, "draft_quantize": draft_quantize,
        "prefix_cache_mb": 0 if input is None else prefix_cache_mb,
        "adapter_dir": adapter_dir, "offload": offload,
    }  # fmt: skip
    sampling: Dict[str, Any] = {"max_gen_len": max_gen_len, "params": params, "n": n}
    sampling |= {"speculate": speculate, "response_format": read_format(response_format)}
    sampling["stop"] = _stops(stop) + ([few_shot.stop] if few_shot else [])
    parallel.initialize(device=device)
    if input is None and output is None:
        text = _on_rank_zero(lambda: _prompt(prompt, prompt_file))
        text = few_shot.prompt(few_shot.without_separator(text)) if few_shot else text
        _print(Llama.build(**build), text, {**sampling, "seed": seed}, strip=few_shot is not None)
    elif input is None or output is None:
        raise ValueError("--input and --output belong together: give both files")
    elif prompt is not None or prompt_file is not None:
        raise ValueError("--prompt and --prompt_file don't go with --input: choose one")
    else:
        _complete_file(Path(input), Path(output), few_shot, build, sampling, seed, force)


def _on_rank_zero(work: Callable[[], Any]) -> Any:
    """What rank 0 gets from work, or the error that it raises, on all ranks."""
    found: Any = None
    if parallel.rank() == 0:
        try:
            found = work()
        except (ValueError, OSError) as error:
            found = error
    found = parallel.broadcast_object(found)
    if isinstance(found, Exception):
        raise found
    return found


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"--{name}={value}: it's a number") from None


def _stops(stop: Any) -> List[str]:
    """One string, or several as a list or as JSON."""
    if isinstance(stop, str) and stop.startswith("["):
        with suppress(ValueError):  # else it's a string that begins so
            stop = json.loads(stop)
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"--stop={stop!r}: a string, or several as JSON, and none of them empty")
    return stops


def read_format(text: Optional[str]) -> Optional[Dict[str, Any]]:
    """A response format from JSON, or from a file of it.

    Raises:
        ValueError: neither; FileNotFoundError: no such file.
    """
    if text is None:
        return None
    given = text if text.lstrip().startswith("{") else read_text(Path(text))
    try:
        found = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--response_format {text!r} isn't JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f'--response_format {text!r} is no object: {{"type": "json_object"}} is one'
        )
    return found


# --- one text ------------------------------------------------------------------------------------


def _prompt(prompt: Optional[str], prompt_file: Optional[str]) -> str:
    """The text from wherever it comes."""
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt_file: choose one")
    if prompt is not None and prompt != "-":
        text = prompt
    elif prompt_file is not None and prompt_file != "-":
        text = read_text(Path(prompt_file)).removesuffix("\n")
    elif prompt is None and prompt_file is None and sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt TEXT, --prompt_file FILE, or a text on stdin")
    else:
        text = decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
    if not text.strip():
        raise ValueError("the prompt is empty: give --prompt TEXT, --prompt_file FILE, or stdin")
    return text


def _print(llama: Llama, text: str, sampling: Dict[str, Any], strip: bool) -> None:
    """The answers to stdout, each with a newline at its end; a single plain one as it comes."""
    if strip or sampling["n"] > 1:
        found = llama.text_completion([text], **sampling)
        if parallel.is_rank_zero():
            for answer in found:
                generation = answer["generation"]
                print(generation.strip() if strip else generation, flush=True)
        return
    for event in llama.stream_text([text], **sampling):
        if parallel.is_rank_zero():
            print(event.text, end="", flush=True)
    if parallel.is_rank_zero():
        print(flush=True)


# --- a file of texts -----------------------------------------------------------------------------


@dataclass
class Line:
    """A line of the input: its number from 1, its object, and the prompt made of it."""

    number: int
    value: Dict[str, Any]
    prompt: str


def _complete_file(
    source: Path,
    target: Path,
    few_shot: Optional[FewShot],
    build: Dict[str, Any],
    sampling: Dict[str, Any],
    seed: int,
    force: bool,
) -> None:
    """Rank 0 reads and writes; what is left to do is known to all."""
    settings = {
        **build, **sampling, "params": asdict(sampling["params"]), "seed": seed,
        "few_shot": few_shot and asdict(few_shot), "ranks": parallel.world_size(),
    }  # fmt: skip
    lines: List[Line] = _on_rank_zero(lambda: read_lines(source, few_shot))
    opened: List[Results] = []  # by rank 0

    def known_lines() -> List[int]:
        opened.append(Results(target, _fingerprint(lines, settings), len(lines), force))
        return list(opened[0].found)

    try:
        known = set(_on_rank_zero(known_lines))
        if len(known) < len(lines):
            answers = _answers(Llama.build(**build), lines, known, seed, sampling)
            for number, result in tqdm(
                answers, total=len(lines), initial=len(known), desc=target.name, unit="line",
                disable=None if opened else True,  # None: unless stderr is a terminal
            ):  # fmt: skip
                if few_shot:
                    result["generation"] = _each(str.strip, result["generation"])
                for results in opened:
                    results.add(number, result)
        for results in opened:
            results.finish([(line.number, line.value) for line in lines])
    finally:
        for results in opened:
            results.close()


def read_lines(path: Path, few_shot: Optional[FewShot]) -> List[Line]:
    """The lines of a JSONL file, empty ones left out.

    Raises:
        ValueError: no lines, or one that isn't an object with the text, by file and number.
    """
    lines = []
    for number, value in objects(path):
        text = string(path, number, value, "input" if few_shot else "prompt")
        lines.append(Line(number, value, few_shot.prompt(text) if few_shot else text))
    if not lines:
        raise ValueError(f'{path} has no lines: each is {{"prompt": ...}}')
    return lines


def _each(change: Callable[[str], str], value: Any) -> Any:
    return [change(one) for one in value] if isinstance(value, list) else change(value)


def _seed(seed: int, number: int) -> int:
    """A line's seed: other lines, and the same line under other seeds, have unrelated ones."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _answers(
    llama: Llama, lines: List[Line], known: set[int], seed: int, sampling: Dict[str, Any]
) -> Iterator[Tuple[int, Dict[str, Any]]]:
    """Numbers of lines and what to add to them, in the order in which they are finished.

    What is known is left out, and yet nothing depends on it: a row's random numbers are its own,
    but its logits are rounded differently in a batch of another shape, which now and then is
    another token. So the batches are those of the whole file, and one that was interrupted is
    computed again with all of its rows. (Whatever else shapes them is in the fingerprint.)
    """
    n, max_seq_len = sampling["n"], llama.model.params.max_seq_len
    encode, bos = llama.tokenizer.encode, llama.tokenizer.add_bos
    ids = [encode(line.prompt, bos=bos, eos=False) for line in lines]
    lengths = [*map(len, ids)]
    for line, length in zip(lines, lengths, strict=True):
        if length > max_seq_len:
            raise ValueError(
                f"the prompt of line {line.number} has {length} tokens, and max_seq_len is "
                f"{max_seq_len}: shorten it, or give a larger --max_seq_len"
            )
    if llama.prefixes is not None:
        llama.prefixes.share(llama.model, ids)
        llama.prefixes.grows = False  # else batches would depend on those before
    # Similar lengths together; the longest first, so that too little memory shows at once.
    order = sorted(range(len(lines)), key=lambda i: (-lengths[i], i))
    size = llama.model.params.max_batch_size // n
    for begin in range(0, len(order), size):
        batch = [lines[i] for i in order[begin : begin + size]]
        if all(line.number in known for line in batch):
            continue
        texts = [[""] * n for _ in batch]
        reasons: List[List[Optional[str]]] = [[None] * n for _ in batch]
        seeds = [_seed(seed, line.number) for line in batch]
        prompts = [line.prompt for line in batch]
        for event in llama.stream_text(prompts, **sampling, seed=seeds):
            row = event.row
            texts[row][event.sample] += event.text
            reasons[row][event.sample] = event.finish_reason
            if event.finish_reason and all(reasons[row]) and batch[row].number not in known:
                found: Dict[str, List[Any]] = {
                    "generation": texts[row],
                    "finish_reason": reasons[row],
                }
                yield batch[row].number, found if n > 1 else {k: v[0] for k, v in found.items()}


def _fingerprint(lines: List[Line], settings: Dict[str, Any]) -> str:
    """Of all that the output depends on; of weights their files' names, sizes and times."""
    path = Path(remote.local_path(settings["ckpt_dir"])).resolve()
    adapter = settings.get("adapter_dir")
    places = [path] + ([Path(remote.local_path(adapter))] if adapter else [])
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for place in places
        for file in (sorted(place.iterdir()) if place.is_dir() else [place])
        if file.suffix in (".pth", ".safetensors", ".bin", ".gguf", ".json") and file.exists()
    ]
    content = [(line.number, line.value) for line in lines]
    job = json.dumps([content, {**settings, "ckpt_dir": str(path)}, weights], default=list)
    return hashlib.sha256(job.encode()).hexdigest()
