"""Checkpoints to and from the network in JAX, `llama.families.flax_model`, bit for bit."""

from pathlib import Path
from typing import Optional

import torch

from llama import checkpoint
from llama.families.flax_model import Transformer, check_mesh, partition_spec, placed_on, weights
from llama.layers import parallel
from llama.model import ModelArgs

import jax  # isort: skip  # after the module that says what to install
import jax.numpy as jnp  # isort: skip
from jax.sharding import Mesh  # isort: skip


def from_checkpoint(
    source: str | Path | checkpoint.Checkpoint,
    *,
    dtype: Optional[str | torch.dtype] = None,
    mesh: Optional[Mesh] = None,
) -> Transformer:
    """A model with the weights of any checkpoint, read one at a time and strictly.

    Args:
        dtype: of the weights; None leaves each in its own (quantized ones become fp32).
        mesh: devices to share the weights, see `make_mesh`.

    Raises:
        FileNotFoundError, ValueError: what isn't a checkpoint or lacks a weight; a mesh that
            doesn't divide the model.
    """
    if isinstance(source, (str, Path)):
        source = checkpoint.open(source)
    if type(source.args) is not ModelArgs:
        raise ValueError(f"{source.path}: in JAX there is Llama's own network alone")
    checkpoint.check_shapes(source)
    kind = None if dtype is None else parallel.pick_dtype(dtype, torch.device("cpu"))
    model = Transformer(source.args)
    check_mesh(mesh, source.args)
    for name, param in weights(model).items():
        weight = checkpoint.read_shard(source, name, 0, 1, dtype=kind)
        # Else it would stay where torch has it, on the CPU, and be computed with there.
        where = placed_on(mesh, *partition_spec(name)) or jnp.zeros(()).sharding
        # A copy: the source's memory may change, as a file that is mapped or a model in training.
        weight = weight.clone(memory_format=torch.contiguous_format)
        param.set_value(jax.device_put(jnp.from_dlpack(weight), where))
    return model


def to_checkpoint(model: Transformer) -> checkpoint.InMemory:
    """The weights as torch tensors, by Meta's names: for `llama.checkpoint`'s writers, or `load`.

    Where the model is on one CPU device they are its own memory: read them, or copy first.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    return checkpoint.InMemory(
        model.params,
        {
            name: torch.from_dlpack(jax.device_put(param[...], cpu))
            for name, param in weights(model).items()
        },
    )
