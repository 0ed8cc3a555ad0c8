"""What `llama complete` does: prompts from anywhere, answers as they come, and files of prompts."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from tqdm import tqdm

from llama.checkpoint import remote
from llama.generation import Llama
from llama.layers import parallel
from llama.text.few_shot import FewShot
from llama.text.files import Results, check_apart, decode, json_line, objects, read_text, string


def read_stops(given: Sequence[str]) -> List[str]:
    """Stop strings, each given plainly or several as a JSON list.

    Raises:
        ValueError: a list that isn't JSON, or an empty or other value in it.
    """
    stops: List[Any] = []
    for text in given:
        try:
            stops += json.loads(text) if text.startswith("[") else [text]
        except ValueError as error:
            raise ValueError(
                f'--stop={text!r} isn\'t a JSON list of strings, \'["a", "b"]\': {error}; a stop '
                f"string that begins with [ is written {json.dumps([text])!r}"
            ) from None
    if not all(isinstance(stop, str) and stop for stop in stops):
        shown = ", ".join(map(repr, given))
        raise ValueError(f"--stop={shown}: a string, or several as JSON, and none of them empty")
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


def read_prompt(prompt: Optional[str], prompt_file: Optional[str]) -> str:
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


def show(llama: Llama, text: str | List[Any], sampling: Dict[str, Any], strip: bool) -> None:
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


def complete_file(
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
    parallel.on_rank_zero(lambda: check_apart(source, target))
    lines: List[Line] = parallel.on_rank_zero(lambda: read_lines(source, few_shot))
    opened: List[Results] = []  # by rank 0

    def known_lines() -> List[int]:
        content = [(line.number, line.value) for line in lines]
        opened.append(Results(target, fingerprint(content, settings), len(lines), force))
        return list(opened[0].found)

    try:
        known = set(parallel.on_rank_zero(known_lines))
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
            results.finish(json_line({**line.value, **results[line.number]}) for line in lines)
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


def seed_of(seed: int, name: object) -> int:
    """A line's seed: other lines, and the same line under other seeds, have unrelated ones."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
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
        llama.prefixes.share(ids)  # and nothing else, or batches would depend on those before
    # Similar lengths together; the longest first, so that too little memory shows at once.
    order = sorted(range(len(lines)), key=lambda i: (-lengths[i], i))
    size = llama.model.params.max_batch_size // n
    for begin in range(0, len(order), size):
        batch = [lines[i] for i in order[begin : begin + size]]
        if all(line.number in known for line in batch):
            continue
        texts = [[""] * n for _ in batch]
        reasons: List[List[Optional[str]]] = [[None] * n for _ in batch]
        seeds = [seed_of(seed, line.number) for line in batch]
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


def fingerprint(content: Any, settings: Dict[str, Any]) -> str:
    """Of all that the output depends on; of a model its files' names, sizes and times.

    Args:
        content: the input, as a value of JSON.
    """
    path = Path(remote.local_path(settings["ckpt_dir"])).resolve()
    others = [settings.get("adapter_dir"), *settings.get("adapters", {}).values()]
    others.append(settings.get("tokenizer_path"))
    places = [path, *(Path(remote.local_path(other)) for other in others if other)]
    kinds = (".pth", ".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja")
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for place in places
        for file in (sorted(place.iterdir()) if place.is_dir() else [place])
        if (file.suffix in kinds or file in places) and file.exists()
    ]
    shaping = {**settings, "ckpt_dir": str(path), "rank_timeout": None, "broadcast_weights": None}
    job = json.dumps([content, shaping, files], default=list)
    return hashlib.sha256(job.encode()).hexdigest()
