"""A fine-tuning run in a directory: the checks before it, its steps, log and state, its result.

The directory holds log.jsonl and the state of the last save, which the result takes the place of.
So a run that was interrupted or killed continues from there when it is started again.
"""

import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from llama import checkpoint
from llama.backends import memory
from llama.backends.build import prepare
from llama.checkpoint import Checkpoint, convert
from llama.checkpoint.adapter import Adapter, Merged, write_adapter
from llama.checkpoint.shapes import check_shapes
from llama.families import llama4_vision_files
from llama.families.registry import build
from llama.families.vision import OF_IMAGES
from llama.layers import parallel
from llama.model import ModelArgs, Transformer
from llama.text.files import beside, check_plain, read_object, read_text, recovered, remove
from llama.training import devices, lora, saved
from llama.training.data import Example
from llama.training.gradients import origin, shard_of
from llama.training.trainer import Step, Trainer, recompute_blocks

RESULTS = {"adapter": "adapter", "hf": "model", "meta": "model", "gguf": "model.gguf"}


def check_options(
    method: str, to: Optional[str], max_seq_len: int, save_every: int, held_out: int
) -> str:
    """The format of the result, by the method if `to` is None.

    Raises:
        ValueError: an unknown method or format, or a number out of range.
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
    return to


def check_folder(folder: Path, to: str, source: Path, force: bool) -> Path:
    """The path of the result, where it will be possible to write it in the end.

    Raises:
        FileExistsError: there is a result, without `force`, or a directory of other things; or a
            file in the folder's place.
        ValueError: the base model is there.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise FileExistsError(f"{there} is a file: --out is a directory, which takes another name")
    if parallel.is_rank_zero():
        recovered(folder / "state")
    devices.wait()
    done = finished(folder)
    if done and not force:
        raise FileExistsError(f"{done} exists, this run is done: another --out, or --force")
    here = source.resolve()
    for path in results(folder):  # which all give way to the new one
        if path.resolve() in (here, *here.parents):
            raise ValueError(f"{path} holds the model itself that is to be learned: another --out")
        check_plain(path)
        names = {file.name for file in path.iterdir()} if path.is_dir() else set()
        if names and not names & {"adapter_config.json", "config.json", "params.json"}:
            raise FileExistsError(f"{path} holds no model or adapter: another --out")
    return folder / RESULTS[to]


def results(folder: Path) -> List[Path]:
    """The results in a folder, of any kind."""
    paths = (folder / name for name in sorted(set(RESULTS.values())))
    return [path for path in paths if path.exists()]


def finished(folder: Path) -> Optional[Path]:
    """The result of a finished run. With a state beside it, it's that of the run before."""
    return None if (folder / "state").exists() else next(iter(results(folder)), None)


def check_memory(
    args: ModelArgs, method: str, low: torch.dtype, device: torch.device, shard: bool = False
) -> None:
    """Weights, and for all that is learned a gradient and two moments, in fp32; on a GPU, AdamW
    computes with one more copy.

    Args:
        shard: the copies of the model divide them among themselves.

    Raises:
        ValueError: more than there is.
    """
    world = parallel.world_size()
    dtype, copies = (low, 1) if method == "lora" else (torch.float32, 4)
    copies += method != "lora" and device.type == "cuda"
    need = copies * memory.estimate(args, world, dtype).weights
    need //= devices.copies() if shard else 1
    have = memory.available(device) // memory.sharers(device)
    if need > have:
        way = "--dtype bf16" if method == "lora" else "--method lora"
        raise ValueError(
            f"this can't fit: {memory.size(need)} for --method {method}, and {memory.size(have)} "
            f"available on {device}. Ways out: {way}, or more ranks on more devices"
        )


def split(rows: List[Example], held_out: int) -> Tuple[List[Example], List[Example]]:
    """Examples to learn from, and the last ones, which are held out.

    Raises:
        ValueError: none left to learn from.
    """
    if held_out >= len(rows):
        raise ValueError(
            f"--held_out={held_out} of {len(rows)} examples leaves none to learn from: at most "
            f"{len(rows) - 1} can be held out"
        )
    return rows[: len(rows) - held_out], rows[len(rows) - held_out :]


def load_model(
    source: Checkpoint,
    args: ModelArgs,
    low: torch.dtype,
    device: torch.device,
    adapter: Optional[Dict[str, Any]],
    recompute: bool,
    shard: bool = False,
) -> Transformer:
    """The model to be learned: all of it in fp32, or frozen in `low` with a new adapter.

    Args:
        adapter: arguments of `lora.fresh`, or None to learn all weights but those of images.
        shard: divide it over its copies, of which no rank ever holds a whole one.
    """
    shard = shard and devices.copies() > 1
    check_memory(args, "lora" if adapter else "full", low, device, shard)
    dtype = low if adapter else torch.float32
    if shard:
        model = build(args, device="meta", dtype=dtype)
    else:
        model = prepare(source, args, device=device, dtype=dtype, compile=False)
    new = None
    if adapter:
        model.requires_grad_(False)
        new = lora.fresh(model, **adapter)
        lora.attach(model, new)
    else:
        for name, parameter in model.named_parameters():
            of_images = name.startswith((*OF_IMAGES, *llama4_vision_files.PREFIXES))
            parameter.requires_grad_(not of_images)  # examples are texts
    if recompute:
        recompute_blocks(model)
    if shard:
        devices.shard(model, device)
        fill(model, source, new, device)
    return model


