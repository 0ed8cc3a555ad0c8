"""Replicas of a model under a load, simulated and compared."""

import math
import random
import statistics
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch

from llama import checkpoint
from llama.apps.machines import (
    EFFICIENCY,
    KINDS,
    Kind,
    Measured,
    estimated,
    identity,
    opened,
    stored,
)
from llama.apps.plan_options import PlanOptions
from llama.backends import memory
from llama.engine.blocks import Blocks
from llama.engine.scheduler import Scheduler
from llama.engine.simulation import Arrival, Cost, fit, simulate
from llama.engine.steps import make_scheduler
from llama.layers.paged import PAGE
from llama.layers.parallel import pick_dtype
from llama.model import ModelArgs

USABLE = 0.9  # of a device's memory
STEPS, BUSIEST = 20, 18  # rates are tried in 20ths of a replica's capacity, up to 18 of them
HOURS, SAMPLES, T = 24, 5, 2.776  # T: Student's t of five samples, 95 % between both sides
SPREAD = {"prompt": 0.7, "answer": 0.9}  # standard deviations of the lengths' logarithms
MACHINES = 8  # over which a copy of the model may be spread
ALTERNATIVES = 3


@dataclass(frozen=True)
class Replica:
    """A copy of a model on some devices."""

    device: str  # its type
    tensor: int
    weights: int  # bytes on each device
    cache: int  # bytes on each device
    cache_tokens: int
    cost: Cost
    fitted: bool  # to measured passes of this very model

    def scheduler(self, options: PlanOptions) -> Scheduler:
        blocks = Blocks(1 + self.cache_tokens // PAGE, PAGE)
        tokens, rows = options.max_tokens_per_step, options.max_rows
        return make_scheduler(blocks, tokens, rows, self.device)


def replicas(options: PlanOptions) -> Tuple[Kind, ModelArgs, List[Replica]]:
    """The machine, the model, and the splits in which it fits.

    Raises:
        FileNotFoundError: neither a checkpoint nor a shape.
        ValueError: not a machine; a split that the heads can't have; the model fits in none.
    """
    args, source = opened(options.model)
    measured = None if options.machine in KINDS else Measured.read(options.machine)
    kind = measured.kind if measured else KINDS[options.machine]
    args = replace(args, max_seq_len=options.max_seq_len, max_batch_size=options.max_rows)
    dtype = pick_dtype(options.dtype, torch.device("cpu"))
    quantize = stored(options, source, torch.device(kind.device))
    same = measured is not None and measured.model == identity(args, options, quantize)
    reached = EFFICIENCY["quantized" if quantize else "dense"]
    if measured and not same:
        reached = measured.efficiency
    found: List[Replica] = []
    for tensor in splits(options, kind, args):
        if found and found[0].tensor <= kind.devices < tensor:
            break  # over several machines only what none of them holds
        need = memory.estimate(args, tensor, dtype, quantize, options.kv_cache, source)
        position = need.cache / (args.max_batch_size * args.max_seq_len)
        room = USABLE * kind.memory - need.weights - memory.working(args, tensor, dtype)
        tokens = min(int(room / position), args.max_batch_size * args.max_seq_len)
        if tokens < options.max_seq_len + PAGE:
            continue
        fitted = same and tensor == 1
        cost = fit(measured.passes) if measured and fitted else estimated(
            kind, args, tensor, need.weights, position, dtype.itemsize, reached,
            options.network / 8e-9,
        )  # fmt: skip
        cache = int(tokens * position)
        found.append(Replica(kind.device, tensor, need.weights, cache, tokens, cost, fitted))
    if not found:
        raise ValueError(
            f"{options.model} fits no split: of {tensor} devices each needs weights of "
            f"{memory.size(need.weights)} beside a cache of {options.max_seq_len} tokens, and one "
            f"of {options.machine} has {memory.size(int(kind.memory))}, of which {USABLE:.0%} are "
            "used: choose a machine with more memory, --quantize int4, --kv-cache int8, a smaller "
            "--max-seq-len, or a larger --tensor"
        )
    return kind, args, found


def splits(options: PlanOptions, kind: Kind, args: ModelArgs) -> List[int]:
    """Numbers of devices that may share a copy: those asked for, or several to be compared."""
    possible = [n for n in range(1, args.n_heads + 1) if args.n_heads % n == 0]
    if options.tensor is not None and options.tensor not in possible:
        raise ValueError(
            f"tensor={options.tensor} doesn't divide the {args.n_heads} heads of {options.model}: "
            f"choose one of {', '.join(map(str, possible))}"
        )
    most = MACHINES * kind.devices
    return [options.tensor] if options.tensor else [n for n in possible if n <= most]


# --- traffic --------------------------------------------------------------------------------------


def arrivals(options: PlanOptions, rate: float, n: int, rng: random.Random) -> List[Arrival]:
    """n requests at exponentially distributed intervals; all at once if the rate is infinite."""

    def length(name: str, most: int) -> int:
        drawn = round(rng.lognormvariate(0, SPREAD[name]) * getattr(options, name))
        return max(1, min(drawn, most))

    found, at, left = [], 0.0, options.max_seq_len - options.shared
    for i in range(n):
        at += rng.expovariate(1) / rate
        answer = length("answer", left - 1)
        prompt = [-1] * options.shared + [i] * length("prompt", left - answer)
        found.append(Arrival(at, prompt, answer))
    return found


def rates(options: PlanOptions) -> List[float]:
    """Requests per second of each hour that is simulated, the busiest one first: a day's follow a
    sine."""
    if options.per_day is None:
        return [options.rate]
    swing = [math.cos(2 * math.pi * hour / HOURS) for hour in range(HOURS)]
    return [options.per_day / 86400 * (1 + (options.peak - 1) * one) for one in swing]


# --- figures --------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """Seconds."""

    first_p50: float
    first_p99: float
    between_p95: float

    def meet(self, options: PlanOptions) -> bool:
        return self.first_p99 <= options.first and self.between_p95 <= options.between


def quantile(values: Sequence[Tuple[float, float]], share: float) -> float:
    """Of values with their weights; 0 if there are none."""
    left, value = share * sum(weight for _, weight in values), 0.0
    for value, weight in sorted(values):  # noqa: B007
        left -= weight
        if left <= 0:
            break
    return value


def figures(replica: Replica, options: PlanOptions, of: Sequence[float], seed: int) -> Figures:
    """Of a replica that requests reach at these rates, an hour each; of each hour a window is
    simulated, whose first fifth warms up."""
    first: List[Tuple[float, float]] = []
    between: List[Tuple[float, float]] = []
    n = options.requests if len(of) == 1 else max(options.requests // 4, 20)
    for hour, rate in enumerate(of):
        come = arrivals(options, rate, n, random.Random(f"{seed} {hour}"))
        for timing in simulate(replica.scheduler(options), come, replica.cost)[n // 5 :]:
            first.append((timing.first, rate))
            between += [(gap, rate) for gap in timing.between]
    return Figures(quantile(first, 0.5), quantile(first, 0.99), quantile(between, 0.95))


def capacity(replica: Replica, options: PlanOptions) -> Tuple[float, float]:
    """Requests and tokens per second of a replica that always has enough to do."""
    n = 4 * options.max_rows + 100
    come = arrivals(options, math.inf, n, random.Random(options.seed))
    timings = simulate(replica.scheduler(options), come, replica.cost)
    ends = sorted(timing.times[-1] for timing in timings)
    begin, end = n // 4, 3 * n // 4  # neither filling up nor draining
    rate = (end - begin) / (ends[end] - ends[begin])
    return rate, rate * statistics.fmean(len(timing.times) for timing in timings)


def busiest(replica: Replica, options: PlanOptions, limit: float) -> Tuple[int, Figures]:
    """The highest rate at which a replica meets the targets, in `STEPS` of a limit, and its
    figures there; 0, and those at the lowest rate, if it meets them at none."""
    low, high, found = 0, BUSIEST, figures(replica, options, [limit / STEPS], options.seed)
    if found.meet(options):
        low = 1
        while low < high:
            middle = (low + high + 1) // 2
            tried = figures(replica, options, [limit * middle / STEPS], options.seed)
            if tried.meet(options):
                low, found = middle, tried
            else:
                high = middle - 1
    return low, found


def plan(options: PlanOptions) -> Dict[str, Any]:
    """Splits of a model and the machines that each takes, the best first.

    Raises:
        FileNotFoundError: no such model.
        ValueError: the model fits no machine, or no split meets the targets.
    """
    kind, args, fitting = replicas(options)
    hours = rates(options)
    rows: List[Tuple[Dict[str, Any], Replica]] = []
    missed: List[Tuple[Figures, int]] = []
    for replica in fitting:
        limit, tokens = capacity(replica, options)
        copies = options.replicas
        if copies is None:
            steps, reached = busiest(replica, options, limit)
            if not steps:
                missed.append((reached, replica.tensor))
                continue
            copies = math.ceil(hours[0] * STEPS / steps / limit)
        together = kind.devices // replica.tensor or 1 / -(-replica.tensor // kind.devices)
        load = hours[0] / copies / limit
        row: Dict[str, Any] = {
            "machines": math.ceil(copies / together), "replicas": copies, "tensor": replica.tensor,
            "weights_bytes": replica.weights, "cache_bytes": replica.cache,
            "load": round(load, 3), "tokens_per_s": round(min(load, 1) * copies * tokens, 1),
            "capacity_tokens_per_s": round(copies * tokens, 1), "fitted": replica.fitted,
        }  # fmt: skip
        rows.append((row, replica))
    if not rows:
        best, tensor = min(missed)
        raise ValueError(
            f"no split of {options.model} on {options.machine} keeps first={options.first} s and "
            f"between={options.between} s, however many replicas: the best, of {tensor} devices, "
            f"has {best.first_p99:.3g} s and {best.between_p95:.3g} s. Raise these, shorten the "
            "prompts, quantize, or choose a faster machine"
        )
    rows.sort(key=lambda row: (row[0]["machines"], row[1].tensor * row[0]["replicas"]))
    for row, replica in rows[: 1 + ALTERNATIVES]:
        of = [rate / row["replicas"] for rate in hours]
        samples = [figures(replica, options, of, options.seed + i) for i in range(SAMPLES)]
        for name, values in zip(Figures._fields, zip(*samples, strict=True), strict=True):
            half = T * statistics.stdev(values) / math.sqrt(SAMPLES)
            row[name] = {"mean": round(statistics.fmean(values), 5), "within": round(half, 5)}
    parameters = sum(math.prod(shape) for shape in checkpoint.weight_shapes(args).values())
    return {
        "parameters": parameters, "options": vars(options), "machine": kind._asdict(),
        "plans": [row for row, _ in rows[: 1 + ALTERNATIVES]],
    }  # fmt: skip


def lines(found: Dict[str, Any]) -> Iterator[str]:
    """The plan as a table."""
    of = found["options"]
    day = f"{of['per_day']:,.0f} requests a day" if of["per_day"] else f"{of['rate']:g} requests/s"
    yield (
        f"{of['model']}: {found['parameters'] / 1e9:.2f} billion parameters; {of['machine']}: "
        f"machines of {found['machine']['devices']} devices; {day}"
    )
    yield (
        f"{'':<11} machines  replicas x devices  weights + cache  load  tokens/s  first p50"
        "            p99  between p95"
    )
    for i, row in enumerate(found["plans"]):
        held = f"{row['weights_bytes'] / 1e9:.1f} + {row['cache_bytes'] / 1e9:.1f} GB"
        last = f"{row['first_p99']['mean']:.2f} ± {row['first_p99']['within']:.2f} s"
        yield (
            f"{'alternative' if i else 'recommended'} {row['machines']:>8}"
            f"{row['replicas']:>10} x {row['tensor']:<7} {held:>16} {row['load']:>5.0%} "
            f"{row['tokens_per_s']:>9,.0f} {row['first_p50']['mean']:>8.2f} s {last:>14} "
            f"{row['between_p95']['mean'] * 1000:>8.1f} ms"
            f"{'  overloaded: waits grow without end' if row['load'] >= 1 else ''}"
        )
    if not all(row["fitted"] for row in found["plans"]):
        yield "Estimated from a machine's figures, not measured: --measure one before buying many."
