"""`llama finetune`: all weights or a LoRA adapter, on dialogs or texts, on any number of ranks."""

import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Literal, Optional

from tqdm import tqdm

if TYPE_CHECKING:
    from llama.training import Trainer


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
    lora_dropout: float = 0.0,
    pack: bool = False,
    model_parallel_size: Optional[int] = None,
    shard: bool = True,
    recompute: bool = False,
    save_every: int = 50,
    tensorboard: bool = False,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
    seed: int = 1,
    force: bool = False,
) -> None:
    """Fine-tune a model, all of its weights or a LoRA adapter, on dialogs or texts.

    A run that was interrupted (Ctrl-C, after the step; a second one doesn't wait for it) continues
    from there when the same command is given again, one that was killed from its last save; the
    result is the same as without the interruption. OUT gets log.jsonl, loss.png and the result.

    Args:
        data: a text file, or .jsonl with {"messages": [{"role": ..., "content": ...}, ...]} or
            {"text": ...} on each line; "tools" may stand beside messages. Of dialogs, only the
            assistant's tokens are learned.
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
        lora_dropout: probability that an input of the adapter is dropped in a step.
        pack: put short examples into a row together, which saves padding; the result is the same.
        model_parallel_size: ranks that share a copy of the model, all by default. With fewer, there
            are several copies, which learn from different examples of a step.
        shard: divide weights, gradients and optimizer over the copies (FSDP2), for memory; or keep
            each copy whole (DDP), which sends less.
        recompute: activation checkpointing: save less for the backward pass and recompute it there.
            Takes 18 to 38 % more time.
        save_every: steps between saves of the state.
        tensorboard: write the log for TensorBoard, too, into OUT/tensorboard.
        dtype: bf16 or fp32, for matrix products, and for the weights of a whole model that is
            written; by default bf16 where the hardware has it. What is learned is fp32 meanwhile.
        device: cuda, mps or cpu; by default the first of these that is available.
        seed: of the order of examples and of a new adapter.
        force: start over, whatever is in OUT; its result stays until the new one is complete.
    """
    from llama import checkpoint
    from llama.apps import plot
    from llama.backends.build import open_checkpoint, open_tokenizer, say
    from llama.checkpoint import remote
    from llama.layers import parallel
    from llama.text.templates import TemplateFormat, chat_format
    from llama.training import Recipe, Trainer, devices, lora, read_examples, run, trained
    from llama.training.packing import check_packable

    kind = run.check_options(method, to, max_seq_len, save_every, held_out)
    if tensorboard:
        run.event_files()
    of_lora = dict(lora_rank=lora_rank, lora_alpha=lora_alpha, lora_matrices=lora_matrices,
                   lora_dropout=lora_dropout)  # fmt: skip
    for name, value in of_lora.items():
        if method != "lora" and value != (finetune.__kwdefaults__ or {})[name]:
            raise ValueError(f"--{name}={value} is for --method lora")
    torch_device = parallel.initialize(model_parallel_size, device)
    low = parallel.pick_dtype(dtype, torch_device)
    if learning_rate is None:
        learning_rate = 1e-3 if method == "lora" else 1e-4
    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, micro_batches=micro_batches,
        learning_rate=learning_rate, warmup_steps=warmup_steps or 0, weight_decay=weight_decay,
        clip=clip, lora_dropout=lora_dropout, seed=seed, dtype=low,
    )  # fmt: skip
    adapter: Optional[Dict[str, Any]] = None
    if method == "lora":
        matrices = lora.matrix_names(lora_matrices.split(","))
        adapter = dict(rank=lora_rank, alpha=lora_alpha, matrices=matrices, seed=seed)

    source, folder = open_checkpoint(ckpt_dir), Path(out)
    if pack:
        check_packable(source.args)
    if not force:
        _draw_what_is_missing(folder)
    result = run.check_folder(folder, kind, source.path, force)
    found_tokenizer = tokenizer_path or source.tokenizer_path
    tokens_from = remote.local_path(found_tokenizer) if found_tokenizer else None
    tokenizer = open_tokenizer(source, tokens_from)
    formatter = chat_format(tokenizer, source.args.use_scaled_rope)
    began = run.began(folder, force)
    if isinstance(formatter, TemplateFormat):
        formatter.clock = partial(datetime.fromisoformat, began)
    examples = read_examples(data, tokenizer, formatter, max_seq_len)
    learned, kept = run.split(examples.rows, held_out)
    if warmup_steps is None:
        steps = epochs * -(-len(learned) // batch_size)
        recipe = replace(recipe, warmup_steps=min(10, steps // 10))

    args = replace(source.args, max_seq_len=max_seq_len, max_batch_size=1)
    model = run.load_model(source, args, low, torch_device, adapter, recompute, shard)
    trainer = Trainer(model, learned, recipe, pack)
    n = sum(devices.local(part.parameter).numel() for part in trained(model))
    ranks = f"{parallel.world_size()} rank(s)" + f" x {devices.copies()}" * (devices.copies() > 1)
    say(f"{len(learned)} examples to learn from, {held_out} held out, {trainer.steps} steps; "
        f"{n:,} values to learn on each of {ranks}")  # fmt: skip
    if recipe.warmup_steps > trainer.steps:
        say(f"note: {trainer.steps} steps end within --warmup-steps={recipe.warmup_steps}: the "
            f"learning rate never reaches {learning_rate:g}")  # fmt: skip
    if max_seq_len > source.args.max_seq_len:
        say(f"note: {ckpt_dir} was trained for {source.args.max_seq_len} tokens at most")
    if examples.cut:
        say(f"{examples.cut} dialogs were cut to {max_seq_len} tokens; {examples.dropped} left out")

    about: Dict[str, Any] = {
        "base": checkpoint.fingerprint(source),
        "method": method,
        "began": began,
    }
    if adapter:
        about["lora"] = [lora_rank, lora_alpha, matrices]
    with _interrupts() as interrupts:
        run.resume(trainer, folder, about, force)
        if trainer.step:
            say(f"going on after step {trainer.step}")
        lines = run.learn(
            trainer, kept, folder, about, save_every, lambda: any(interrupts), tensorboard
        )
        _show(trainer, lines)
    if trainer.step < trainer.steps:
        again = "the same command" + ", without --force," * force
        raise KeyboardInterrupt(
            f"interrupted after step {trainer.step}: {again} goes on from there"
        )

    # A run that is interrupted from here on has its last state, and finishes when started again.
    run.write_result(
        model, source, kind, result, base=str(ckpt_dir), dtype=low, tokenizer_path=tokens_from
    )
    if parallel.is_rank_zero():
        if not plot.draw(folder):
            say(f"no loss.png: {plot.NEEDED}, then llama plot {folder}")
        run.finish(folder, result)
    say(f"written: {result}")


@contextmanager
def _interrupts() -> Iterator[List[float]]:
    """Ctrl-C ends a step later, with the state saved: when the signals came. Another one, unless it
    comes at once, as copies by launchers do, doesn't wait for the step."""
    found: List[float] = []

    def note(number: int, frame: Any) -> None:
        found.append(time.monotonic())
        if found[-1] - found[0] > 1:
            raise KeyboardInterrupt(
                "interrupted: without --force, the same command goes on from the last save"
            )

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, previous)


def _show(trainer: "Trainer", lines: Iterator[Dict[str, Any]]) -> None:
    """A progress bar for the steps, and a line for each held-out loss, on stderr from one rank."""
    from llama.layers import parallel

    hidden = None if parallel.is_rank_zero() else True
    bar = tqdm(total=trainer.steps, initial=trainer.step, unit="step", disable=hidden)
    for line in lines:
        if "loss" in line:
            speed = line["tokens"] / line["seconds"]
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:.0f} tok/s")
            bar.update()
        elif parallel.is_rank_zero():
            text = f"step {line['step']}: held-out loss {line['held_out_loss']:.4f}"
            tqdm.write(text, file=sys.stderr)
    bar.close()


def _draw_what_is_missing(folder: Path) -> None:
    """The picture of a finished run that had no matplotlib then."""
    from llama.apps import plot
    from llama.backends.build import say
    from llama.layers import parallel
    from llama.training import run

    missing = run.finished(folder) and not (folder / "loss.png").exists()
    drawable = missing and (folder / "log.jsonl").exists() and parallel.is_rank_zero()
    if drawable and plot.draw(folder):
        say(f"written: {folder / 'loss.png'}")