@torch.no_grad()
def fill(
    model: Transformer, source: Checkpoint, adapter: Optional[Adapter], device: torch.device
) -> None:
    """This rank's share of the weights, and of the adapter, of a model on the meta device."""
    check_shapes(source)
    model.to_empty(device=device)
    if model.params.tied_embeddings:
        model.output.weight = model.tok_embeddings.weight
    for name, parameter in model.named_parameters():
        weight, half = origin(name)
        for (begin, *column), mine, _ in saved.whole(
            parameter.zero_(), shard_of(name), model.params
        ).chunks:
            if adapter and half:
                data = getattr(adapter.pairs[weight], half)[begin : begin + len(mine)]
            else:
                data = source.read(weight, 0, begin, begin + len(mine))
            if column:
                data = data.narrow(1, column[0], mine.shape[1])
            mine.copy_(data)


def began(folder: Path, force: bool) -> str:
    """When the run began, in ISO format: an interrupted one, or with `force` a new one, now.

    Chat templates that write the date write that one, or a run that goes on another day would
    learn from other examples.
    """
    about = folder / "state" / "about.json"
    found = {} if force or not about.exists() else read_object(about)
    return str(devices.agreed(found.get("began") or datetime.now().isoformat(timespec="seconds")))


def resume(trainer: Trainer, folder: Path, about: Dict[str, Any], force: bool) -> None:
    """Load the state that an interrupted run left; with `force`, empty it.

    An empty one says that the result beside it, if there is one, is of the run before.

    Raises:
        ValueError: it is of another run, by what differs.
    """
    state = folder / "state"
    if force and parallel.is_rank_zero():
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
    devices.wait()
    if (state / "about.json").exists():
        trainer.load(state, about)


def learn(
    trainer: Trainer,
    held_out: Sequence[Example],
    folder: Path,
    about: Dict[str, Any],
    save_every: int,
    should_stop: Callable[[], bool],
    tensorboard: bool = False,
) -> Iterator[Dict[str, Any]]:
    """Take the steps that are left; yields each line of log.jsonl: of a step, or a held-out loss.

    Args:
        about: see `Trainer.save`.
        should_stop: asked after each step, on all ranks; True on rank 0 saves and ends.
        tensorboard: see `Log`.
    """
    log = Log(folder / "log.jsonl", trainer.step, tensorboard)
    if held_out and not trainer.step:
        yield log.write({"step": 0, "held_out_loss": trainer.loss(held_out)})
    for step in trainer.run():
        yield log.write(described(step))
        if held_out and trainer.step % trainer.per_epoch == 0:
            yield log.write({"step": step.step, "held_out_loss": trainer.loss(held_out)})
        stop = devices.agreed(should_stop())
        if stop or trainer.step % save_every == 0 or trainer.step == trainer.steps:
            trainer.save(folder / "state", about)
        if stop:
            return


def described(step: Step) -> Dict[str, Any]:
    """A line of the log."""
    rounded = {name: float(f"{value:.6g}") for name, value in step._asdict().items()}
    return {**rounded, "step": step.step, "tokens": step.tokens}


class Log:
    """log.jsonl, one line for each step or held-out loss. Lines later than `step` are removed.

    Args:
        tensorboard: the same values go into event files beside it, in a directory of that name.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool = False):
        self.path, self.events = path, None
        if parallel.is_rank_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(path) if line["step"] <= step] if step else []
            with beside(path, force=True) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            if tensorboard:
                self.events = event_files()(path.parent / "tensorboard", purge_step=step + 1)

    def write(self, line: Dict[str, Any]) -> Dict[str, Any]:
        if parallel.is_rank_zero():
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.events is not None:
            for name, value in line.items():
                if name != "step":
                    self.events.add_scalar(name, value, line["step"])
            self.events.flush()
        return line


def event_files() -> Any:
    """torch's SummaryWriter.

    Raises:
        ValueError: TensorBoard isn't installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs pip install 'llama-reference[train]'") from None
    return SummaryWriter


def read_log(path: Path) -> List[Dict[str, Any]]:
    """The lines of a log, which may be missing; a killed run may have left half of the last one.

    Raises:
        ValueError: another line is damaged.
    """
    text, found = read_text(path) if path.exists() else "", []
    for number, line in enumerate(text.rpartition("\n")[0].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number} is damaged: take it out") from None
    return found


def write_result(
    model: Transformer,
    source: Checkpoint,
    to: str,
    path: Path,
    *,
    base: str,
    dtype: torch.dtype,
    tokenizer_path: Optional[Path],
) -> None:
    """Write what was learned of `source`, as an adapter or a whole model; called on all ranks."""
    if not lora.names(model):  # with the base's own max_seq_len
        source = replace(checkpoint.gather(model), args=source.args)
    else:
        adapter = lora.adapter_of(model, "default")
        source = Merged(source, adapter)
    if not parallel.is_rank_zero():
        return
    if to == "adapter":
        write_adapter(adapter, path, source.args, base, force=True)
    else:
        convert.convert(source, path, to, dtype=dtype, tokenizer_path=tokenizer_path, force=True)


def finish(folder: Path, result: Path) -> None:
    """The run is done: remove results of other kinds, which are of a run before, and its state.

    The state is renamed first, as half of one couldn't be read.
    """
    for path in results(folder):
        if path != result:
            remove(path)
    done = folder / ".state.done"
    shutil.rmtree(done, ignore_errors=True)
    (folder / "state").rename(done)
    shutil.rmtree(done)
