"""The training loop: steps and saved states.

A run is a function of the weights, the examples and the recipe: the order of examples, the learning
rate and what is dropped follow from the step's number. So a resumed run is bit-identical to an
uninterrupted one (on a CPU, with the same number of threads and ranks), and one on another number
of ranks differs by the rounding of sums.
"""

import hashlib
import json
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from llama.layers import parallel
from llama.layers.ids import check_ids
from llama.layers.revision import changed
from llama.model import Transformer
from llama.text.files import beside, read_object, write_json
from llama.training import devices, lora, saved
from llama.training.data import Example, order
from llama.training.dropout import Dropout, number
from llama.training.gradients import clip_gradients, sum_replicas, trained
from llama.training.losses import summed_loss
from llama.training.packing import Pass, check_packable, packed, plain


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run.

    Raises:
        ValueError: a number out of range.
    """

    epochs: int = 3
    batch_size: int = 8  # examples in a step
    micro_batches: int = 1  # forward passes of a step, whose gradients are accumulated
    learning_rate: float = 2e-4  # the peak
    warmup_steps: int = 10  # of linear warm-up from 0; then cosine decay to 0
    weight_decay: float = 0.0
    clip: float = 1.0  # gradients are clipped to this norm
    lora_dropout: float = 0.0  # the probability that an input of an adapter is dropped
    seed: int = 1  # of the order of examples, and of what is dropped
    dtype: torch.dtype = torch.float32  # of matrix products (autocast); weights keep their own

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batches", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be from 0 to less than 1")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size={self.batch_size} can't be divided into {self.micro_batches} passes"
            )
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{self.dtype}: small gradients would be lost; choose bf16 or fp32")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, of 0 to steps - 1."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


def recompute_blocks(model: Transformer, on: bool = True) -> None:
    """Activation checkpointing: save only each block's input for the backward pass, and recompute
    the other activations there. Takes 18 to 38 % more time (measured on a model of 135M).

    Source: Training deep nets with sublinear memory cost, arXiv 1604.06174.
    """
    for block in model.layers:
        block.__dict__.pop("forward", None)
        if on:
            forward = partial(recompute, block.forward, use_reentrant=False)
            setattr(block, "forward", forward)  # noqa: B010


class Step(NamedTuple):
    """Metrics of a step."""

    step: int  # from 1
    loss: float  # mean over the step's tokens, in nats
    learning_rate: float
    norm: float  # of the gradients, before clipping
    tokens: int
    seconds: float


class _Loss(nn.Module):
    """`summed_loss` as a module, for DistributedDataParallel."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, rows: Pass) -> torch.Tensor:
        return summed_loss(self.model, rows.tokens, rows.labels, **rows.options)[0]


