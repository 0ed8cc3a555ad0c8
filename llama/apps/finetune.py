"""`llama finetune`: all weights or a LoRA adapter, on dialogs or texts."""

from typing import Literal, Optional


def finetune(
    data: str,
    *,
    out: str,
    ckpt_dir: str = "checkpoints/SmolLM2-135M-Instruct",
    tokenizer_path: Optional[str] = None,
    method: Literal["lora", "full"] = "lora",
    to: Optional[Literal["adapter", "hf", "meta", "gguf"]] = None,
    held_out: int = 20,
    epochs: int = 3,
    batch_size: int = 8,
    micro_batches: int = 1,
    learning_rate: Optional[float] = None,
    warmup_steps: Optional[int] = None,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    max_seq_len: int = 512,
    lora_rank: int = 16,
    lora_alpha: float = 32.0,
    lora_matrices: str = "wq,wk,wv,wo,w1,w2,w3",
    recompute: bool = False,
    save_every: int = 50,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
    seed: int = 1,
    force: bool = False,
) -> None:
    """Fine-tune a model, all of its weights or a LoRA adapter, on dialogs or texts.

    A run that was interrupted (Ctrl-C) or killed is resumed by the same command, and its weights
    are bit-identical to those of an uninterrupted one. OUT gets log.jsonl, loss.png and the result.

    Args:
        data: a text file, or .jsonl with {"messages": [{"role": ..., "content": ...}, ...]} or
            {"text": ...} on each line. Of dialogs, the assistant's tokens are learned.
        out: a directory for the result.
        ckpt_dir: any checkpoint.
        tokenizer_path: by default the one found with the checkpoint.
        method: a LoRA adapter, or full for all weights.
        to: adapter (PEFT's layout, the default for lora), hf (the default for full), meta or gguf.
        held_out: number of examples at the end of the data that aren't learned: the loss on them
            is reported.
        epochs: passes over the examples.
        batch_size: examples in a step.
        micro_batches: forward and backward passes that a step is divided into, for less memory.
        learning_rate: the highest, reached after warmup_steps; from there a cosine goes to 0. By
            default 1e-3 for lora, 1e-4 for full.
        warmup_steps: steps in which the learning rate rises; by default 10, or a tenth of all.
        weight_decay: of matrices, as in AdamW.
        clip: gradients are clipped to this norm.
        max_seq_len: tokens of an example; longer dialogs are cut off, longer texts divided.
        lora_rank: rows of an adapter's matrix A.
        lora_alpha: an adapter is multiplied by lora_alpha / lora_rank.
        lora_matrices: the matrices that get an adapter.
        recompute: save fewer activations for the backward pass, and compute them again there.
        save_every: steps after which the state is saved.
        dtype: bf16 or fp32, that matrices are multiplied in; by default bf16 where the hardware has
            it. All weights that are learned are fp32.
        device: cuda, mps or cpu; by default the first of these that is available.
        seed: of the order of examples and of a new adapter.
        force: begin anew, whatever is in OUT; the result there stays until the new one is complete.
    """
    options = dict(locals())
    from llama.training import finetune

    finetune.finetune(**options)
