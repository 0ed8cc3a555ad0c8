"""The network against transformers and Meta's own, and against itself in other orders of work."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from conftest import TINY, random_model, random_weights
from transformers import LlamaConfig, LlamaForCausalLM

from llama import ModelArgs, Transformer
from llama.backends import cpu as native
from llama.layers import parallel
from llama.model import rope_frequencies

TOLERANCE = 1e-4  # fp32, outputs of the order of 1 to 10


def ids(rows: int, length: int, seed: int = 0, vocab_size: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (rows, length), generator=generator)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert a.isfinite().all()
    return (a - b).abs().max().item()


def to_hugging_face(args: ModelArgs, weights) -> LlamaForCausalLM:
    """transformers' model with the same weights, q and k permuted into its split-half layout."""
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope = {
            "rope_type": "llama3",
            "rope_theta": args.rope_theta,
            "factor": args.rope_scaling_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_max_seq_len,
        }
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=131072,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=args.tied_embeddings,
        attn_implementation="eager",
    )
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "model.embed_tokens",
        "output.weight": "lm_head.weight",
    }
    state = {}
    for name, weight in weights.items():
        if ".wq." in name or ".wk." in name:
            heads = weight.shape[0] // args.head_dim
            pairs = weight.view(heads, args.head_dim // 2, 2, -1)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name if name.startswith(("model.", "lm_head")) else "model." + name
        state[name] = weight
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


SHAPES = {
    "grouped-query": {},
    "multi-head": {"n_kv_heads": 8},
    "multi-query": {"n_kv_heads": 1},
    "tied": {"tied_embeddings": True},
    "explicit head_dim": {"head_dim": 16},
    "theta 500000, eps 1e-6": {"rope_theta": 500000.0, "norm_eps": 1e-6},
    "scaled by 8": {"use_scaled_rope": True},
    "scaled by 32": {"use_scaled_rope": True, "rope_scaling_factor": 32.0},
    "scaled, other values": {
        "use_scaled_rope": True,
        "rope_scaling_factor": 4.0,
        "rope_low_freq_factor": 2.0,
        "rope_high_freq_factor": 8.0,
        "rope_original_max_seq_len": 64,
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_transformers(shape):
    args = replace(TINY, **{"head_dim": TINY.head_dim, **shape})
    tokens = ids(3, 100)
    theirs = to_hugging_face(args, random_weights(args))
    with torch.no_grad():
        assert gap(random_model(args)(tokens), theirs(tokens).logits) <= TOLERANCE


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rope_equals_transformers_far_beyond_8192(factor):
    """RoPE constants that are wrong pass every short test (llama-models issue 241)."""
    args = replace(
        TINY,
        head_dim=64,  # has frequencies of all three kinds
        rope_theta=500000.0,
        use_scaled_rope=True,
        rope_scaling_factor=factor,
        max_seq_len=40000,
    )
    theirs, ours = to_hugging_face(args, random_weights(args)), random_model(args)
    for start in (8190, 20000, 39900):
        # A window of the long context, at its positions: relative positions alone aren't enough
        # to tell, so some tokens come from the beginning.
        tokens = ids(1, 60)
        positions = torch.cat([torch.arange(30), torch.arange(start, start + 30)])
        with torch.no_grad():
            expected = theirs(tokens, position_ids=positions[None]).logits
            cache = ours.new_cache(1, start + 30)
            ours(tokens[:, :30], 0, cache)
            # what lies between is there but unseen by transformers: leave it out here, too
            cache.reserve(start)
            cache.lengths = [start]
            got = _forward_with_gap(ours, tokens[:, 30:], start, cache, seen=30)
        assert gap(got, expected[:, 30:]) <= TOLERANCE


def _forward_with_gap(model, tokens, start, cache, seen):
    """The model's forward, with the keys between `seen` and `start` masked."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def masked(q, k, v, attn_mask, **kwargs):
        attn_mask = attn_mask.clone()
        attn_mask[..., seen:start] = -math.inf
        return attend(q, k, v, attn_mask=attn_mask, enable_gqa=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.model.F.scaled_dot_product_attention", masked)
        return model(tokens, start, cache)


def test_whole_context_beyond_8192_equals_transformers():
    args = replace(TINY, n_layers=1, use_scaled_rope=True, max_seq_len=8400)
    tokens = ids(1, 8400)
    model, theirs = random_model(args), to_hugging_face(args, random_weights(args))
    theirs.config._attn_implementation = "sdpa"
    with torch.no_grad():
        got = model.logits(model.hidden(tokens)[:, -100:])
        expected = theirs(tokens, logits_to_keep=100).logits
    assert gap(got, expected) <= TOLERANCE


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_equal_metas_own_model(scaled):
    from llama_models.llama3 import args as meta_args
    from llama_models.llama3 import model as meta_model

    args = replace(TINY, hidden_dim=None, multiple_of=32, use_scaled_rope=scaled, max_seq_len=256)
    ours = random_model(args)
    theirs = meta_model.Transformer(
        meta_args.ModelArgs(
            dim=args.dim,
            n_layers=args.n_layers,
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads,
            vocab_size=args.vocab_size,
            multiple_of=args.multiple_of,
            norm_eps=args.norm_eps,
            rope_theta=args.rope_theta,
            use_scaled_rope=scaled,
            max_batch_size=2,
            max_seq_len=256,
        )
    )
    theirs.load_state_dict(random_weights(args), strict=True)
    tokens = ids(2, 200)
    with torch.no_grad():
        cache = ours.new_cache(2)
        assert gap(ours(tokens), theirs(tokens, 0)) <= TOLERANCE
        assert gap(ours(tokens[:, :150], 0, cache), theirs(tokens[:, :150], 0)) <= TOLERANCE
        for pos in range(150, 160):
            now = tokens[:, pos : pos + 1]
            assert gap(ours(now, pos, cache), theirs(now, pos)) <= TOLERANCE


def test_rope_frequencies_equal_metas_to_the_last_bit():
    from llama_models.llama3.model import apply_scaling

    args = replace(TINY, head_dim=128)
    plain = rope_frequencies(args)
    scaled = rope_frequencies(replace(args, use_scaled_rope=True))
    assert torch.equal(scaled, apply_scaling(plain))


@pytest.mark.parametrize("length", [1, 2, 17])
def test_cached_equals_uncached(make_model, length):
    model, tokens = make_model(), ids(2, 40)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(2)
        parts = [model(tokens[:, :length], 0, cache)]
        parts += [model(tokens[:, i : i + 1], i, cache) for i in range(length, 40)]
    assert gap(torch.cat(parts, 1), whole) <= TOLERANCE


@pytest.mark.parametrize("seed", range(8))
def test_chunked_prefill_equals_whole_for_any_split(make_model, seed):
    """A mask that ignores start_pos passes until a chunk has several tokens (llama PR 177)."""
    model, tokens = make_model(), ids(2, 60, seed)
    cuts = torch.randint(1, 60, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = [0, *sorted(set(cuts)), 60]
    with torch.no_grad():
        whole, cache = model(tokens), model.new_cache(2)
        parts = [model(tokens[:, a:b], a, cache) for a, b in pairwise(bounds)]
    assert gap(torch.cat(parts, 1), whole) <= TOLERANCE


@pytest.mark.parametrize("chunk", [1, 3])
def test_rows_at_different_lengths_equal_each_row_alone(make_model, chunk):
    model, lengths = make_model(), [5, 1, 23, 12]
    rows = [ids(1, n + chunk, seed=n) for n in lengths]
    padded = torch.zeros(4, max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        padded[row, :n] = rows[row][0, :n]
    with torch.no_grad():
        cache = model.new_cache(4)
        first = model(padded, 0, cache)
        cache.truncate(lengths)
        new = torch.cat([row[:, -chunk:] for row in rows])
        second = model(new, lengths, cache)
        for row, n in enumerate(lengths):
            alone = model(rows[row])
            assert gap(first[row : row + 1, :n], alone[:, :n]) <= TOLERANCE
            assert gap(second[row : row + 1], alone[:, n:]) <= TOLERANCE
        assert cache.lengths == [n + chunk for n in lengths]


def test_garbage_behind_a_truncated_cache_is_never_seen(make_model):
    """Neither stale entries nor padding may leak into attention (unsloth 1066, mlx-lm 1906)."""
    model, tokens = make_model(), ids(2, 30)
    with torch.no_grad():
        clean = model.new_cache(2)
        model(tokens[:, :10], 0, clean)
        dirty = model.new_cache(2)
        model(ids(2, 30, seed=9), 0, dirty)
        dirty.k[:, :, :, 10:] = 1e6
        dirty.truncate([10, 10])
        dirty.k[:, :, :, :10] = clean.k[:, :, :, :10]
        dirty.v[:, :, :, :10] = clean.v[:, :, :, :10]
        for start, stop in ((10, 11), (11, 15), (15, 16)):
            now = tokens[:, start:stop]
            assert torch.equal(model(now, start, clean), model(now, start, dirty))


def test_uncached_forward_is_causal(make_model):
    model, tokens = make_model(), ids(1, 20)
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 512
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert gap(before[:, 12:], after[:, 12:]) > 0.1


def test_gradients_equal_transformers():
    """`model(tokens)` is differentiable, through every weight."""
    tokens, weights = ids(2, 24), random_weights(TINY)
    ours, theirs = random_model(TINY), to_hugging_face(TINY, weights)
    for logits in (ours(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert set(gradients) == set(weights)
    expected = to_hugging_face(TINY, weights)
    state = dict(expected.named_parameters())
    for parameter, source in zip(state.values(), theirs.parameters(), strict=True):
        parameter.data = source.grad
    permuted = to_hugging_face(TINY, gradients)
    for name, gradient in permuted.state_dict().items():
        assert gap(gradient, state[name].data) <= TOLERANCE, name


def test_bfloat16_stays_close_and_keeps_rope_in_fp32(make_model):
    """Positions are exact in fp32 only: bf16 can't even count to 257."""
    model = make_model(max_seq_len=2048)
    tokens = ids(1, 1500)
    with torch.no_grad():
        exact = model(tokens)
        rounded = model.to(torch.bfloat16)(tokens)
    assert model.freqs.dtype == torch.float32
    agreement = (exact.argmax(-1) == rounded.argmax(-1)).float()
    assert agreement[:, -500:].mean() > 0.9


def test_scores_do_not_repeat_key_value_heads(make_model):
    """Grouped-query attention must not expand the cache to n_heads."""
    model, tokens = make_model(), ids(1, 4)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.append(k.shape[1])
        return attend(q, k, v, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("llama.model.F.scaled_dot_product_attention", spy)
        cache = model.new_cache(1)
        model(tokens, 0, cache)
        model(tokens[:, :1], 4, cache)
    assert set(seen) == {TINY.n_kv_heads}


def test_embeddings_positions_and_masks_equal_transformers():
    """Soft prompts; two sequences packed into a row; a prefix whose tokens see each other."""
    model, theirs = random_model(TINY), to_hugging_face(TINY, random_weights(TINY))
    tokens = ids(2, 12)

    def added(mask):
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)

    soft = torch.randn(2, 3, TINY.dim, generator=torch.Generator().manual_seed(1))
    embeds = torch.cat([soft, model.tok_embeddings(tokens).detach()], 1)
    assert gap(model(embeds), theirs(inputs_embeds=embeds).logits) < TOLERANCE

    positions = torch.cat([torch.arange(5), torch.arange(7)])
    document = torch.tensor([0] * 5 + [1] * 7)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    packed = causal & (document[:, None] == document)
    shown = dict(positions=positions, mask=packed)
    expected = theirs(tokens, position_ids=positions.expand(2, -1),
                      attention_mask=added(packed.expand(2, 1, -1, -1))).logits  # fmt: skip
    assert gap(model(tokens, **shown), expected) < TOLERANCE
    alone = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], 1)
    assert gap(model(tokens, **shown), alone) < TOLERANCE

    prefix = causal.repeat(2, 1, 1, 1)
    prefix[0, :, :4, :4] = prefix[1, :, :7, :7] = True
    expected = theirs(tokens, attention_mask=added(prefix)).logits
    assert gap(model(tokens, mask=prefix), expected) < TOLERANCE
    cache = model.new_cache(2)  # the prefix at once, the rest in steps
    found = [model(tokens[:, :7], 0, cache, mask=prefix[:, :, :7, :7])]
    found += [model(tokens[:, i : i + 1], i, cache, mask=prefix[:, :, i : i + 1, : i + 1])
              for i in range(7, 12)]  # fmt: skip
    assert gap(torch.cat(found, 1), expected) < TOLERANCE


def test_masks_that_cannot_be(make_model):
    model, tokens = make_model(), ids(2, 4)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    for mask in (causal.float(), causal[:3], causal.expand(3, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"bool, of shape \(4, 4\) or \(2, 1, 4, 4\)"):
            model(tokens, mask=mask)
    with pytest.raises(ValueError, match="sees nothing"):
        model(tokens, mask=causal & (torch.arange(4) > 0))
    model = native.swap(make_model(dim=128, n_heads=2, n_kv_heads=1, head_dim=64))
    with pytest.raises(ValueError, match="take no mask of your own: build with compile=False"):
        model(tokens, mask=causal)


def test_start_pos_errors(make_model):
    model = make_model()
    cache = model.new_cache(2, 10)
    with pytest.raises(ValueError, match="needs a cache"):
        model(ids(2, 3), 1)
    with pytest.raises(ValueError, match="from 0 to 0"):
        model(ids(2, 3), 4, cache)
    with pytest.raises(ValueError, match="room for 10"):
        model(ids(2, 11), 0, cache)
    with pytest.raises(ValueError, match="each of 2 rows"):
        model(ids(2, 3), [0], cache)
    with pytest.raises(ValueError, match=">= 0"):
        model(ids(2, 3), -1, cache)
    assert cache.lengths == [0, 0]


def test_model_args_have_metas_names_and_derive_metas_shapes():
    metas = "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps"
    metas += " rope_theta max_batch_size max_seq_len use_scaled_rope"
    assert set(metas.split()) <= {field.name for field in fields(ModelArgs)}
    # Llama 3 8B and 70B, Llama 2 7B, Llama 3.2 1B, as published
    assert ModelArgs(dim=4096, ffn_dim_multiplier=1.3, multiple_of=1024).hidden_dim == 14336
    assert (
        ModelArgs(dim=8192, n_heads=64, ffn_dim_multiplier=1.3, multiple_of=4096).hidden_dim
        == 28672
    )
    assert ModelArgs(dim=4096, multiple_of=256).hidden_dim == 11008
    assert ModelArgs(dim=2048, ffn_dim_multiplier=1.5, multiple_of=256).hidden_dim == 8192
    assert ModelArgs(n_heads=32).n_kv_heads == 32
    with pytest.raises(ValueError, match="n_heads=8 isn't a multiple of n_kv_heads=3"):
        ModelArgs(dim=64, n_heads=8, n_kv_heads=3)
    with pytest.raises(ValueError, match="dim=65"):
        ModelArgs(dim=65, n_heads=8)
    with pytest.raises(TypeError):
        ModelArgs(vision_chunk_size=448)


def test_building_leaves_the_process_as_it_was():
    before = torch.get_default_dtype(), torch.tensor(1.0).device, torch.get_rng_state()
    parallel.initialize(device="cpu")
    Transformer(TINY)
    after = torch.get_default_dtype(), torch.tensor(1.0).device, torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