@dataclass
class Trainer:
    """Trains the parameters that require gradients, step by step, with AdamW.

    Several copies of the model learn from a share of each pass: by FSDP2 if the model was
    divided (`devices.shard`), else by DDP.

    Args:
        pack: put short examples into a row together (`packing`); the result is the same.

    Raises:
        ValueError: nothing to learn, an example whose labels are all IGNORED, ids outside of the
            vocabulary, more copies than examples in a pass, or a model that can't `pack`.
    """

    model: Transformer
    rows: Sequence[Example]
    recipe: Recipe
    pack: bool = False
    step: int = field(default=0, init=False)  # done so far

    def __post_init__(self) -> None:
        self.trained = trained(self.model)
        if not self.trained or not self.rows or not all(row.asked for row in self.rows):
            raise ValueError(
                f"{len(self.trained)} parameters to learn and {len(self.rows)} examples, each of "
                "which must have a label: nothing to learn. Compiled layers and the CPU kernels, a "
                "CPU's default, have no parameters: build with compile=False"
            )
        copies, in_pass = devices.copies(), self.recipe.batch_size // self.recipe.micro_batches
        if copies > in_pass:
            raise ValueError(
                f"{copies} copies of the model can't share the {in_pass} examples of a pass: a "
                "larger batch_size, fewer micro_batches, or a larger model_parallel_size"
            )
        if self.pack:
            check_packable(self.model.params)
        check_ids([row.tokens for row in self.rows], self.model.vocab_size, "example")
        self._examples = hashlib.sha256(repr(self.rows).encode()).hexdigest()[:16]
        groups: List[Dict[str, Any]] = [{"params": [], "weight_decay": 0.0} for _ in range(2)]
        # The rows that a rank holds, as plain tensors: DTensor's dispatch would take more time than
        # the arithmetic.
        self._held = [devices.local(parameter.detach()) for _, parameter, _ in self.trained]
        for held in self._held:  # norms aren't pulled towards zero
            groups[held.ndim > 1]["params"].append(held)
        groups[1]["weight_decay"] = self.recipe.weight_decay
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
        self.device = self.model.norm.weight.device
        self._loss: nn.Module = _Loss(self.model)
        self._ddp = copies > 1 and not isinstance(self.trained[0].parameter, DTensor)
        if self._ddp:
            self._loss = DistributedDataParallel(  # all have loaded the same
                self._loss, process_group=devices.group(), init_sync=False,
                gradient_as_bucket_view=True,
            )  # fmt: skip

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.per_epoch

    @property
    def per_epoch(self) -> int:
        return -(-len(self.rows) // self.recipe.batch_size)

    def run(self) -> Iterator[Step]:
        """The steps that are left."""
        while self.step < self.steps:
            yield self.one_step()

    def one_step(self) -> Step:
        """Learn from the next examples.

        Raises:
            ValueError: a loss that is no number any more.
        """
        start, size = time.perf_counter(), self.recipe.batch_size
        epoch, at = divmod(self.step, self.per_epoch)
        chosen = order(len(self.rows), epoch, self.recipe.seed)[at * size : (at + 1) * size]
        # By length, so that a pass has little padding; a step's gradient is the same in any order.
        chosen.sort(key=lambda i: len(self.rows[i].tokens))
        for (_, parameter, _), held in zip(self.trained, self._held, strict=True):
            parameter.grad = held.grad = None
        try:
            total = self._accumulated(chosen)
        finally:  # an interrupted step leaves no dropout either
            lora.drop(self.model, None)
        sum_replicas(self.model)
        mean = float(devices.add_up(total))
        norm = clip_gradients(self.model, self.recipe.clip)
        if not math.isfinite(mean + norm):
            raise ValueError(
                f"step {self.step + 1}: the loss is {mean} and its gradient's norm {norm}: try a "
                "lower learning_rate"
            )
        for (_, parameter, _), held in zip(self.trained, self._held, strict=True):
            held.grad = None if parameter.grad is None else devices.local(parameter.grad)
        rate = self.recipe.rate(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        changed(self.model)
        self.step += 1
        tokens = sum(len(self.rows[i].tokens) for i in chosen)
        return Step(self.step, mean, rate, norm, tokens, time.perf_counter() - start)

    def _accumulated(self, chosen: List[int]) -> torch.Tensor:
        """This copy's part of the loss of a step, whose gradients are accumulated pass by pass."""
        asked = sum(self.rows[i].asked for i in chosen)
        total = torch.zeros((), device=self.device)
        per_pass = self.recipe.batch_size // self.recipe.micro_batches
        for begin in range(0, len(chosen), per_pass):
            alone = self._ddp and begin + per_pass < len(chosen)  # sent with those of later passes
            with self._loss.no_sync() if alone else nullcontext():  # type: ignore[operator]
                loss = self._summed(chosen[begin : begin + per_pass], self.rows, drop=True) / asked
                (loss * devices.copies()).backward()  # DDP and FSDP2 give the mean over copies
            total += loss.detach()
        return total

    @torch.no_grad()
    def loss(self, rows: Sequence[Example]) -> float:
        """The mean loss over other examples."""
        total = torch.zeros((), device=self.device)
        size = max(1, self.recipe.batch_size // self.recipe.micro_batches)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        for begin in range(0, len(rows), size):
            total += self._summed(by_length[begin : begin + size], rows)
        return float(devices.add_up(total)) / sum(row.asked for row in rows)

    def _summed(
        self, chosen: List[int], rows: Sequence[Example], drop: bool = False
    ) -> torch.Tensor:
        """The loss of this copy's share of a pass."""
        mine = devices.share(chosen)
        counted, mine = bool(mine), mine or chosen[:1]  # each copy takes part in all passes
        layout = (packed if self.pack else plain)([rows[i] for i in mine], self.device)
        dropout = None
        if drop and self.recipe.lora_dropout:
            seeds = [number(self.recipe.seed, self.step, i) for i in mine]
            dropout = Dropout(self.recipe.lora_dropout, layout.spans, seeds)
        lora.drop(self.model, dropout)
        low = self.recipe.dtype
        with torch.autocast(self.device.type, low, enabled=low != torch.float32):
            return self._loss(layout) * counted

    # --- on disk ---------------------------------------------------------------------------------

    def save(self, path: Path, about: Dict[str, Any]) -> None:
        """Write the state of all ranks into a directory, which is complete or isn't there.

        Args:
            about: compared by `load`, which refuses to continue a run with another.
        """
        with _together(path) as partial:
            saved.write(partial, self._state())
            if parallel.is_rank_zero():
                write_json(partial / "about.json", {**self._about(about), "step": self.step})

    def load(self, path: Path, about: Dict[str, Any]) -> None:
        """Continue from what `save` wrote, on any number of ranks.

        Raises:
            ValueError: it is of another run, by what differs.
        """
        before, now = read_object(path / "about.json"), self._about(about)
        for key in now:
            if before.get(key) != now[key]:
                differs = f"{key}={before.get(key)}, and this one has {now[key]}"
                if key == "their ids":
                    differs = (
                        "other examples: the data, the tokenizer, the date in the chat template, "
                        "max_seq_len or held_out changed"
                    )
                raise ValueError(
                    f"{path} is of a run with {differs}: go on with the same, or begin anew with "
                    "force"
                )
        self.step = before["step"]
        saved.read(path, self._state())
        changed(self.model)

    def _state(self) -> Dict[str, saved.Whole]:
        """What is saved: weights and the optimizer's moments, which are made if they aren't yet."""
        found = {}
        for (name, parameter, weight), held in zip(self.trained, self._held, strict=True):
            state = self.optimizer.state[held]
            state["step"] = torch.tensor(float(self.step))
            found[name] = saved.whole(parameter, weight, self.model.params)
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(held)
                found[f"{moment}.{name}"] = saved.whole(
                    parameter, weight, self.model.params, state[moment]
                )
        return found

    def _about(self, about: Dict[str, Any]) -> Dict[str, Any]:
        examples = {"examples": len(self.rows), "their ids": self._examples}
        whole = {**asdict(self.recipe), **examples, "format": "distributed", **about}
        return json.loads(json.dumps(whole, default=str))


@contextmanager
def _together(path: Path) -> Iterator[Path]:
    """`beside` for a directory into which all ranks write."""
    with beside(path, force=True) if parallel.is_rank_zero() else nullcontext(path) as partial:
        if parallel.is_rank_zero():
            partial.mkdir()
        yield devices.agreed(partial)
        devices.wait()  # all have written
    devices.wait()  # it has its name
