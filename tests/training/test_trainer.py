"""Training steps against transformers, peft and torch; resumed = undisturbed, ranks = one."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, random_weights, run_ranks, write_checkpoint
from test_lora import adapter, theirs
from test_model import TOLERANCE, gap, to_hugging_face

from llama.checkpoint.adapter import Adapter, Pair, write_adapter
from llama.layers.revision import revision
from llama.text.files import recovered
from llama.training import (
    IGNORED,
    Recipe,
    Trainer,
    lora,
    next_token_loss,
    recompute_blocks,
    trained,
)
from llama.training.data import Example, batch, order

RECIPE = Recipe(epochs=2, batch_size=4, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)


def examples(n=11, vocab_size=512):
    """Rows of different lengths, of which a beginning isn't learned."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for i in range(n):
        tokens = torch.randint(vocab_size, (6 + 5 * i % 17,), generator=generator).tolist()
        rows.append(Example(tokens, [IGNORED] * (i % 5) + tokens[i % 5 :]))
    return rows


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter, _ in trainer.trained}


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def peers_losses(model, parameters, rows, recipe):
    """The same run by transformers' loss and schedule, and torch's optimizer and clipping."""
    from transformers import get_cosine_schedule_with_warmup

    matrices = [p for p in parameters if p.ndim > 1]
    norms = [p for p in parameters if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}]
    groups += [{"params": norms, "weight_decay": 0.0}] * bool(norms)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    per_epoch = -(-len(rows) // recipe.batch_size)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, recipe.warmup_steps, recipe.epochs * per_epoch
    )
    losses, norms_found = [], []
    for epoch in range(recipe.epochs):
        turn = order(len(rows), epoch, recipe.seed)
        for at in range(0, len(rows), recipe.batch_size):
            tokens, labels = batch([rows[i] for i in turn[at : at + recipe.batch_size]])
            optimizer.zero_grad()
            loss = model(tokens, labels=labels).loss
            loss.backward()
            norms_found.append(float(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)))
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return losses, norms_found


def test_all_weights_learn_as_by_transformers():
    model = to_hugging_face(TINY, random_weights(TINY))
    losses, norms = peers_losses(model, list(model.parameters()), examples(), RECIPE)
    trainer = Trainer(random_model(TINY), examples(), RECIPE)
    steps = list(trainer.run())
    assert len(steps) == trainer.steps == 6
    for step, loss, norm in zip(steps, losses, norms, strict=True):
        assert abs(step.loss - loss) < TOLERANCE and abs(step.norm / norm - 1) < TOLERANCE
    assert losses[-1] < losses[0] - 0.5 and min(norms) > RECIPE.clip
    ours = to_hugging_face(TINY, weights_of(trainer)).state_dict()
    for name, parameter in model.state_dict().items():
        assert gap(ours[name], parameter) < TOLERANCE, name


def test_an_adapter_learns_as_by_peft(tmp_path):
    model = theirs(target_modules="all-linear", r=4)
    model.save_pretrained(tmp_path)
    from llama.checkpoint.adapter import read_adapter

    before = read_adapter(tmp_path, TINY)
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, _ = peers_losses(model, parameters, examples(), RECIPE)
    ours = random_model(TINY).requires_grad_(False)
    lora.attach(ours, before)
    trainer = Trainer(ours, examples(), RECIPE)
    for step, loss in zip(trainer.run(), losses, strict=True):
        assert abs(step.loss - loss) < TOLERANCE
    model.save_pretrained(tmp_path / "after")
    after, found = read_adapter(tmp_path / "after", TINY), lora.adapter_of(ours, "default")
    for name, (A, B, _) in found.pairs.items():
        assert gap(A, after.pairs[name].A) < TOLERANCE and gap(B, after.pairs[name].B) < TOLERANCE
        assert gap(A, before.pairs[name].A) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(
        (p for n, p in ours.named_parameters() if "lora" not in n),
        random_model(TINY).parameters(), strict=True))  # fmt: skip


def test_micro_batches_are_one_batch():
    """Of rows with different numbers of tokens to learn: a mean of means would be another."""
    whole = Trainer(random_model(TINY), examples(), RECIPE)
    parts = Trainer(random_model(TINY), examples(), replace(RECIPE, micro_batches=4))
    for one, two in zip(whole.run(), parts.run(), strict=True):
        assert abs(one.loss - two.loss) < 1e-5 * one.loss
    for name, weight in weights_of(whole).items():
        assert gap(weight, weights_of(parts)[name]) < TOLERANCE


