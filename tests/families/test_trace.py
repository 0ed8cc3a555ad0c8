"""What is recorded of a forward pass, against transformers; recording changes nothing."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, random_weights, run_ranks, write_checkpoint
from test_model import TOLERANCE, gap, ids, to_hugging_face
from vision import ROWS, TINY_VISION, images_of

from llama.backends import cpu as native
from llama.families.trace import trace


@pytest.fixture(scope="module")
def theirs():
    return to_hugging_face(TINY, random_weights(TINY))


def recorded(theirs, tokens):
    with torch.inference_mode():
        return theirs(tokens, output_hidden_states=True, output_attentions=True)


def test_states_and_attentions_equal_transformers(theirs):
    tokens, model = ids(2, 17), random_model(TINY)
    expected = recorded(theirs, tokens)
    with torch.inference_mode(), trace(model) as seen:
        logits = model(tokens)
    assert gap(logits, expected.logits) < TOLERANCE
    assert len(seen.hidden_states) == TINY.n_layers + 1 == len(expected.hidden_states)
    for ours, other in zip(seen.hidden_states, expected.hidden_states, strict=True):
        assert gap(ours, other) < TOLERANCE
    for ours, other in zip(seen.attentions, expected.attentions, strict=True):
        assert gap(ours, other) < 1e-5
    # q · k of what was recorded is what the probabilities are made of.
    q, k = seen.queries[0][0], seen.keys[0][0]
    group = TINY.n_heads // TINY.n_kv_heads
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) / TINY.head_dim**0.5
    scores = scores + torch.full((17, 17), -torch.inf).triu(1)
    assert gap(scores.softmax(-1), seen.attentions[0][0]) < 1e-5


def test_recording_changes_nothing_and_leaves_nothing():
    model, tokens = random_model(TINY), ids(1, 9)
    with torch.inference_mode():
        expected = model(tokens)
        with pytest.raises(RuntimeError), trace(model) as seen:
            assert gap(model(tokens), expected) < 1e-5
            raise RuntimeError
        states = [*seen.hidden_states]
        assert torch.equal(model(tokens), expected)
    assert all(a is b for a, b in zip(seen.hidden_states, states, strict=True))
    assert all("attend" not in block.attention.__dict__ for block in model.layers)


def test_steps_on_a_cache_are_rows_of_the_whole(theirs):
    model, tokens = random_model(TINY), ids(2, 12)
    expected = recorded(theirs, tokens)
    cache = model.new_cache(2)
    with torch.inference_mode(), trace(model) as seen:
        for begin, end in ((0, 5), (5, 6), (6, 12)):
            model(tokens[:, begin:end], begin, cache)
            for ours, other in zip(seen.attentions, expected.attentions, strict=True):
                assert gap(ours, other[:, :, begin:end, :end]) < 1e-5
            for ours, other in zip(seen.hidden_states, expected.hidden_states, strict=True):
                assert gap(ours, other[:, begin:end]) < TOLERANCE


def test_gradients_flow_through_what_is_recorded(theirs):
    tokens, model = ids(1, 8), random_model(TINY)
    out = theirs(tokens, output_attentions=True, output_hidden_states=True)
    (out.attentions[1].square().sum() + out.hidden_states[1].sum()).backward()
    with trace(model) as seen:
        model(tokens)
    (seen.attentions[1].square().sum() + seen.hidden_states[1].sum()).backward()
    weight = model.layers[0].feed_forward.w1.weight
    assert gap(weight.grad, theirs.model.layers[0].mlp.gate_proj.weight.grad) < TOLERANCE
    theirs.zero_grad()


def test_two_ranks_record_all_heads(tmp_path, theirs):
    path = write_checkpoint(tmp_path / "tiny", TINY)
    tokens = ids(1, 7)
    report = run_ranks(2, "traced", tmp_path / "out.json", ckpt=str(path), tokens=tokens.tolist())
    expected = recorded(theirs, tokens)
    for name in ("attentions", "hidden_states"):
        for ours, other in zip(report[name], getattr(expected, name), strict=True):
            assert gap(torch.tensor(ours), other) < TOLERANCE


def test_compiled_layers_are_refused():
    model = native.swap(random_model(replace(TINY, dim=128, n_heads=2, n_kv_heads=1, head_dim=64)))
    with pytest.raises(ValueError, match="compile=False"), trace(model):
        pass


def test_attention_to_images():
    """What is recorded is what the output is made of; hidden states stay those of the layers."""
    model = random_model(TINY_VISION)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name:  # of which zeros would hide what they let pass
                weight.fill_(0.7)
    tokens, images = torch.tensor(ROWS), images_of(ROWS)
    with torch.inference_mode():
        encoded = [[model.encode(*one) for one in row] for row in images]
        expected = model(tokens, images=encoded)
        with trace(model) as seen:
            assert gap(model(tokens, images=encoded), expected) < 1e-5
            again = model(tokens[:1], images=encoded[:1])
        assert gap(again, expected[:1]) < 1e-5
        assert torch.equal(model(tokens, images=encoded), expected)  # nothing is left
    layers = seen.cross_attentions
    assert len(layers) == len(model.cross_attention_layers) == 2
    [run] = layers[0]  # of the first row: one image, from its token on
    positions = encoded[0][0][0].shape[2]
    assert run.shape == (TINY_VISION.n_heads, len(ROWS[0]) - 1, positions)
    assert gap(run.sum(-1), torch.ones(run.shape[:2])) < 1e-5
    assert len(seen.hidden_states) == TINY_VISION.n_layers + 1
    # Of the values, so weighted, the first layer's output is made.
    block = model.cross_attention_layers[0].attention
    found: dict = {}
    hook = block.wo.register_forward_pre_hook(lambda _, given: found.update(x=given[0]))
    with torch.inference_mode():
        model(tokens[:1], images=encoded[:1])
    hook.remove()
    values = encoded[0][0][1][0].repeat_interleave(TINY_VISION.n_heads // TINY_VISION.n_kv_heads, 0)
    assert gap((run @ values).transpose(0, 1).flatten(1), found["x"]) < 1e-5
