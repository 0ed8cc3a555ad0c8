"""The training loop: steps, saved states, and gradients of several ranks.

A run is a function of the weights, the examples and the recipe: the order of examples and the
learning rate follow from the step's number, so a resumed run is bit-identical to an uninterrupted
one (on a CPU, with the same number of threads).
"""

import hashlib
import json
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from llama.layers import parallel
from llama.layers.ids import check_ids
from llama.layers.revision import changed
from llama.model import Transformer
from llama.text.files import beside, read_object, write_json
from llama.training.data import Example, batch, order
from llama.training.losses import summed_loss


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
    seed: int = 1  # of the order of examples
    dtype: torch.dtype = torch.float32  # of matrix products (autocast); weights keep their own

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batches", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
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


class Trained(NamedTuple):
    """A parameter that is learned."""

    name: str
    parameter: nn.Parameter
    shard_of: Optional[str]  # the weight like which it is split over ranks; None: not split


def trained(model: Transformer) -> List[Trained]:
    """The parameters that require gradients, of weights or of adapters."""
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight, _, half = name.removesuffix(".base.weight").partition(".lora_")
        weight = weight.removesuffix(".weight") + ".weight"
        axis = parallel.shard_axis(weight)
        # Of W + B A, B is split as W's outputs are, and A as its inputs.
        split = axis is not None and (not half or half[0] == "BA"[axis])
        found.append(Trained(name, parameter, weight if split else None))
    return found


def sum_replicas(model: Transformer) -> None:
    """After a backward pass: add up the gradients of key/value heads that several ranks share.

    Does nothing unless there are more ranks than key/value heads.
    """
    args = model.params
    for _, parameter, shard_of in trained(model):
        if parameter.grad is not None and (shard_of or "").endswith(parallel.KV):
            found = parallel.add_replicas(parameter.grad, args.n_heads, args.n_kv_heads)
            parameter.grad = found


@torch.no_grad()
def clip_gradients(model: Transformer, most: float) -> float:
    """Clip the gradient of all weights, over all ranks, to a norm; returns the norm it had.

    A value that several ranks hold counts once.
    """
    args, world = model.params, parallel.world_size()
    heads = len(parallel.kv_heads(0, world, args.n_heads, args.n_kv_heads))
    squares = torch.zeros((), device=model.norm.weight.device)
    gradients = []
    for _, parameter, shard_of in trained(model):
        if parameter.grad is None:
            continue
        holders = world if shard_of is None else 1.0
        if (shard_of or "").endswith(parallel.KV):
            holders = world * heads / args.n_kv_heads
        squares += parameter.grad.float().square().sum() / holders
        gradients.append(parameter.grad)
    norm = math.sqrt(sum(map(float, parallel.all_gather(squares))))
    if norm > most:
        for gradient in gradients:
            gradient.mul_(most / norm)
    return norm


class Step(NamedTuple):
    """Metrics of a step."""

    step: int  # from 1
    loss: float  # mean over the step's tokens, in nats
    learning_rate: float
    norm: float  # of the gradients, before clipping
    tokens: int
    seconds: float


