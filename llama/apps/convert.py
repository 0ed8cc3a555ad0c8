"""`llama convert`: a checkpoint in another format."""

from typing import Literal, Optional


def convert(
    src: str,
    dst: str,
    to: Literal["meta", "hf", "gguf"],
    *,
    mp: int = 1,
    dtype: Optional[Literal["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"]] = None,
    quant: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    adapter_dir: Optional[str] = None,
    force: bool = False,
    verify: bool = False,
) -> None:
    """Write a checkpoint, with its tokenizer and chat template, in another format.

    Memory: a few blocks of one tensor. An interrupted run leaves nothing under the final name.

    Args:
        src: a directory in Meta's or Hugging Face's format, or a .gguf file; remote ones are
            downloaded first.
        dst: the directory, or for gguf the file, to write.
        to: the format to write.
        mp: number of shards, for meta.
        dtype: of the weights; by default what they are stored in (fp32 if quantized).
        quant: for gguf, one type: q8_0, q4_0, q4_1; or a mixture of types as llama.cpp's: q4_k_s,
            q4_k_m, q5_k_s, q5_k_m, q6_k; keep: the types in which weights are stored, exactly, if
            GGUF has them; nearest: those nearest to these, which may round.
        tokenizer_path: by default the one found with the source.
        adapter_dir: a LoRA adapter in PEFT's layout, merged into the weights that are written.
        force: overwrite dst, once the new checkpoint is complete.
        verify: read everything again and compare.
    """
    import torch

    from llama.backends import memory
    from llama.backends.build import open_checkpoint
    from llama.checkpoint import convert
    from llama.layers.parallel import pick_dtype

    try:
        path = convert.convert(
            open_checkpoint(src, adapter_dir), dst, to, model_parallel_size=mp,
            dtype=None if dtype is None else pick_dtype(dtype, torch.device("cpu")),
            quant=quant, tokenizer_path=tokenizer_path, force=force, verify=verify,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: nothing was written under the final name") from None
    files = path.rglob("*") if path.is_dir() else [path]
    size = memory.size(sum(file.stat().st_size for file in files if file.is_file()))
    print(f"{path}: {size}" + (", verified" if verify else ""))
