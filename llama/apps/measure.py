"""`llama score` and `llama eval`: how good a model is, in figures."""

import json as jsonlib
from pathlib import Path
from typing import Literal, Optional

from llama.engine.scoring import as_json, as_line, perplexities, read_lines
from llama.generation import Llama
from llama.layers import parallel
from llama.text.files import read_text


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
    quantize: Optional[Literal["int8", "int4"]] = None,
    compile: bool = False,
    adapter_dir: Optional[str] = None,
    offload: Optional[Literal["auto"]] = None,
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
        quantize: int8 or int4, for weights of 8 or 4 bits.
        compile: compute much faster, for some seconds once (CPU).
        adapter_dir: a LoRA adapter in PEFT's layout, added to the weights.
        offload: auto brings in what doesn't fit into memory for each pass; slow.
        json: one JSON object per text: name, tokens, logprob, perplexity.
    """
    if not files and jsonl is None:
        raise ValueError("no files: llama score CKPT_DIR FILE... or --jsonl FILE")
    # A mistake shows before weights are read.
    texts = [[(file, read_text(Path(file), exact=True))] for file in files]
    texts += [read_lines(Path(jsonl))] if jsonl is not None else []
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        batch_size,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        adapter_dir=adapter_dir,
        offload=offload,
    )
    for named in texts:
        found = perplexities(
            llama.model, llama.tokenizer, [text for _, text in named], stride, batch_size=batch_size
        )
        for (name, _), result in zip(named, found, strict=True):
            if parallel.is_rank_zero():
                print((as_json if json else as_line)(name, result), flush=True)


def evaluate(
    ckpt_dir: str,
    tasks: str,
    limit: Optional[int] = None,
    num_fewshot: Optional[int] = None,
    max_seq_len: int = 2048,
    batch_size: int = 8,
    include_path: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    quantize: Optional[Literal["int8", "int4"]] = None,
    kv_cache: Optional[Literal["int8"]] = None,
    compile: bool = False,
    adapter_dir: Optional[str] = None,
    offload: Optional[Literal["auto"]] = None,
    json: bool = False,
) -> None:
    """Run tasks of lm-evaluation-harness and print its table of results.

    The harness fetches the tasks' data from the network, unless they are in its cache.

    Args:
        ckpt_dir: Meta's or Hugging Face's directory, or a .gguf file.
        tasks: names, with commas between them: arc_easy,hellaswag.
        limit: examples of each task; all by default. Figures of a part say little.
        num_fewshot: solved examples before each question; what the task says by default.
        max_seq_len: tokens of a question with its answer; what is longer loses its beginning.
        batch_size: texts computed at a time.
        include_path: a directory with tasks of your own, in the harness's YAML.
        tokenizer_path: by default what is found with the checkpoint.
        device: cuda, mps or cpu.
        dtype: bf16, fp16 or fp32.
        quantize: int8 or int4, for weights of 8 or 4 bits.
        kv_cache: int8, for a cache of half the size.
        compile: compute much faster, for some seconds once (CPU).
        adapter_dir: a LoRA adapter in PEFT's layout, added to the weights.
        offload: auto brings in what doesn't fit into memory for each pass; slow.
        json: the harness's results as one JSON object, in place of the table.

    Raises:
        ValueError: the harness isn't installed, an unknown task, or what `Llama.build` raises.
    """
    from llama.apps import evaluation  # here, as it needs the harness, and says so if it is missing

    manager = evaluation.TaskManager(include_path=include_path)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ValueError(
            f"unknown tasks: {', '.join(unknown) or repr(tasks)}; `lm-eval ls tasks` lists those "
            "there are, and include_path adds your own"
        )
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        batch_size,
        device=device,
        dtype=dtype,
        quantize=quantize,
        kv_cache=kv_cache,
        compile=compile,
        adapter_dir=adapter_dir,
        offload=offload,
    )
    results = evaluation.lm_eval.simple_evaluate(
        evaluation.HarnessModel(llama), tasks=names, num_fewshot=num_fewshot, limit=limit,
        task_manager=manager, log_samples=False,
    )  # fmt: skip
    if results is None or not parallel.is_rank_zero():
        return
    if json:
        kept = ("results", "groups", "versions", "n-shot", "n-samples")
        print(jsonlib.dumps({key: results[key] for key in kept if key in results}, default=str))
    else:
        print(evaluation.make_table(results))
        if results.get("groups"):
            print(evaluation.make_table(results, "groups"))
