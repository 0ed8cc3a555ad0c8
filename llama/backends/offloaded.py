"""Offloading, for models larger than memory: blocks that don't fit are streamed for each pass.

As many transformer blocks as fit stay in memory. Of the others, two are in memory at any time: the
one that computes and the next, which a thread loads meanwhile (after the last block, the first one
of the next pass). Of the embedding, only the rows of a pass's tokens are read. The output layer
stays in memory if it fits, otherwise it is streamed in pieces.

On a CPU, weights are read from the checkpoint by `read_shard`, as on loading: any format, any
number of ranks. On a GPU, they are copied on a separate CUDA stream from pinned host memory, if
there is enough, otherwise from the checkpoint. Each rank decides for itself: communication between
ranks is the same with and without offloading.
"""

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from llama import checkpoint
from llama.backends import memory
from llama.backends.memory import size
from llama.checkpoint import Checkpoint, local_shape, read_shard, weight_shapes
from llama.families.registry import build
from llama.layers import parallel
from llama.model import ModelArgs, Step, Transformer, TransformerBlock

PAGE = 4096
STREAMED = ("layers.", "output.", "tok_embeddings.")
ALIGNED = 256  # bytes: the alignment of weights that GPU kernels expect

Weights = List[torch.Tensor]
Piece = Callable[[], Weights]  # reads weights that are used together


class Plan(NamedTuple):
    """What stays in memory."""

    resident: int  # blocks
    output: bool

    def streams(self, layer: int, n_layers: int) -> bool:
        """Whether a block is streamed. Streamed blocks are spread evenly: each is loaded while
        resident ones before it compute."""
        n = n_layers - self.resident
        return layer * n // n_layers != (layer + 1) * n // n_layers


def plan(
    source: Checkpoint,
    args: ModelArgs,
    world: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantize: Optional[str] = None,
    kv_cache: Optional[str] = None,
    compile: Optional[bool] = None,
    reserve: int = 0,
) -> Optional[Plan]:
    """Decides what stays in memory, by estimated and available memory; None if everything fits.

    Args:
        reserve: bytes to leave free for other uses.

    Raises:
        ValueError: not even two blocks fit, or layers are to be quantized or compiled, which can't
            be streamed.
    """
    need = memory.estimate(args, world, dtype, quantize, kv_cache, source)
    have = memory.available(device)
    have //= memory.sharers(device)
    # A CPU's is known less precisely, and has room beside it.
    of_a_pass = memory.working(args, world, dtype) if device.type != "cpu" else 0
    if need.total + reserve + of_a_pass <= have:
        return None
    if quantize == "stored":  # they are dequantized as they are streamed
        quantize, need = None, memory.estimate(args, world, dtype, None, kv_cache)
    if quantize is not None or compile:
        asked = "compile=True" if quantize is None else f"quantize={quantize!r}"
        raise ValueError(
            f"this can't fit: {need}, {size(have)} available on {device}; and "
            f'offload="auto" streams plain weights only: leave out {asked}'
            + ("" if quantize else ", or quantize with it until it fits")
        )
    block, output = _nbytes(args, world, dtype)
    around = need.cache + reserve + memory.working(args, world, dtype) + _rest(args, world, dtype)
    left, stays = have - around, True
    if output + 2 * block > left:
        stays, output = False, 0
    # Dequantizing into memory fragments it, by a third of what stays (measured).
    quantized = source.stored_as(_block_names(args, 0)[0]) not in checkpoint.DTYPES
    each = block * 7 // 5 if quantized and device.type == "cpu" else block
    resident, left = args.n_layers, left - output
    if args.n_layers * each + 2 * block * (not stays) > left:
        resident = (left - 2 * block) // each
    if resident < 0:
        raise ValueError(
            f"this can't fit, not even block by block: two blocks of {size(2 * block)} + cache "
            f"{size(need.cache)} + working memory and what is reserved {size(around - need.cache)}"
            f"; {size(have)} available on {device}. Ways out: a smaller max_seq_len or "
            "max_batch_size, a smaller dtype, kv_cache, fewer prefix_cache_mb, or more ranks "
            "(torchrun --nproc_per_node)"
        )
    return Plan(resident, stays)


