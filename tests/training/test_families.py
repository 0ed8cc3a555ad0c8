"""Learning with other families' networks: against transformers; resumed = undisturbed."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, random_weights, run_ranks, write_byte_tokenizer
from test_model import TOLERANCE, gap, ids
from test_trainer import RECIPE, examples, same, weights_of
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from llama import SequenceClassifier
from llama.checkpoint import InMemory, huggingface, meta
from llama.checkpoint.safetensors import interleave
from llama.families.llama4 import Llama4Args
from llama.families.names import HF, WithBiases
from llama.families.variants import VariantArgs
from llama.training import Example, Trainer, next_token_loss
from llama.training.token_classification import TokenClassifier

BIASES = dict(attention_bias=True, mlp_bias=True)
GRANITE = dict(
    embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.11,
    logits_scaling=6.0,
)  # fmt: skip
VARIANTS = {
    name: VariantArgs(**{**vars(TINY), **fields})
    for name, fields in {
        "granite": GRANITE | BIASES | dict(vocab_size=515),  # which ranks pad
        "mistral": dict(sliding_window=8),
        "smollm3": dict(no_rope_layers=(1,)),
        "biases": BIASES,
    }.items()
}
LLAMA4 = Llama4Args(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=512, max_seq_len=128,
    num_experts=16, expert_dim=64, nope_layer_interval=2, attention_chunk_size=8, use_qk_norm=True,
)  # fmt: skip
FEW = [Example(row.tokens[:4], row.tokens[:4]) for row in examples(6)]  # most experts get no token


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By name: transformers' model with random weights, and its directory."""
    found = {}

    def make(name):
        if name not in found:
            args, path = VARIANTS[name], tmp_path_factory.mktemp(name) / "hf"
            huggingface.write(InMemory(args, random_weights(args)), path)
            write_byte_tokenizer(path / "tokenizer.model")
            theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            found[name] = theirs, path
        return found[name]

    return make


def gradients(theirs, args, **given):
    """transformers' loss, and gradients by Meta's names."""
    theirs.zero_grad()
    loss = theirs(**given).loss
    loss.backward()
    found = {}
    for name, parameter in theirs.named_parameters():
        name, gradient = WithBiases(HF).meta(name), parameter.grad
        if ".wq." in name or ".wk." in name:
            gradient = interleave(gradient, args.head_dim)
        found[name] = gradient
    return loss.detach(), found


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_transformers(made, name):
    args, tokens = VARIANTS[name], ids(2, 20)
    loss, expected = gradients(made(name)[0], args, input_ids=tokens, labels=tokens)
    model = random_model(args)
    ours = next_token_loss(model, tokens, tokens)
    assert gap(ours, loss) < 1e-5
    ours.backward()
    for weight, parameter in model.named_parameters():
        assert gap(parameter.grad, expected.pop(weight)) <= TOLERANCE, weight
    assert not expected
    assert abs(Trainer(model, FEW, RECIPE).loss([Example(row, row) for row in tokens.tolist()])
               - loss) < 1e-5  # fmt: skip


def test_ranks_compute_granites_loss(made, tmp_path):
    (theirs, path), args, tokens = made("granite"), VARIANTS["granite"], ids(2, 20)
    embeds = torch.randn(2, 20, args.dim, generator=torch.Generator().manual_seed(3)) / 12
    causal = torch.ones(20, 20, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    given = {"tokens": tokens, "labels": tokens, "embeds": embeds, "mask": causal}
    torch.save(given, tmp_path / "given.pt")
    found = run_ranks(
        2, "gradients", tmp_path / "out.json", ckpt=str(path), given=str(tmp_path / "given.pt")
    )
    for case, inputs in (("plain", {"input_ids": tokens}), ("masked", {"inputs_embeds": embeds})):
        loss, expected = gradients(theirs, args, labels=tokens, **inputs)
        assert all(abs(one - float(loss)) < 1e-5 for one in found[case])
        ours = torch.load(tmp_path / f"out.json.{case}.pt")
        for weight, gradient in expected.items():
            assert gradient is None or gap(ours[weight], gradient) <= TOLERANCE, weight


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", [SequenceClassifier, TokenClassifier])
def test_heads_stand_on_transformers_hidden_states(made, kind, name, tmp_path):
    """And what transformers' classes with a head would compute as a Llama isn't written."""
    theirs, path = made(name)
    ours, tokens = kind.build(path, labels=["a", "b"], device="cpu", dtype="fp32"), ids(2, 20)
    with torch.no_grad():
        states = theirs.model(tokens).last_hidden_state
        assert gap(ours.model.hidden(tokens), states) <= TOLERANCE < 0.1 < states.abs().max()
    if name != "biases":
        with pytest.raises(ValueError, match=f"model_type='{name}': Llama.*state_dict"):
            ours.write(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        return
    one_row, whole = ids(1, 20), torch.tensor([20])
    is_sequence = kind is SequenceClassifier
    peer = LlamaForSequenceClassification if is_sequence else LlamaForTokenClassification
    again = peer.from_pretrained(ours.write(tmp_path / "new"), dtype=torch.float32).eval()
    back = kind.build(tmp_path / "new", device="cpu", dtype="fp32")
    with torch.no_grad():
        found = again(one_row).logits
        for classifier in (ours, back):
            mine = classifier(one_row, whole) if is_sequence else classifier(one_row)
            assert gap(mine, found) <= TOLERANCE


def test_experts_that_no_token_chose_learn_from_zeros():
    """An optimizer, its state on disk and copies of the model take gradients of all weights."""
    model = random_model(LLAMA4)
    next_token_loss(model, ids(1, 3), ids(1, 3)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    of_experts = [e.w1.weight.grad for block in model.layers for e in block.feed_forward.experts]
    assert any(not gradient.any() for gradient in of_experts)
    assert any(gradient.any() for gradient in of_experts)


def test_experts_resume_undisturbed_and_learn_on_copies_as_one_process_does(tmp_path):
    def trainer():
        return Trainer(random_model(LLAMA4), FEW, replace(RECIPE, batch_size=2))

    whole, first, second = trainer(), trainer(), trainer()
    expected = list(whole.run())
    for _ in range(4):
        first.one_step()
    first.save(tmp_path / "state", {})
    second.load(tmp_path / "state", {})
    for one in (first, second):  # gone on, and resumed
        list(one.run())
        assert same(weights_of(one), weights_of(whole))

    path = meta.write(InMemory(LLAMA4, random_weights(LLAMA4)), tmp_path / "m")
    recipe = {key: value for key, value in vars(RECIPE).items() if key != "dtype"}
    job = dict(rows=FEW, recipe=recipe | {"batch_size": 2})
    jobs = {"ddp": job | {"shard": False}, "fsdp": job | {"shard": True}}
    report = run_ranks(2, "copies_learn", tmp_path / "out", ckpt=str(path), jobs=jobs)
    for name in jobs:
        steps = report[name]["steps"][: len(expected)]  # then the loss of others
        for (loss, norm), step in zip(steps, expected, strict=True):
            assert abs(loss - step.loss) <= 1e-4 and abs(norm / step.norm - 1) <= 1e-3


def test_examples_of_llama_4_are_not_packed():
    with pytest.raises(ValueError, match=r"Llama4Transformer counts .* without --pack"):
        Trainer(random_model(LLAMA4), FEW, RECIPE, pack=True)
