"""Shapes of weights, whole and of a rank's part, from the shape of the model. Nothing is read."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterator, Mapping, Tuple

from llama.checkpoint.source import Checkpoint, Shape
from llama.families.family import Family
from llama.families.registry import LLAMA, family_of
from llama.layers import parallel
from llama.model import ModelArgs

# A layer's matrices, by the last part of their modules' names, in the order of their use.
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")

# Elements that are read at once, about: what conversion needs in extra memory. Fewer than most
# weights have, so that malloc keeps the two apart: mixed, what is read and freed leaves holes
# between the weights that nothing fits into.
CHUNK_ELEMENTS = 1 << 19


def checked_args(
    path: Path, fields: Mapping[str, Any], n_tensors: int, family: Family = LLAMA
) -> ModelArgs:
    """The shape that fields describe, which were read from a file and may be of any type.

    Raises:
        ValueError: a value of another type, one out of range, or more layers than tensors.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(family.args)}
    for name, value in fields.items():
        default = defaults[name]
        if (value is None and default is None) or not isinstance(default, int | float | None):
            continue  # the rest is checked by the class
        kind: type = int if default is None else type(default)
        kind = float if name == "ffn_dim_multiplier" else kind
        fits = type(value) is kind or (kind is float and type(value) is int)
        most = 1 << (40 if kind is float else 31)  # rope_theta reaches 3.6e9
        if not fits or (kind is not bool and not 0 < value < most):
            what = "true or false" if kind is bool else f"a positive {kind.__name__}"
            raise ValueError(f"{path}: {name}={str(value)[:80]} isn't {what}")
    try:
        args = family.args(**fields)
        if args.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of dimensions, and head_dim={args.head_dim} is odd")
        if args.n_layers > n_tensors:  # else naming what is missing could take forever
            raise ValueError(f"{args.n_layers} layers can't be made of {n_tensors} tensors")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return args


@lru_cache
def weight_shapes(args: ModelArgs) -> Mapping[str, Shape]:
    """Meta's name and whole shape of every weight that a model of this shape has."""
    return MappingProxyType(family_of(args).shapes(args))


def check_shapes(checkpoint: Checkpoint) -> None:
    """Compare what the files hold with what the shape of the model asks for.

    Raises:
        ValueError: names that are missing or too many, or a wrong shape.
    """
    expected, found = weight_shapes(checkpoint.args), checkpoint.shapes()
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    for what, names in (("lacks", missing), ("holds what a Llama has no place for:", extra)):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{checkpoint.path} {what} {some} ({len(names)} in all)")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{checkpoint.path}: {name} has the shape {found[name]}, "
                f"and its configuration asks for {shape}"
            )


def local_shape(args: ModelArgs, name: str, rank: int, world: int) -> Shape:
    """Shape of the part of a weight that one of `world` ranks holds.

    Raises:
        ValueError: a number of ranks that doesn't divide the heads.
    """
    shape = weight_shapes(args)[name]
    parallel.check_world(world, args.n_heads)
    axis = parallel.shard_axis(name)
    if axis is None:
        return shape
    length = parallel.padded(shape[axis], world) // world
    if name.endswith(parallel.KV):  # whole heads, possibly replicated
        heads = parallel.kv_heads(rank, world, args.n_heads, args.n_kv_heads)
        length = len(heads) * args.head_dim
    return shape[:axis] + (length,) + shape[axis + 1 :]


def chunks(
    shape: Shape, axis: int, start: int, stop: int, head_dim: int = 1
) -> Iterator[Tuple[int, int]]:
    """[start, stop) of axis 0 in pieces of about CHUNK_ELEMENTS; of another axis, in one piece.

    Pieces are whole heads, within which some formats have the rows in another order.
    """
    step = CHUNK_ELEMENTS // max(1, shape[-1]) // head_dim * head_dim if axis == 0 else stop - start
    step = max(step, head_dim)
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
