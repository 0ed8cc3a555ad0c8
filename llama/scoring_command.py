"""`llama score`: how probable a model finds the texts in files."""

from pathlib import Path
from typing import Optional

from llama import parallel
from llama.generation import Llama
from llama.scoring import as_json, as_line, perplexities, read_lines, read_text


def score(
    ckpt_dir: str,
    *files: str,
    jsonl: Optional[str] = None,
    max_seq_len: int = 2048,
    stride: Optional[int] = None,
    batch_size: int = 8,
    tokenizer_path: Optional[str] = None,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    json: bool = False,
) -> None:
    """Print the tokens, total log-probability (natural) and perplexity of each text.

    A text is a file, or a line {"text": ...} of the one given as jsonl. One longer than the
    context is scored in windows that overlap, each token once.

    Args:
        ckpt_dir: Meta's or Hugging Face's directory, or a .gguf file.
        files: UTF-8 text.
        jsonl: a file with a text on each line.
        max_seq_len: tokens of a window.
        stride: tokens from the begin of one window to that of the next; half of a window.
        batch_size: windows computed at a time.
        tokenizer_path: by default what is found with the checkpoint.
        device: cuda, mps or cpu.
        dtype: bf16, fp16 or fp32.
        json: one JSON object per text: name, tokens, logprob, perplexity.
    """
    if not files and jsonl is None:
        raise ValueError("no files: llama score CKPT_DIR FILE... or --jsonl FILE")
    # A mistake shows before weights are read.
    texts = [[(file, read_text(Path(file)))] for file in files]
    texts += [read_lines(Path(jsonl))] if jsonl is not None else []
    llama = Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, batch_size, device=device, dtype=dtype
    )
    for named in texts:
        found = perplexities(
            llama.model, llama.tokenizer, [text for _, text in named], stride, batch_size=batch_size
        )
        for (name, _), result in zip(named, found, strict=True):
            if parallel.is_rank_zero():
                print((as_json if json else as_line)(name, result), flush=True)
