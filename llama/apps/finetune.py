"""Fine-tune a model on dialogs or texts.

llama finetune datasets/lighthouse.jsonl --out runs/lighthouse
torchrun --nproc_per_node 2 -m llama.apps.finetune datasets/lighthouse.jsonl --out runs/two
"""

import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from tqdm import tqdm

from llama import checkpoint
from llama.apps import cli
from llama.backends import memory
from llama.backends.build import open_checkpoint, open_tokenizer, prepare, say
from llama.checkpoint import convert, remote
from llama.checkpoint.adapter import Merged, write_adapter
from llama.layers import parallel
from llama.text.files import beside, check_plain, recovered
from llama.text.templates import chat_format
from llama.training import (
    Example,
    Recipe,
    Step,
    Trainer,
    lora,
    read_examples,
    recompute_blocks,
    trained,
)

RESULTS = {"adapter": "adapter", "hf": "model", "meta": "model", "gguf": "model.gguf"}


def main(
    data: str,
    out: str,
    ckpt_dir: str = "checkpoints/SmolLM2-135M-Instruct",
    tokenizer_path: Optional[str] = None,
    method: str = "lora",
    to: Optional[str] = None,
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
    lora_matrices: str = ",".join(lora.MATRICES),
    recompute: bool = False,
    save_every: int = 50,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
    seed: int = 1,
    force: bool = False,
):
    """Fine-tune a model, all of its weights or a LoRA adapter, on dialogs or texts.

    What is interrupted (Ctrl-C) or killed goes on where it stopped when the same command is given
    again, and ends with the same weights. OUT gets log.jsonl, loss.png and the result.

    Args:
        data: a text file, or .jsonl with {"messages": [{"role": ..., "content": ...}, ...]} or
            {"text": ...} in each line. Of dialogs, the assistant's tokens are learned.
        out: a directory for the result.
        ckpt_dir: any checkpoint.
        tokenizer_path: found with the checkpoint by default.
        method: lora, or full for all weights.
        to: adapter (PEFT's layout, the default for lora), hf (the default for full), meta or gguf.
        held_out: the last so many examples aren't learned; the loss on them is what is reported.
        epochs: times that each example is learned.
        batch_size: examples in a step.
        micro_batches: passes that a step is divided into, for less memory; the result is the same.
        learning_rate: the highest, reached after warmup_steps; from there a cosine goes to 0. By
            default 1e-3 for lora, 1e-4 for full.
        warmup_steps: steps in which the learning rate rises; by default 10, or a tenth of all.
        weight_decay: of matrices, as in AdamW.
        clip: the norm that a step's gradient is cut to.
        max_seq_len: tokens of an example; what is beyond is cut off, or another row of a text.
        lora_rank: rows of an adapter's matrix A.
        lora_alpha: an adapter is multiplied by lora_alpha / lora_rank.
        lora_matrices: which of wq, wk, wv, wo, w1, w2, w3 it adds to.
        recompute: keep less for the backward pass, and compute it again there.
        save_every: steps after which the state is saved.
        dtype: bf16 or fp32, that matrices are multiplied in; by default bf16 where the hardware has
            it. All weights that are learned are fp32.
        device: cuda, mps or cpu; by default the first of these that there is.
        seed: of the order of examples and of a new adapter.
        force: begin anew, whatever is in OUT; the result there stays until the new one is complete.
    """
    if method not in ("lora", "full"):
        raise ValueError(f"--method={method!r}: choose lora or full")
    to = to or ("adapter" if method == "lora" else "hf")
    if to not in RESULTS or (to == "adapter" and method == "full"):
        raise ValueError(
            f"--to={to!r} with --method={method}: choose hf, meta or gguf, or for lora adapter"
        )
    if max_seq_len < 2 or save_every < 1 or held_out < 0:
        raise ValueError(
            f"--max_seq_len={max_seq_len} from 2, --save_every={save_every} from 1, "
            f"--held_out={held_out} from 0 up"
        )
    torch_device = parallel.initialize(device=device)
    low = parallel.pick_dtype(dtype, torch_device)
    if learning_rate is None:
        learning_rate = 1e-3 if method == "lora" else 1e-4
    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, micro_batches=micro_batches,
        learning_rate=learning_rate, warmup_steps=warmup_steps or 0, weight_decay=weight_decay,
        clip=clip, seed=seed, dtype=low,
    )  # fmt: skip

    source = open_checkpoint(ckpt_dir)
    folder = Path(out)
    result = _check_out(folder, RESULTS[to], source.path, force)
    tokens_from = tokenizer_path or source.tokenizer_path
    tokens_from = remote.local_path(tokens_from) if tokens_from else None
    tokenizer = open_tokenizer(source, tokens_from)
    formatter = chat_format(tokenizer, source.args.use_scaled_rope)
    examples = read_examples(data, tokenizer, formatter, max_seq_len)
    if held_out >= len(examples.rows):
        raise ValueError(f"--held_out={held_out} of {len(examples.rows)} examples leaves none")
    cut = len(examples.rows) - held_out
    learned, kept = examples.rows[:cut], examples.rows[cut:]
    if warmup_steps is None:
        steps = epochs * -(-len(learned) // batch_size)
        recipe = replace(recipe, warmup_steps=min(10, steps // 10))

    args = replace(source.args, max_seq_len=max_seq_len, max_batch_size=1)
    _check_memory(args, method, low, torch_device)
    frozen = low if method == "lora" else torch.float32
    model = prepare(source, args, device=torch_device, dtype=frozen)
    if method == "lora":
        matrices = [name.strip() for name in lora_matrices.split(",")]
        model.requires_grad_(False)
        lora.attach(model, lora.fresh(model, lora_rank, lora_alpha, matrices, seed))
    if recompute:
        recompute_blocks(model)
    trainer = Trainer(model, learned, recipe)
    n = sum(part.parameter.numel() for part in trained(model))
    say(f"{len(learned)} examples to learn from, {held_out} held out, {trainer.steps} steps; "
        f"{n:,} values to learn on each of {parallel.world_size()} rank(s)")  # fmt: skip
    if examples.cut:
        say(f"{examples.cut} dialogs were cut to {max_seq_len} tokens; {examples.dropped} left out")

    about: Dict[str, Any] = {"base": checkpoint.fingerprint(source), "method": method}
    if method == "lora":
        about["lora"] = [lora_rank, lora_alpha, matrices]
    learn(trainer, kept, folder, about, save_every, force)

    # From here on a run that is broken off has its last state, and ends when it is started again.
    if method == "full":  # with the base's own max_seq_len
        source = replace(checkpoint.gather(model), args=source.args)
    else:
        adapter = lora.adapter_of(model, "default")
        source = Merged(source, adapter)
    if parallel.is_rank_zero():
        if to == "adapter":
            write_adapter(adapter, result, args, str(ckpt_dir), force=True)
        else:
            convert.convert(source, result, to, dtype=low, tokenizer_path=tokens_from, force=True)
        plot(folder)
        done = folder / ".state.done"
        shutil.rmtree(done, ignore_errors=True)
        (folder / "state").rename(done)  # at once: half of a state couldn't be read
        shutil.rmtree(done)
    say(f"written: {result}")


def _check_out(folder: Path, name: str, source: Path, force: bool) -> Path:
    """The place of the result, into which it must be possible to write it in the end."""
    if parallel.is_rank_zero():
        recovered(folder / "state")
    parallel.barrier()
    done = [folder / other for other in set(RESULTS.values()) if (folder / other).exists()]
    if done and not force and not (folder / "state").exists():  # a state: a forced run broke off
        raise FileExistsError(f"{done[0]} exists, this run is done: another --out, or --force")
    result, here = folder / name, source.resolve()
    check_plain(result)
    if result.exists() and result.resolve() in (here, *here.parents):
        raise ValueError(f"{result} holds the model itself that is to be learned: another --out")
    return result


def learn(
    trainer: Trainer,
    kept: List[Example],
    folder: Path,
    about: Dict[str, Any],
    save_every: int,
    force: bool,
) -> None:
    """All steps that are left, with what is said, logged and saved of them."""
    asked_to_stop: List[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: asked_to_stop.append(number))
    try:
        state = folder / "state"
        if force and parallel.is_rank_zero():
            shutil.rmtree(state, ignore_errors=True)
        parallel.barrier()
        if state.exists():
            trainer.load(state, about)
            say(f"going on after step {trainer.step}")
        log = Log(folder / "log.jsonl", trainer.step)
        if kept and not trainer.step:
            log.write({"step": 0, "held_out_loss": trainer.loss(kept)})
        bar = tqdm(
            total=trainer.steps, initial=trainer.step, unit="step",
            disable=None if parallel.is_rank_zero() else True,
        )  # fmt: skip
        for step in trainer.run():
            log.write(described(step))
            bar.set_postfix_str(f"loss {step.loss:.3f}, {step.tokens / step.seconds:.0f} tok/s")
            bar.update()
            if kept and trainer.step % trainer.per_epoch == 0:
                log.write({"step": step.step, "held_out_loss": trainer.loss(kept)})
            stop = parallel.broadcast_object(bool(asked_to_stop))
            if stop or trainer.step % save_every == 0 or trainer.step == trainer.steps:
                trainer.save(state, about)
            if stop:
                again = "the same command" + ", without --force," * force
                sys.exit(f"interrupted after step {trainer.step}: {again} goes on from there")
        bar.close()
    finally:
        signal.signal(signal.SIGINT, previous)


def described(step: Step) -> Dict[str, Any]:
    rounded = {name: float(f"{value:.6g}") for name, value in step._asdict().items()}
    return {**rounded, "step": step.step, "tokens": step.tokens}


class Log:
    """log.jsonl, one line for each step or held-out loss; what is beyond a state is forgotten."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if parallel.is_rank_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text() if path.exists() and step else ""
            lines = text.rpartition("\n")[0].splitlines()  # a killed run may leave half a line
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            with beside(path, force=True) as partial:
                partial.write_text("".join(line + "\n" for line in kept))

    def write(self, line: Dict[str, Any]) -> None:
        if parallel.is_rank_zero():
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if "held_out_loss" in line:
                text = f"step {line['step']}: held-out loss {line['held_out_loss']:.4f}"
                tqdm.write(text, file=sys.stderr)


def plot(folder: Path) -> None:
    """loss.png, where there is matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no loss.png: pip install matplotlib (pip install -e '.[train]')")
        return
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for key, label, style in (("loss", "learned", "-"), ("held_out_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")


def _check_memory(args, method: str, low: torch.dtype, device: torch.device) -> None:
    """Weights, and for all that is learned a gradient and two moments, in fp32."""
    world = parallel.world_size()
    dtype, copies = (low, 1) if method == "lora" else (torch.float32, 4)
    need = copies * memory.estimate(args, world, dtype).weights
    have = memory.available(device) // memory.sharers(device)
    if need > have:
        way = "--dtype bf16" if method == "lora" else "--method lora"
        raise ValueError(
            f"this can't fit: {memory.size(need)} for --method {method}, and {memory.size(have)} "
            f"available on {device}. Ways out: {way}, or more ranks on more devices"
        )


if __name__ == "__main__":
    cli.run(main, sys.argv[1:], "finetune.py")
