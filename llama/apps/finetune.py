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

    A run that was interrupted (Ctrl-C) continues from there when the same command is given again,
    one that was killed from its last save; the result is the same as without the interruption. OUT
    gets log.jsonl, loss.png and the result.

    Args:
        data: a text file, or .jsonl with {"messages": [{"role": ..., "content": ...}, ...]} or
            {"text": ...} on each line. Of dialogs, only the assistant's tokens are learned.
        out: a directory for the result.
        ckpt_dir: any checkpoint.
        tokenizer_path: found with the checkpoint by default.
        method: lora, or full for all weights.
        to: adapter (PEFT's layout, the default for lora), hf (the default for full), meta or gguf.
        held_out: number of examples, the last ones, that are evaluated instead of learned.
        epochs: passes over all examples.
        batch_size: examples in a step.
        micro_batches: forward passes that a step is divided into (gradient accumulation), for less
            memory; the result is the same.
        learning_rate: the peak, reached after warmup_steps; then it decays to 0 by a cosine. By
            default 1e-3 for lora, 1e-4 for full.
        warmup_steps: steps in which the learning rate rises; by default 10, or a tenth of all.
        weight_decay: of matrices, as in AdamW.
        clip: gradients are clipped to this norm.
        max_seq_len: tokens of an example; a longer dialog is truncated, a longer text split.
        lora_rank: rank of the adapter's matrices.
        lora_alpha: the adapter is multiplied by lora_alpha / lora_rank.
        lora_matrices: the matrices it is added to, some of wq, wk, wv, wo, w1, w2, w3 or, by the
            names of Hugging Face, q_proj, k_proj, v_proj, o_proj, gate_proj, down_proj, up_proj.
        recompute: activation checkpointing: save less for the backward pass and recompute it there.
            Takes 18 to 38 % more time.
        save_every: steps between saves of the state.
        dtype: bf16 or fp32, for matrix products; by default bf16 where the hardware has it. All
            weights that are learned are fp32.
        device: cuda, mps or cpu; by default the first of these that is available.
        seed: of the order of examples and of a new adapter.
        force: start over, whatever is in OUT; its result stays until the new one is complete.
    """
    options = dict(locals())
    from llama.apps import finetuning

    finetuning.finetune(**options)