def load(
    source: Checkpoint, args: ModelArgs, plan: Plan, *, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """Load a model whose layers stream what doesn't stay in memory. For inference only.

    Streamed weights aren't checked for NaN. The model's attribute `placement` is a line of text:
    what stays in memory, what is streamed, and how fast.

    Raises:
        ValueError: what `checkpoint.load` raises.
    """
    model, world = build(args, device="meta"), parallel.world_size()
    streamed = [i for i in range(args.n_layers) if plan.streams(i, args.n_layers)]
    place = None if device.type == "cuda" else device
    pieces: List[Piece] = [
        partial(_read_all, source, _block_names(args, i), dtype, place) for i in streamed
    ]
    n_blocks, rows = len(pieces), local_shape(args, _output_name(args), 0, world)[0]
    if not plan.output:
        pieces += _output_pieces(source, dtype, place)
    loader = _Loader(pieces)
    if device.type == "cuda":
        block, _ = _nbytes(args, world, dtype)
        piece = _output_step(args) * args.dim * dtype.itemsize
        nbytes = [block] * n_blocks + [piece] * (len(pieces) - n_blocks)
        loader = _CudaLoader(pieces, nbytes, device)
    ring = Ring(loader)
    output = None if plan.output else StreamedOutput(ring, n_blocks, rows)

    def stand_in(name: str) -> Optional[nn.Module]:
        if name.startswith("layers."):
            owner = name.rpartition(".")[0]
            return model.get_submodule(owner) if int(name.split(".")[1]) in streamed else None
        if name == "tok_embeddings.weight" and not (args.tied_embeddings and plan.output):
            return RowsOfFile(source, name, dtype, device)
        return output if name == "output.weight" else None

    checkpoint.load(source, model, dtype=dtype, device=device, replace=stand_in)
    if args.tied_embeddings and output is not None:
        model.output = output  # type: ignore[assignment]
    for index, i in enumerate(streamed):
        names = [name.split(".", 2)[2] for name in _block_names(args, i)]
        model.layers[i] = StreamedBlock(model.layers[i], ring, index, names)  # type: ignore[arg-type]
    model.placement = _report(ring, args, plan, n_blocks)  # type: ignore[assignment]
    return model.requires_grad_(False)


class Ring:
    """Streams the pieces of a model in turn: while one is in use, the next is being read.

    Layers hold the `lock` while they use a piece: threads may share a model.
    """

    def __init__(self, loader: "_Loader"):
        self.lock, self.loader = threading.RLock(), loader
        # It holds no reference to the ring, so that its thread ends when the ring is deleted.
        self._reader = ThreadPoolExecutor(1, "llama-offload")
        self._here: Optional[Tuple[int, Weights]] = None
        self._next: Optional[Tuple[int, Future[Weights]]] = None

    def take(self, index: int) -> Weights:
        """A piece's weights, valid until another piece is taken.

        Raises:
            OSError, ValueError: what reading it raised.
        """
        if self._here is not None and self._here[0] == index:
            return self._here[1]
        self._here = None  # first, so that there are never three in memory
        if self._next is not None and self._next[0] != index:
            wait([self._next[1]])  # the last pass was interrupted, or computed no logits
            self._next = None
        (_, coming), self._next = self._next or self._begin(index), None
        weights = self.loader.arrive(coming.result())
        self._here = index, weights
        following = (index + 1) % len(self.loader.pieces)
        if following != index:
            self._next = self._begin(following)
        return weights

    def _begin(self, index: int) -> Tuple[int, "Future[Weights]"]:
        return index, self._reader.submit(self.loader.load, index, self.loader.mark())


class _Loader:
    """Loads weights from the checkpoint into memory."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = pieces

    def mark(self) -> Any:
        """Called when a load is requested; its result is passed to `load`."""

    def load(self, index: int, mark: Any) -> Weights:
        """Called in the reading thread."""
        weights = self.pieces[index]()
        for weight in weights:
            weight.flatten()[:: PAGE // weight.itemsize].sum()  # mapped pages are read on access
        return [nn.Parameter(weight, requires_grad=False) for weight in weights]

    def arrive(self, weights: Weights) -> Weights:
        """Called before the weights are used, by the thread that uses them."""
        return weights


class _CudaLoader(_Loader):
    """Copies weights to one of two buffers on a GPU, while it computes with the other."""

    def __init__(self, pieces: Sequence[Piece], nbytes: Sequence[int], device: torch.device):
        super().__init__(pieces)
        if not pieces:
            return
        self._device, self._stream, self._loads = device, torch.cuda.Stream(device), 0
        nbytes = [n + ALIGNED * 16 for n in nbytes]  # of a block's 9 weights and up to 7 biases
        host, total = torch.device("cpu"), sum(nbytes)
        # Twice: pinned memory is allocated in powers of two.
        if 2 * total * memory.sharers(host) < memory.available(host):
            with suppress(RuntimeError):  # the system may allow less: then read the files
                pinned = [[weight.pin_memory() for weight in piece()] for piece in pieces]
                self.pieces = [partial(list, weights) for weights in pinned]
        most = max(nbytes)
        self._buffers = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        for buffer in self._buffers:  # a copy may still be running when the model is deleted
            buffer.record_stream(self._stream)

    def mark(self) -> Any:
        """An event after which a buffer may be overwritten: the end of the work queued so far on
        the current stream, which all users of a model must share."""
        return torch.cuda.current_stream(self._device).record_event()

    def load(self, index: int, mark: Any) -> Weights:
        buffer, begin, placed = self._buffers[self._loads % 2], 0, []
        self._loads += 1
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            for weight in self.pieces[index]():
                there = buffer[begin : begin + weight.nbytes].view(weight.dtype)
                placed.append(there.view(weight.shape).copy_(weight, non_blocking=True))
                begin += -(-weight.nbytes // ALIGNED) * ALIGNED
        return [nn.Parameter(weight, requires_grad=False) for weight in placed]

    def arrive(self, weights: Weights) -> Weights:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return weights


class StreamedBlock(TransformerBlock):
    """A TransformerBlock whose weights are in memory only while it computes; otherwise "meta".

    Args:
        names: of its weights, in the order of the ring's.
    """

    def __init__(self, block: TransformerBlock, ring: Ring, index: int, names: Sequence[str]):
        nn.Module.__init__(self)
        self.attention, self.feed_forward = block.attention, block.feed_forward
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self._ring, self._index = ring, index
        places = [name.rpartition(".")[::2] for name in names]
        self._owners = [(self.get_submodule(owner), attribute) for owner, attribute in places]
        self._empty = [self.get_parameter(name) for name in names]

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        with self._ring.lock:
            try:
                self._put(self._ring.take(self._index))
                return super().forward(x, step)
            finally:
                self._put(self._empty)

    def _put(self, weights: Sequence[torch.Tensor]) -> None:
        for (owner, attribute), weight in zip(self._owners, weights, strict=True):
            setattr(owner, attribute, weight)


class StreamedOutput(nn.Module):
    """The output layer, streamed in pieces of some rows. Each rank has `rows`, padding included."""

    def __init__(self, ring: Ring, first: int, rows: int):
        super().__init__()
        self._ring, self._first, self._rows = ring, first, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self._ring.lock:
            indices = range(self._first, len(self._ring.loader.pieces))
            parts = [F.linear(x, *self._ring.take(index)) for index in indices]
        known = sum(part.shape[-1] for part in parts)
        parts.append(x.new_zeros(*x.shape[:-1], self._rows - known))
        return gather_from_model_parallel_region(torch.cat(parts, -1))


class RowsOfFile(nn.Module):
    """An embedding that reads only the rows of the given tokens from the checkpoint; each rank
    reads those of its shard."""

    def __init__(self, source: Checkpoint, name: str, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self._source, self._name, self._dtype, self._device = source, name, dtype, device
        self._range = range(*_rows_of_rank(source.args, name))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        ids, places = tokens.unique(return_inverse=True)
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self._source.args.vocab_size:
            raise IndexError(f"token ids from {ids[0]} to {ids[-1]}: out of the vocabulary")
        found = torch.zeros(len(ids), self._source.args.dim, dtype=self._dtype)
        for row, i in zip(found, ids.tolist(), strict=True):
            if i in self._range:
                row.copy_(self._source.read(self._name, 0, i, i + 1)[0])
        return reduce_from_model_parallel_region(found.to(self._device)[places])


def _rest(args: ModelArgs, world: int, dtype: torch.dtype) -> int:
    """Bytes of what no plan streams, on one rank: the last norm, and what reads images."""
    names = [name for name in weight_shapes(args) if not name.startswith(STREAMED)]
    return sum(math.prod(local_shape(args, name, 0, world)) for name in names) * dtype.itemsize


def _block_names(args: ModelArgs, layer: int) -> List[str]:
    return [name for name in weight_shapes(args) if name.startswith(f"layers.{layer}.")]


def _output_name(args: ModelArgs) -> str:
    return "tok_embeddings.weight" if args.tied_embeddings else "output.weight"


def _nbytes(args: ModelArgs, world: int, dtype: torch.dtype) -> Tuple[int, int]:
    """Bytes of a block, the largest, and of the output layer, on one rank."""

    def total(names: List[str]) -> int:
        return sum(math.prod(local_shape(args, name, 0, world)) for name in names) * dtype.itemsize

    largest = max(total(_block_names(args, layer)) for layer in range(args.n_layers))
    return largest, total([_output_name(args)])


def _rows_of_rank(args: ModelArgs, name: str) -> Tuple[int, int]:
    rank, world = parallel.rank(), parallel.world_size()
    rows = weight_shapes(args)[name][0]
    [found] = parallel.shard_ranges(name, rows, rank, world, args.n_heads, args.n_kv_heads)
    return found


def _read_all(
    source: Checkpoint, names: List[str], dtype: torch.dtype, device: Optional[torch.device]
) -> Weights:
    rank, world = parallel.rank(), parallel.world_size()
    return [read_shard(source, name, rank, world, dtype=dtype, device=device) for name in names]


def _output_pieces(
    source: Checkpoint, dtype: torch.dtype, device: Optional[torch.device]
) -> List[Piece]:
    """This rank's rows of the output layer, in pieces small enough to be dequantized in memory."""
    args, name = source.args, _output_name(source.args)
    begin, end = _rows_of_rank(args, name)
    step = _output_step(args)

    def read(start: int) -> Weights:
        return [source.read(name, 0, start, min(start + step, end)).to(device, dtype)]

    return [partial(read, start) for start in range(begin, end, step)]


def _output_step(args: ModelArgs) -> int:
    """Rows of a piece of the output layer, a multiple of 64."""
    block, _ = _nbytes(args, parallel.world_size(), torch.float32)
    return max(block // (32 * args.dim) // 64, 1) * 64


def _report(ring: Ring, args: ModelArgs, plan: Plan, n_blocks: int) -> str:
    """One line: what stays in memory, what is streamed, and the expected speed, by timing both.

    Matrix products are timed without communication: other ranks may not be streaming.
    """
    line = f"{plan.resident} of {args.n_layers} blocks" + " and the output layer" * plan.output
    loader = ring.loader
    if not loader.pieces:
        return f"in memory: {line}; the embedding is read row by row"
    start, found = time.perf_counter(), 0
    for index in range(min(3, len(loader.pieces))):
        weights = loader.arrive(loader.load(index, loader.mark()))
        found += sum(weight.nbytes for weight in weights)
    _finish(weights)
    bandwidth = found / (time.perf_counter() - start)
    matrices = [weight for weight in weights if weight.dim() == 2]
    for _ in range(2):  # the first time is slower
        start = time.perf_counter()
        for weight in matrices:
            F.linear(weight.new_zeros(1, weight.shape[1]), weight)
        _finish(weights)
    compute = time.perf_counter() - start
    block, output = _nbytes(args, parallel.world_size(), weights[0].dtype)
    nbytes = n_blocks * block + (0 if plan.output else output)
    seconds = max(nbytes / bandwidth, args.n_layers * compute)
    return (
        f"in memory: {line}; each pass streams {size(nbytes)}, at {bandwidth / 1e9:.2f} GB/s: "
        f"expect up to {1 / seconds:.3g} passes (tokens) per second"
    )


def _finish(weights: Weights) -> None:
    if weights[0].is_cuda:
        torch.cuda.synchronize(weights[0].device)
