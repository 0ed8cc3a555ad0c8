"""What `llama finetune` does: from data and a checkpoint to a result."""

import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from tqdm import tqdm

from llama import checkpoint
from llama.apps import plot
from llama.backends.build import open_checkpoint, open_tokenizer, say
from llama.checkpoint import remote
from llama.layers import parallel
from llama.text.templates import chat_format
from llama.training import Recipe, Trainer, lora, read_examples, run, trained


def finetune(
    *,
    data: str,
    out: str,
    ckpt_dir: str,
    tokenizer_path: Optional[str],
    method: str,
    to: Optional[str],
    held_out: int,
    epochs: int,
    batch_size: int,
    micro_batches: int,
    learning_rate: Optional[float],
    warmup_steps: Optional[int],
    weight_decay: float,
    clip: float,
    max_seq_len: int,
    lora_rank: int,
    lora_alpha: float,
    lora_matrices: str,
    recompute: bool,
    save_every: int,
    dtype: Optional[str],
    device: Optional[str],
    seed: int,
    force: bool,
) -> None:
    """Run or resume a fine-tuning run; `llama finetune --help` says what each option means."""
    to = run.check_options(method, to, max_seq_len, save_every, held_out)
    torch_device = parallel.initialize(device=device)
    low = parallel.pick_dtype(dtype, torch_device)
    if learning_rate is None:
        learning_rate = 1e-3 if method == "lora" else 1e-4
    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, micro_batches=micro_batches,
        learning_rate=learning_rate, warmup_steps=warmup_steps or 0, weight_decay=weight_decay,
        clip=clip, seed=seed, dtype=low,
    )  # fmt: skip
    adapter: Optional[Dict[str, Any]] = None
    if method == "lora":
        matrices = lora.matrix_names(lora_matrices.split(","))
        adapter = dict(rank=lora_rank, alpha=lora_alpha, matrices=matrices, seed=seed)

    source, folder = open_checkpoint(ckpt_dir), Path(out)
    if not force:
        _draw_what_is_missing(folder)
    result = run.check_folder(folder, to, source.path, force)
    found_tokenizer = tokenizer_path or source.tokenizer_path
    tokens_from = remote.local_path(found_tokenizer) if found_tokenizer else None
    tokenizer = open_tokenizer(source, tokens_from)
    formatter = chat_format(tokenizer, source.args.use_scaled_rope)
    examples = read_examples(data, tokenizer, formatter, max_seq_len)
    learned, kept = run.split(examples.rows, held_out)
    if warmup_steps is None:
        steps = epochs * -(-len(learned) // batch_size)
        recipe = replace(recipe, warmup_steps=min(10, steps // 10))

    args = replace(source.args, max_seq_len=max_seq_len, max_batch_size=1)
    model = run.load_model(source, args, low, torch_device, adapter, recompute)
    trainer = Trainer(model, learned, recipe)
    n = sum(part.parameter.numel() for part in trained(model))
    say(f"{len(learned)} examples to learn from, {held_out} held out, {trainer.steps} steps; "
        f"{n:,} values to learn on each of {parallel.world_size()} rank(s)")  # fmt: skip
    if examples.cut:
        say(f"{examples.cut} dialogs were cut to {max_seq_len} tokens; {examples.dropped} left out")

    about: Dict[str, Any] = {"base": checkpoint.fingerprint(source), "method": method}
    if adapter:
        about["lora"] = [lora_rank, lora_alpha, matrices]
    with _interrupts() as interrupts:
        run.resume(trainer, folder, about, force)
        if trainer.step:
            say(f"going on after step {trainer.step}")
        _show(trainer, run.learn(trainer, kept, folder, about, save_every, lambda: any(interrupts)))
    if trainer.step < trainer.steps:
        again = "the same command" + ", without --force," * force
        raise KeyboardInterrupt(
            f"interrupted after step {trainer.step}: {again} goes on from there"
        )

    # A run that is interrupted from here on has its last state, and finishes when started again.
    run.write_result(
        model, source, to, result, base=str(ckpt_dir), dtype=low, tokenizer_path=tokens_from
    )
    if parallel.is_rank_zero():
        if not plot.draw(folder):
            say(f"no loss.png: {plot.NEEDED}, then llama plot {folder}")
        run.remove_state(folder)
    say(f"written: {result}")


@contextmanager
def _interrupts() -> Iterator[List[int]]:
    """Ctrl-C ends a step later, with the state saved: the signals that came."""
    found: List[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, previous)


def _show(trainer: Trainer, lines: Iterator[Dict[str, Any]]) -> None:
    """A progress bar for the steps, and a line for each held-out loss, on stderr from one rank."""
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
    missing = run.finished(folder) and not (folder / "loss.png").exists()
    drawable = missing and (folder / "log.jsonl").exists() and parallel.is_rank_zero()
    if drawable and plot.draw(folder):
        say(f"written: {folder / 'loss.png'}")