@dataclass
class Trainer:
    """Trains the parameters that require gradients, step by step, with AdamW.

    Raises:
        ValueError: nothing to learn, an example whose labels are all IGNORED, or ids outside of
            the vocabulary.
    """

    model: Transformer
    rows: Sequence[Example]
    recipe: Recipe
    step: int = field(default=0, init=False)  # done so far

    def __post_init__(self) -> None:
        self.trained = trained(self.model)
        if not self.trained or not self.rows or not all(row.asked for row in self.rows):
            raise ValueError(
                f"{len(self.trained)} parameters to learn and {len(self.rows)} examples, each of "
                "which must have a label: nothing to learn"
            )
        check_ids([row.tokens for row in self.rows], self.model.vocab_size, "example")
        self._examples = hashlib.sha256(repr(self.rows).encode()).hexdigest()[:16]
        groups: List[Dict[str, Any]] = [{"params": [], "weight_decay": 0.0} for _ in range(2)]
        for _, parameter, _ in self.trained:  # norms aren't pulled towards zero
            groups[parameter.ndim > 1]["params"].append(parameter)
        groups[1]["weight_decay"] = self.recipe.weight_decay
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
        self.device = self.model.norm.weight.device

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
        rows = sorted((self.rows[i] for i in chosen), key=lambda row: len(row.tokens))
        asked, total = sum(row.asked for row in rows), 0.0
        per_pass = size // self.recipe.micro_batches
        self.optimizer.zero_grad()
        for begin in range(0, len(rows), per_pass):
            loss = self._summed(rows[begin : begin + per_pass]) / asked
            loss.backward()
            total += float(loss.detach())
        sum_replicas(self.model)
        norm = clip_gradients(self.model, self.recipe.clip)
        if not math.isfinite(total + norm):
            raise ValueError(
                f"step {self.step + 1}: the loss is {total} and its gradient's norm {norm}: try a "
                "lower learning_rate"
            )
        rate = self.recipe.rate(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        changed(self.model)
        self.step += 1
        tokens, seconds = sum(len(row.tokens) for row in rows), time.perf_counter() - start
        return Step(self.step, total, rate, norm, tokens, seconds)

    @torch.no_grad()
    def loss(self, rows: Sequence[Example]) -> float:
        """The mean loss over other examples."""
        total, size = 0.0, max(1, self.recipe.batch_size // self.recipe.micro_batches)
        by_length = sorted(rows, key=lambda row: len(row.tokens))
        for begin in range(0, len(rows), size):
            total += float(self._summed(by_length[begin : begin + size]))
        return total / sum(row.asked for row in rows)

    def _summed(self, rows: Sequence[Example]) -> torch.Tensor:
        tokens, labels = batch(rows, self.device)
        if self.recipe.dtype == torch.float32:
            return summed_loss(self.model, tokens, labels)[0]
        with torch.autocast(self.device.type, self.recipe.dtype):
            return summed_loss(self.model, tokens, labels)[0]

    # --- on disk ---------------------------------------------------------------------------------

    def save(self, path: Path, about: Dict[str, Any]) -> None:
        """Write the state of all ranks into a directory, which is complete or isn't there.

        Args:
            about: compared by `load`, which refuses to continue a run with another.
        """
        content = {
            "step": self.step,
            "parameters": [parameter.detach() for _, parameter, _ in self.trained],
            "optimizer": self.optimizer.state_dict(),
        }
        with _together(path) as partial:
            torch.save(content, partial / _file())
            if parallel.is_rank_zero():
                write_json(partial / "about.json", self._about(about))

    def load(self, path: Path, about: Dict[str, Any]) -> None:
        """Continue from what `save` wrote.

        Raises:
            ValueError: it is of another run, by what differs.
        """
        before, now = read_object(path / "about.json"), self._about(about)
        for key in now:
            if before.get(key) != now[key]:
                raise ValueError(
                    f"{path} is of a run with {key}={before.get(key)}, and this one has "
                    f"{now[key]}: go on with the same, or begin anew with force"
                )
        content = torch.load(path / _file(), weights_only=True, map_location="cpu")
        with torch.no_grad():
            for (_, parameter, _), saved in zip(self.trained, content["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(content["optimizer"])
        changed(self.model)
        self.step = content["step"]

    def _about(self, about: Dict[str, Any]) -> Dict[str, Any]:
        examples = {"examples": len(self.rows), "their ids": self._examples}
        ranks = {"ranks": parallel.world_size()}
        whole = {**asdict(self.recipe), **examples, **ranks, **about}
        return json.loads(json.dumps(whole, default=str))


def _file() -> str:
    return f"rank-{parallel.rank()}-of-{parallel.world_size()}.pt"


@contextmanager
def _together(path: Path) -> Iterator[Path]:
    """`beside` for a directory into which all ranks write."""
    with beside(path, force=True) if parallel.is_rank_zero() else nullcontext(path) as partial:
        if parallel.is_rank_zero():
            partial.mkdir()
        yield parallel.broadcast_object(partial)
        parallel.barrier()  # all have written
    parallel.barrier()  # it has its name
