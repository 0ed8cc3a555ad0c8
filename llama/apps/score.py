"""`llama score`: perplexity of texts."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Tuple

from llama.apps.options import ScoringModel
from llama.text.files import read_text

if TYPE_CHECKING:
    from llama.engine.scoring import Perplexity


def score(
    model: ScoringModel,
    *files: str,
    jsonl: Optional[str] = None,
    stride: Optional[int] = None,
    json: bool = False,
) -> None:
    """Print the number of tokens, total log-probability (natural) and perplexity of each text.

    A text is a file, or a line {"text": ...} of a JSONL file. Texts longer than the context are
    scored in overlapping windows of --max-seq-len tokens, each token once.

    Args:
        files: texts in UTF-8.
        jsonl: a file with a text on each line.
        stride: tokens from the beginning of one window to that of the next; by default half a
            window. With a whole one, the first token of each has no context and isn't scored.
        json: print one JSON object per text: name, tokens, logprob, perplexity.
    """
    from llama.engine.scoring import perplexities
    from llama.generation import Llama
    from llama.layers import parallel

    if not files and jsonl is None:
        raise ValueError("no files: llama score CKPT_DIR FILE... or --jsonl FILE")
    # A mistake shows before weights are read.
    texts = [[(file, read_text(Path(file), exact=True))] for file in files]
    texts += [read_lines(Path(jsonl))] if jsonl is not None else []
    engine = Llama.build(**vars(model)).engine(max_rows=model.max_batch_size)
    for named in texts:
        found = perplexities(
            engine, [text for _, text in named], stride, batch_size=model.max_batch_size
        )
        for (name, _), result in zip(named, found, strict=True):
            if parallel.is_rank_zero():
                print((as_json if json else as_line)(name, result), flush=True)


def read_lines(path: Path) -> List[Tuple[str, str]]:
    """The "text" of each line of a JSONL file, with its place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, no lines, or one that isn't an object with a "text".
    """
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = jsonlib.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'{path}:{number}: not a JSON object with a string "text"')
        texts.append((f"{path}:{number}", text))
    if not texts:
        raise ValueError(f'{path} has no lines: each is {{"text": ...}}')
    return texts


def as_line(name: str, found: "Perplexity") -> str:
    """A score for people."""
    return (
        f"{name}: {found.tokens} tokens, log-probability {-found.nll:.4f}, "
        f"perplexity {found.perplexity:.4f}"
    )


def as_json(name: str, found: "Perplexity") -> str:
    """A score for programs: name, tokens, logprob, perplexity (null if there are no tokens)."""
    record: Dict[str, object] = {"name": name, "tokens": found.tokens, "logprob": -found.nll}
    record["perplexity"] = found.perplexity if found.tokens else None
    return jsonlib.dumps(record, ensure_ascii=False)
