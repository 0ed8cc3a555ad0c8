"""`llama score`: perplexity of texts."""

from typing import Optional

from llama.apps.options import ScoringModel


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
            window.
        json: print one JSON object per text: name, tokens, logprob, perplexity.
    """
    from pathlib import Path

    from llama.engine.scoring import as_json, as_line, perplexities, read_lines, read_text
    from llama.generation import Llama
    from llama.layers import parallel

    if not files and jsonl is None:
        raise ValueError("no files: llama score CKPT_DIR FILE... or --jsonl FILE")
    # A mistake shows before weights are read.
    texts = [[(file, read_text(Path(file)))] for file in files]
    texts += [read_lines(Path(jsonl))] if jsonl is not None else []
    llama = Llama.build(**vars(model))
    for named in texts:
        found = perplexities(
            llama.model, llama.tokenizer, [text for _, text in named], stride,
            batch_size=model.max_batch_size,
        )  # fmt: skip
        for (name, _), result in zip(named, found, strict=True):
            if parallel.is_rank_zero():
                print((as_json if json else as_line)(name, result), flush=True)