class Saved:
    """Bytes that autograd keeps for the backward pass, weights apart."""

    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.found = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    @property
    def bytes(self):
        return sum(n for n, _ in self.found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_blocks_give_the_same_gradients_and_keep_less(make_model, dtype):
    rows, kept, gradients = examples(8), {}, {}
    tokens, labels = batch(rows)
    for on in (False, True):
        model = make_model(n_layers=6)
        recompute_blocks(model, on)
        saved, low = Saved(model), dtype == torch.bfloat16
        with saved.hooks, torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = next_token_loss(model, tokens, labels)
        kept[on] = saved.bytes
        loss.backward()
        gradients[on] = {name: p.grad for name, p in model.named_parameters()}
    assert same(gradients[False], gradients[True])
    B, T = tokens.shape
    blocks = 5 * B * T * TINY.dim * 4  # of each block but the first, its input at least goes away
    assert kept[True] < kept[False] / 3 and kept[False] - kept[True] > blocks


def test_recomputing_can_be_undone(make_model):
    model, (tokens, labels) = make_model(), batch(examples(2))
    expected = next_token_loss(model, tokens, labels)
    recompute_blocks(model)
    recompute_blocks(model)
    assert torch.equal(next_token_loss(model, tokens, labels), expected)
    recompute_blocks(model, False)
    assert not any("forward" in block.__dict__ for block in model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_is_undisturbed_bit_for_bit(tmp_path, dtype, method, stop):
    def trainer():
        model = random_model(TINY)
        if method == "lora":
            model.requires_grad_(False)
            lora.attach(model, adapter())
        return Trainer(model, examples(), replace(RECIPE, dtype=dtype))

    whole = trainer()
    expected = [step.loss for step in whole.run()]
    first = trainer()
    found = [first.one_step().loss for _ in range(stop)]
    first.save(tmp_path / "state", {"data": "a"})
    second = trainer()
    second.load(tmp_path / "state", {"data": "a"})
    found += [step.loss for step in second.run()]
    assert found == expected and same(weights_of(second), weights_of(whole))
    assert not list(tmp_path.glob(".*"))


def test_a_state_of_another_run_is_refused(tmp_path):
    trainer = Trainer(random_model(TINY), examples(), RECIPE)
    trainer.save(tmp_path / "state", {"data": "a"})
    for rows, recipe, about, complaint in (
        (examples(), RECIPE, {"data": "b"}, "data=a, and this one has b"),
        (examples(), replace(RECIPE, seed=2), {"data": "a"}, "seed=1, and this one has 2"),
        (examples(10), RECIPE, {"data": "a"}, "examples=11, and this one has 10"),
        (examples(11, 500), RECIPE, {"data": "a"}, "other examples: the data, .*, the date in the"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Trainer(random_model(TINY), rows, recipe).load(tmp_path / "state", about)


@pytest.mark.parametrize("world, method", [(2, "full"), (4, "lora"), (4, "full")])
def test_ranks_learn_as_one_does(world, method, tmp_path):
    """Four ranks share two key/value heads; their state resumes bit for bit, too."""
    path = write_checkpoint(tmp_path / "tiny", TINY)
    model, start = random_model(TINY), adapter()
    write_adapter(start, tmp_path / "adapter", TINY)
    if method == "lora":
        model.requires_grad_(False)
        lora.attach(model, start)
    trainer = Trainer(model, examples(), RECIPE)
    steps = list(trainer.run())
    report = run_ranks(
        world, "learned", tmp_path / "out.json", ckpt=str(path), rows=examples(), stop=2,
        adapter=str(tmp_path / "adapter") if method == "lora" else None,
        state=str(tmp_path / "state"), recipe={
            name: value for name, value in vars(RECIPE).items() if name != "dtype"
        },
    )  # fmt: skip
    assert report["whole"] == report["resumed"]
    for (loss, norm), step in zip(report["whole"], steps, strict=True):
        assert abs(loss - step.loss) < TOLERANCE and abs(norm / step.norm - 1) < TOLERANCE
    assert all(losses == report["all_ranks"][0] for losses in report["all_ranks"])
    found = torch.load(tmp_path / "out.json.pt")
    if method == "lora":
        expected = lora.adapter_of(model, "default").pairs
        found = {name: Pair(*pair) for name, pair in found.items()}
        for name, (A, B, _) in expected.items():
            assert gap(A, found[name].A) < TOLERANCE and gap(B, found[name].B) < TOLERANCE
    else:
        for name, weight in weights_of(trainer).items():
            assert gap(weight, found[name]) < TOLERANCE, name


def test_the_learning_rate_is_transformers_schedule():
    from transformers import get_cosine_schedule_with_warmup

    for warmup, steps in ((0, 7), (3, 20), (10, 10)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        recipe = Recipe(learning_rate=0.5, warmup_steps=warmup)
        for step in range(steps):
            assert math.isclose(recipe.rate(step, steps), schedule.get_last_lr()[0], abs_tol=1e-12)
            optimizer.step()
            schedule.step()


def test_what_is_learned_and_how_it_is_split():
    model = random_model(TINY).requires_grad_(False)
    assert trained(model) == []
    name = "layers.0.attention.wo.weight"
    pair = Pair(torch.zeros(2, 64), torch.zeros(64, 2), 1.0)
    lora.attach(model, Adapter({name: pair, name.replace("wo", "wk"): Pair(
        torch.zeros(2, 64), torch.zeros(16, 2), 1.0)}))  # fmt: skip
    found = {part.name.split("attention.")[1]: part.shard_of for part in trained(model)}
    assert found == {
        "wk.lora_A.default": None, "wk.lora_B.default": name.replace("wo", "wk"),
        "wo.lora_A.default": name, "wo.lora_B.default": None,
    }  # fmt: skip


def test_gradients_of_the_last_step_are_gone_before_the_next():
    trainer = Trainer(random_model(TINY), examples(), RECIPE)
    trainer.one_step()
    seen = []
    accumulated = trainer._accumulated

    def watched(chosen):
        seen.append(all(part.parameter.grad is None for part in trainer.trained))
        seen.append(all(held.grad is None for held in trainer._held))
        return accumulated(chosen)

    trainer._accumulated = watched
    trainer.one_step()
    assert seen == [True, True]


def test_what_was_computed_before_a_step_is_outdated(tiny_dir, tmp_path):
    """Kept prefixes of a model in training must not be taken for its own (llama.prefixes)."""
    model, before = random_model(TINY), 0
    trainer = Trainer(model, examples(), RECIPE)
    trainer.one_step()
    assert revision(model) > before
    before = revision(model)
    trainer.save(tmp_path / "state", {})
    trainer.load(tmp_path / "state", {})
    assert revision(model) > before


def test_a_save_that_was_killed_leaves_the_one_before(tmp_path):
    trainer = Trainer(random_model(TINY), examples(), RECIPE)
    trainer.save(tmp_path / "state", {})
    (tmp_path / "state").rename(tmp_path / ".state.old")  # between the two renames
    trainer.one_step()
    with pytest.raises(FileNotFoundError):
        trainer.load(tmp_path / "state", {})
    recovered(tmp_path / "state")
    trainer.load(tmp_path / "state", {})
    assert trainer.step == 0


def test_a_full_disk_is_named_and_leaves_the_one_before(tmp_path, monkeypatch):
    trainer, path = Trainer(random_model(TINY), examples(), RECIPE), tmp_path / "state"
    trainer.save(path, {})
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="is the disk full"):
        trainer.save(path, {})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_damaged_state_is_named(tmp_path):
    """As a power failure leaves it."""
    trainer, path = Trainer(random_model(TINY), examples(), RECIPE), tmp_path / "state"
    trainer.save(path, {})
    for file in sorted(path.glob("*.distcp")) + [path / ".metadata"]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="state can't be read, begin anew with force"):
            trainer.load(path, {})
        file.write_bytes(whole)
    trainer.load(path, {})


def test_nothing_to_learn():
    for model, rows in (
        (random_model(TINY), []),
        (random_model(TINY).requires_grad_(False), examples()),
        (random_model(TINY), [Example([1, 2], [1, IGNORED])]),
    ):
        with pytest.raises(ValueError, match="nothing to learn"):
            Trainer(model, rows, RECIPE)


def test_numbers_out_of_range():
    for change, complaint in (
        ({"epochs": 0}, "epochs=0 must be more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be 0 or more"),
        ({"dtype": torch.float16}, "choose bf16 or fp32"),
        ({"batch_size": 8, "micro_batches": 3}, "batch_size=8 can't be divided into 3 passes"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Recipe(**change)
    trainer = Trainer(random_model(TINY), examples(), replace(RECIPE, learning_rate=1e30))
    with pytest.raises(ValueError, match=r"step \d: the loss is .* lower learning_rate"):
        list(trainer.run())
