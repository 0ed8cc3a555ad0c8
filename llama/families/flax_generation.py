"""Generation with `llama.families.flax_model`: prefill and decoding, each one compiled function.

    generate(model, [[1, 2, 3], [4, 5]], max_gen_len=16)

`llama.engine` doesn't run it: that takes each token to Python, draws the next one and changes its
batch, which XLA can't trace; it would pay for a dispatch and a copy to the host at each step. Here
the whole loop is one `jax.lax.while_loop` on the device, with what can be compiled: greedy decoding
or a temperature, and stop tokens.
"""

import math
from functools import partial
from typing import Collection, List, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from llama.families.flax_model import KVCache, Transformer, mesh_of, placed_on
from llama.layers.ids import check_ids
from llama.model import ModelArgs

ROUND = 256  # a cache's length is a multiple of this, so that few lengths are compiled for


@partial(jax.jit, donate_argnames="cache")
def _prefill(model: Transformer, tokens: jax.Array, cache: KVCache) -> KVCache:
    """Prompts (B, T), padded on the right, into a cache. Nothing is projected to the vocabulary."""
    model.hidden(tokens, 0, cache)
    return cache


@partial(jax.jit, donate_argnames=("tokens", "cache"))
def _decode(
    model: Transformer,
    tokens: jax.Array,  # (B, S): ids where they stand
    lengths: jax.Array,  # (B,): how many of them are there
    limits: jax.Array,  # (B,): how many there may be
    cache: KVCache,  # all but the last token of each row
    stops: jax.Array,
    temperature: float,
    key: jax.Array,
) -> Tuple[jax.Array, jax.Array, KVCache]:
    """Token after token until each row is at its limit or a stop token.

    Returns:
        tokens and lengths as they are then; and the cache, so that its memory can be written to.
    """
    rows = jnp.arange(len(tokens))

    def draw(logits: jax.Array, lengths: jax.Array) -> jax.Array:
        keys = jax.vmap(partial(jax.random.fold_in, key))(lengths)  # the batch plays no part
        return jax.vmap(jax.random.categorical)(keys, logits / temperature)

    def step(state):
        tokens, lengths, live, cache = state
        # The barrier keeps XLA from converting all weights ahead of the loop, to fp32 or
        # transposed, which would double the model and (bf16 on a CPU) the time of a step.
        here, lengths = jax.lax.optimization_barrier((model, lengths))
        newest = tokens[rows, lengths - 1]
        logits = here(newest[:, None], lengths - 1, cache)[:, 0]
        new = jax.lax.cond(
            temperature > 0, draw, lambda logits, _: logits.argmax(-1), logits, lengths
        ).astype(tokens.dtype)
        # A row that has ended goes on computing its newest token, which changes nothing.
        tokens = tokens.at[rows, lengths - ~live].set(jnp.where(live, new, newest))
        lengths += live
        return tokens, lengths, live & (lengths < limits) & ~jnp.isin(new, stops), cache

    state = tokens, lengths, lengths < limits, cache
    tokens, lengths, _, cache = jax.lax.while_loop(lambda state: state[2].any(), step, state)
    return tokens, lengths, cache


def generate(
    model: Transformer,
    prompt_tokens: Sequence[Sequence[int]],
    max_gen_len: int,
    temperature: float = 0.0,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
) -> List[List[int]]:
    """Continue prompts of token ids, of any mixture of lengths: the new ids of each.

    The loop is compiled once for a number of rows and a context rounded up to ROUND, prefill once
    for a power of two.

    Args:
        max_gen_len: new tokens at most; a row also ends with max_seq_len tokens in all.
        temperature: 0 takes the most probable token each time.
        stop_tokens: ids that end a row, themselves left out.
        seed: a row's tokens depend on it and its prompt, and not on the batch that it is in.

    Raises:
        ValueError: no prompts, an empty or too long one, ids outside of the vocabulary, or numbers
            out of range.
    """
    args, mesh = model.params, mesh_of(model)
    _check_prompts(args, prompt_tokens, max_gen_len, temperature)
    # Rows that are no one's fill up what the mesh's axis "data" shares.
    missing = 0 if mesh is None else -len(prompt_tokens) % mesh.shape["data"]
    prompts = [list(prompt) for prompt in prompt_tokens] + [[0]] * missing
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    limits = np.minimum(lengths + max_gen_len, args.max_seq_len)
    limits[len(prompt_tokens) :] = 1
    room = min(-(-int(limits.max()) // ROUND) * ROUND, args.max_seq_len)
    width = min(1 << int(lengths.max() - 1).bit_length(), room)

    ids = np.zeros((len(prompts), room), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens = jax.device_put(ids, placed_on(mesh, "data"))
    cache = _prefill(model, tokens[:, :width], model.new_cache(len(prompts), room))
    stops, key = jnp.array(sorted(stop_tokens), jnp.int32), jax.random.key(seed)
    tokens, ends, _ = _decode(model, tokens, lengths, limits, cache, stops, temperature, key)
    found = []
    for row, begin, end in zip(np.asarray(tokens), lengths, np.asarray(ends), strict=True):
        new = row[begin:end].tolist()
        found.append(new[:-1] if new and new[-1] in stop_tokens else new)
    return found[: len(prompt_tokens)]


def _check_prompts(
    args: ModelArgs, prompts: Sequence[Sequence[int]], max_gen_len: int, temperature: float
) -> None:
    if not prompts:
        raise ValueError("no prompts: pass at least one")
    if max_gen_len < 0 or not 0 <= temperature < math.inf:
        raise ValueError(f"{max_gen_len=} and {temperature=}: both must be 0 or more")
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= args.max_seq_len:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens: this model takes 1 to {args.max_seq_len}"
            )
    check_ids(prompts, args.vocab_size)
