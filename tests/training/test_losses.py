"""Losses and gradients against transformers, on one rank and on several."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, random_weights, run_ranks, write_checkpoint
from test_model import TOLERANCE, gap, ids, to_hugging_face

from llama.training import IGNORED, next_token_loss, summed_loss


def example(args=TINY):
    """Tokens, labels of which some are ignored, embeddings, and a mask of one's own."""
    tokens = ids(2, 14, vocab_size=args.vocab_size)
    labels = tokens.clone()
    labels[0, :5] = labels[1, 9:] = labels[1, 3] = IGNORED
    embeds = torch.randn(2, 14, args.dim, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(14, 14, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, :, :4, :4] = True  # a prefix whose tokens see each other
    mask[1, :, 8:, :8] = False  # two sequences in a row
    return {"tokens": tokens, "labels": labels, "embeds": embeds, "mask": mask}


def theirs(args, tokens, labels, embeds=None, mask=None):
    """transformers' loss, logits and gradients, these as a model of weights."""
    model = to_hugging_face(args, random_weights(args))
    given = {"input_ids": tokens} if embeds is None else {"inputs_embeds": embeds}
    if mask is not None:
        given["attention_mask"] = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)
    out = model(**given, labels=labels)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(args, ours, expected):
    """Every one, in transformers' names and order of rows. Where it has none ours are zero."""
    for name, gradient in to_hugging_face(args, ours).state_dict().items():
        if name in expected:
            assert expected[name].abs().max() > 1e-5, name
            assert gap(gradient, expected[name]) <= TOLERANCE, name
        elif name != "lm_head.weight" or not args.tied_embeddings:
            assert not gradient.abs().max(), name


@pytest.mark.parametrize("shape", [{}, {"tied_embeddings": True}], ids=["", "tied"])
def test_loss_and_gradients_equal_transformers(shape):
    args = replace(TINY, **shape)
    given = example(args)
    for inputs in (("tokens",), ("embeds", "mask")):
        chosen = {name: given[name] for name in ("tokens", "labels", *inputs)}
        out, expected = theirs(args, **chosen)
        model = random_model(args)
        loss = next_token_loss(
            model, given[inputs[0]], given["labels"], mask=given["mask"] if inputs[1:] else None
        )
        assert gap(loss, out.loss) < 1e-5
        loss.backward()
        ours = {
            name: p.grad if p.grad is not None else torch.zeros_like(p)
            for name, p in model.named_parameters()
        }
        check_gradients(args, ours, expected)


@pytest.mark.parametrize("world, shape", [
    (2, {}),
    (4, {"vocab_size": 514, "hidden_dim": 90, "tied_embeddings": True}),  # padded, heads shared
], ids=["2 ranks", "4 ranks"])  # fmt: skip
def test_ranks_equal_transformers(world, shape, tmp_path):
    """No rank sees a whole row of logits, and yet: logits, losses, gradients of every weight."""
    args = replace(TINY, **shape)
    path, given = write_checkpoint(tmp_path / "tiny", args), example(args)
    torch.save(given, tmp_path / "given.pt")
    found = run_ranks(world, "gradients", tmp_path / "out.json", ckpt=str(path),
                      given=str(tmp_path / "given.pt"))  # fmt: skip
    for case, inputs in {"plain": ("tokens",), "masked": ("embeds", "mask")}.items():
        chosen = {name: given[name] for name in ("tokens", "labels", *inputs)}
        out, expected = theirs(args, **chosen)
        assert all(abs(loss - float(out.loss.detach())) < 1e-5 for loss in found[case])
        saved = torch.load(tmp_path / f"out.json.{case}.pt")
        assert gap(saved.pop("logits"), out.logits.detach()) < TOLERANCE
        norm = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt()
        assert abs(saved.pop("norm") - float(norm)) < TOLERANCE
        check_gradients(args, saved, expected)


def test_sums_of_small_batches_are_that_of_a_large_one():
    model, given = random_model(TINY), example()
    whole, n = summed_loss(model, given["tokens"], given["labels"])
    parts = [summed_loss(model, given["tokens"][i, None], given["labels"][i, None]) for i in (0, 1)]
    assert n == sum(count for _, count in parts) == 16
    assert gap(whole, parts[0][0] + parts[1][0]) < 1e-4 * float(whole.detach())


def test_labels_that_cannot_be():
    model, given = random_model(TINY), example()
    tokens, labels = given["tokens"], given["labels"]
    with pytest.raises(ValueError, match=r"labels of shape \(2, 13\) for tokens \(2, 14\)"):
        next_token_loss(model, tokens, labels[:, 1:])
    with pytest.raises(ValueError, match="ids from 0 to 511, or -100"):
        next_token_loss(model, tokens, labels.masked_fill(labels == IGNORED, 512))
    with pytest.raises(ValueError, match="all labels are ignored"):
        next_token_loss(model, tokens, torch.full_like(labels, IGNORED))


@pytest.mark.parametrize("wrong", [-1, -100, 512])
def test_tokens_outside_of_the_vocabulary_are_refused(wrong):
    """Padding with -1 or another tokenizer's ids, even where nothing is learned of them."""
    model, given = random_model(TINY), example()
    given["tokens"][1, 12] = wrong
    given["labels"][1, 12] = IGNORED
    with pytest.raises(ValueError, match=f"row 1 has the token id {wrong}: .* knows 0 to 511"):
        next_token_loss(model, given["tokens"], given["labels"])
