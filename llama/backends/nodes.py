"""One model for ranks on several machines: checked to be the same on all, or sent by rank 0."""

from collections import Counter
from pathlib import Path
from socket import gethostname
from threading import Thread
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, TypeVar, cast

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group

from llama import checkpoint
from llama.checkpoint import Checkpoint, remote
from llama.tokenizer import Tokenizer

T = TypeVar("T")

DTYPES = (torch.uint8, *checkpoint.DTYPES.values())  # of what is sent
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
DENSE, BLOCKS, DONE = range(3)  # what is asked for
HEADER = 8  # numbers before a weight: its dtype and its shape, then -1


class Borrowed:
    """Rank 0's checkpoint, read over the network, until `close`.

    Attributes:
        fingerprint: `checkpoint.fingerprint`'s.
    """

    tokenizer_path: Optional[Path] = None  # it comes by itself, see `tokenizer_on_all_ranks`

    def __init__(self, about: Sequence[Any], group: Any):
        self.path, self.args, self._shapes, self._stored, self.fingerprint = about
        self._names, self._group = [*self._shapes], group

    def shapes(self) -> Dict[str, checkpoint.Shape]:
        return self._shapes

    def stored_as(self, name: str) -> str:
        return self._stored[name]

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self._ask(DENSE, name, axis, start, stop)

    def read_blocks(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self._ask(BLOCKS, name, axis, start, stop)

    def close(self) -> None:
        """Tell rank 0 that nothing more will be read."""
        dist.send(torch.tensor([DONE, 0, 0, 0, 0]), 0, self._group)

    def _ask(self, kind: int, name: str, *of: int) -> torch.Tensor:
        dist.send(torch.tensor([kind, self._names.index(name), *of]), 0, self._group)
        header = torch.empty(HEADER, dtype=torch.int64)
        dist.recv(header, 0, self._group)
        dtype, *shape = header.tolist()
        part = torch.empty([size for size in shape if size >= 0], dtype=DTYPES[dtype])
        dist.recv(part.view(-1).view(torch.uint8), 0, self._group)
        return part


def _answer(source: Any, borrowers: int, group: Any) -> None:
    """Send what other ranks ask for, until each has said that it has all."""
    names, question = [*source.shapes()], torch.empty(5, dtype=torch.int64)
    while borrowers:
        rank = dist.recv(question, group=group)
        kind, name, *of = question.tolist()
        if kind == DONE:
            borrowers -= 1
            continue
        part = (source.read_blocks if kind == BLOCKS else source.read)(names[name], *of)
        header = [DTYPES.index(part.dtype), *part.shape]
        dist.send(torch.tensor(header + [-1] * (HEADER - len(header))), rank, group)
        dist.send(part.contiguous().view(-1).view(torch.uint8), rank, group)


def local_path(path: str | Path, lend: bool) -> Path:
    """`remote.local_path`; to lend them, rank 0 alone downloads files."""
    if lend and "://" in str(path) and dist.get_rank():
        raise FileNotFoundError(f"{path} is lent by rank 0")
    return remote.local_path(path)


def open_on_all_ranks(
    find: Callable[[], Checkpoint], settings: Mapping[str, Any], lend: bool
) -> Checkpoint:
    """What `find` opens, after checking that it is the same model on all ranks.

    Args:
        settings: what else must be the same.
        lend: ranks that find none get rank 0's, `Borrowed`.

    Raises:
        FileNotFoundError, ValueError: those of `on_all_ranks`.
    """

    def facts(source: Checkpoint) -> Dict[str, Any]:
        checkpoint.check_shapes(source)
        matrices = [name for name, shape in source.shapes().items() if len(shape) > 1]
        stored = dict(Counter(map(source.stored_as, matrices)))
        shape = {name: getattr(source.args, name) for name in SHAPE}
        mark = checkpoint.fingerprint(source)  # of values, too
        return {**shape, **settings, "stored": stored, "weights": mark}

    found, about, lacking = on_all_ranks(find, facts, lend)
    if lacking:
        group, sent = dist.new_group(backend="gloo"), cast(List[Any], [None] * 5)
        for source in found if dist.get_rank() == 0 else []:
            stored = {name: source.stored_as(name) for name in source.shapes()}
            sent = [source.path, source.args, source.shapes(), stored, about["weights"]]
            Thread(target=_answer, args=(source, lacking, group), daemon=True).start()
        dist.broadcast_object_list(sent)
    return found[0] if found else Borrowed(sent, group)


def tokenizer_on_all_ranks(find: Callable[[], Tokenizer], lend: bool) -> Tokenizer:
    """The same for a tokenizer."""

    def facts(tokenizer: Tokenizer) -> Dict[str, Any]:
        return {"tokenizer": tokenizer.fingerprint()}

    found, _, lacking = on_all_ranks(find, facts, lend)
    sent: List[Any] = [tokenizer.vocabulary for tokenizer in found] or [None]
    if lacking:
        dist.broadcast_object_list(sent)
    return found[0] if found else Tokenizer(sent[0])


def on_all_ranks(
    find: Callable[[], T], facts: Callable[[T], Dict[str, Any]], lend: bool
) -> Tuple[List[T], Dict[str, Any], int]:
    """What this rank finds, once it is known to be the same as what the others find.

    Args:
        facts: what must be equal, by the names that messages use.
        lend: all but rank 0 may find nothing.

    Returns:
        What was found or nothing, its facts, and the number of ranks that have found nothing.

    Raises:
        FileNotFoundError: a rank that finds nothing; with several, it is named, with its host.
        ValueError: what `find` raises on any rank; ranks that have found something else.
    """
    group = None if lend or not dist.is_initialized() else get_model_parallel_group()
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [find()], {}, 0
    found: List[T] = []
    mine: Dict[str, Any] = {}
    failure: Optional[Exception] = None
    try:
        found.append(find())
        mine = facts(found[0])
    except (ValueError, OSError) as error:
        failure = error
    me = f"rank {dist.get_rank()} on host {gethostname()}"
    missing = type(failure) is FileNotFoundError
    said: List[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, (me, mine, str(failure or ""), missing), group)
    if failure and len({problem for *_, problem, _ in said}) == 1:
        raise failure
    first, expected, unusable, _ = said[0]
    for who, theirs, problem, missing in said:
        if missing and lend and not unusable:
            continue
        if problem:
            advice = ": copy it there, or pass broadcast_weights" * (missing and not lend)
            raise (FileNotFoundError if missing else ValueError)(f"{who}: {problem}{advice}")
        if different := [name for name in expected if theirs[name] != expected[name]]:
            raise ValueError(
                f"{who} has not the model or the options of {first}: "
                + ", ".join(f"{name} {theirs[name]}, not {expected[name]}" for name in different)
                + "; copy the same files to all machines, and start all with the same command"
            )
    return found, mine, sum(missing for *_, missing in said)
