"""Copies of a model that learn together, by DDP and FSDP2, with tensor parallelism and without:
as one process does; stopped on some ranks and resumed on others.

With LLAMA_TRAINING, as in `make soak`, for 50 steps rather than 20, and on more ranks.
"""

import json
import os
import random
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, run_ranks, write_checkpoint
from ranks import learn
from test_model import gap
from test_trainer import examples

from llama import checkpoint
from llama.apps.finetune import finetune
from llama.checkpoint import weight_shapes
from llama.checkpoint.shapes import local_shape
from llama.layers import parallel
from llama.text.files import recovered
from llama.training import Recipe, Trainer, devices, saved
from llama.training.run import read_log

ROWS = examples(40)
THOROUGH = bool(os.environ.get("LLAMA_TRAINING"))
EPOCHS = 10 if THOROUGH else 4
RECIPE = dict(epochs=EPOCHS, batch_size=8, learning_rate=3e-3, warmup_steps=3, weight_decay=0.1)
STEPS, SAVED_AT = 5 * EPOCHS, 4 * EPOCHS
FULL = dict(rows=ROWS, recipe=RECIPE)
# Eleven examples: the last step of an epoch has three, and a pass of it none for some copies.
LORA = dict(
    rows=examples(11), recipe=RECIPE | {"epochs": 2, "micro_batches": 2, "lora_dropout": 0.1},
    adapter={"rank": 4, "alpha": 8.0},
)  # fmt: skip
LAYOUTS = {  # ranks, ranks of a copy, FSDP2 or DDP
    "ddp": (2, 1, False),
    "fsdp": (2, 1, True),
    "2 x 2": (4, 2, True),
}
RESUMED = ["fsdp"]
if THOROUGH:  # 8 ranks share two key/value heads
    LAYOUTS |= {"2 x 2, ddp": (4, 2, False), "3 copies": (3, 1, True), "2 x 4": (8, 4, True)}
    RESUMED = [*LAYOUTS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("copies") / "tiny", TINY)


@pytest.fixture(scope="module")
def alone(base):
    """What one process learns, and the states that it leaves."""
    state = str(base.parent / "alone")
    return {
        "state": state,
        "full": learn(str(base), **FULL, save=state, at=SAVED_AT),
        "lora": learn(str(base), **LORA),
    }


@pytest.fixture(scope="module")
def together(base, alone):
    """By layout, the same on several ranks: runs from the beginning, and from one rank's state."""
    reports = {}

    def ask(layout):
        if layout not in reports:
            world, size, shard = LAYOUTS[layout]
            how, out = dict(size=size, shard=shard), base.parent / f"{layout}.json"
            state = str(base.parent / layout)
            jobs = {
                "full": FULL | how | dict(save=state, at=SAVED_AT),
                "lora": LORA | how | dict(pack=True),
                "resumed": FULL | how | dict(load=alone["state"]),
            }
            if layout not in RESUMED:
                del jobs["resumed"]
            found = run_ranks(world, "copies_learn", out, ckpt=str(base), jobs=jobs)
            for job in jobs:
                found[job]["learned"] = torch.load(f"{out}.{job}.pt")
            reports[layout] = found | {"state": state}
        return reports[layout]

    return ask


def assert_alike(steps, expected):
    for (loss, norm), (other, other_norm) in zip(steps, expected, strict=True):
        assert abs(loss - other) <= 1e-5 * other and abs(norm - other_norm) <= 1e-4 * other_norm


def furthest(found, expected):
    """The largest difference, relative to the largest value of each weight."""
    assert found.keys() == expected.keys()
    return max(gap(found[name], expected[name]) / expected[name].abs().max() for name in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_copies_learn_as_one_process_does(method, layout, alone, together):
    """Losses, norms of gradients, the loss of others, of all steps; packed and dropped, too."""
    found, (expected, learned) = together(layout)[method], alone[method]
    if method == "full":
        assert len(found["steps"]) == STEPS + 1
    assert_alike(found["steps"], expected["steps"])
    assert all(rank["steps"] == found["steps"] for rank in found["all_ranks"])
    assert furthest(found["learned"], learned) <= 1e-4


@pytest.mark.parametrize("layout", RESUMED)
def test_a_state_of_one_rank_goes_on_where_there_are_several(layout, alone, together):
    found, (expected, learned) = together(layout)["resumed"], alone["full"]
    assert_alike(found["steps"], expected["steps"][SAVED_AT:])
    assert furthest(found["learned"], learned) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_of_several_ranks_goes_on_where_there_is_one(layout, base, together):
    expected = together(layout)["full"]
    report, learned = learn(str(base), **FULL, load=together(layout)["state"])
    assert_alike(report["steps"], expected["steps"][SAVED_AT:])
    assert furthest(expected["learned"], learned) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_rank_holds(layout, alone, together):
    """Weights, gradients and moments: all of them by DDP, an equal part by FSDP2."""
    (world, size, shard), (expected, _) = LAYOUTS[layout], alone["full"]
    copies, whole = world // size, expected["held"]
    for held in (rank["held"] for rank in together(layout)["full"]["all_ranks"]):
        part = whole / (copies if shard else 1)
        assert held <= part / size * 1.06  # norms are whole in each rank of a copy


def test_killed_at_any_step_and_resumed_on_another_number_of_ranks(base, tmp_path):
    """`kill -9`, of one of two ranks, in the step after."""
    run = dict(rows=ROWS, recipe=RECIPE | {"epochs": 2})  # 10 steps
    died, state = random.Random(os.getpid()).randrange(4, 10), str(tmp_path / "state")
    job = run | dict(size=1, shard=True, save=state, at=4, die=died)
    with pytest.raises(AssertionError):  # it reports no success
        run_ranks(2, "copies_learn", tmp_path / "out", ckpt=str(base), jobs={"full": job})
    assert not (tmp_path / "out").exists()
    recovered(tmp_path / "state")
    report, learned = learn(str(base), **run, load=state)
    expected, weights = learn(str(base), **run)
    assert_alike(report["steps"], expected["steps"][4:])
    assert furthest(learned, weights) <= 1e-5


def test_the_command_on_two_copies(base, tmp_path):
    """Its log, held-out losses and result are those of one rank."""
    lines = [json.dumps({"text": "lamp " * (3 + i % 7) + str(i)}) for i in range(22)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = dict(
        data=str(tmp_path / "data.jsonl"), ckpt_dir=str(base), method="full", dtype="fp32",
        device="cpu", model_parallel_size=1, held_out=5, epochs=1, batch_size=4, max_seq_len=64,
        learning_rate=1e-3,
    )  # fmt: skip
    together = {"options": options | {"out": str(tmp_path / "2")}}
    said = run_ranks(2, "finetuned", tmp_path / "out", **together)["stderr"]
    assert "on each of 1 rank(s) x 2" in said
    finetune(**options, out=str(tmp_path / "1"))
    logs = [read_log(tmp_path / ranks / "log.jsonl") for ranks in "12"]
    for one, two in zip(*logs, strict=True):
        one.pop("seconds", None), two.pop("seconds", None)
        assert one == pytest.approx(two, rel=1e-4)
    one, two = (checkpoint.open(tmp_path / ranks / "model") for ranks in "12")
    for name, (n, *_) in weight_shapes(TINY).items():
        assert gap(one.read(name, 0, 0, n), two.read(name, 0, 0, n)) < 1e-4, name


HEADS = [(8, 2), (8, 8), (12, 4), (9, 3), (6, 1)]  # query heads, key/value heads


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_chunks_of_all_ranks_make_up_the_whole_once(world, heads, monkeypatch):
    """Of weights whose padding, or whose heads on several ranks, are written by none or one."""
    n_heads, n_kv_heads = heads
    if n_heads % world:
        pytest.skip("such a number of ranks is refused")
    args = replace(
        TINY, n_heads=n_heads, n_kv_heads=n_kv_heads, dim=n_heads * 4, head_dim=4, hidden_dim=90,
        vocab_size=131,
    )  # fmt: skip
    monkeypatch.setattr(parallel, "world_size", lambda: world)
    for name, shape in weight_shapes(args).items():
        weight = name if parallel.shard_axis(name) is not None else None
        written, held = torch.zeros(shape), torch.zeros(shape)
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            part = torch.zeros(local_shape(args, name, rank, world))
            found = saved.whole(part, weight, args)
            assert found.shape == shape
            for offsets, tensor, first in found.chunks:
                box = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
                held[box] += 1
                written[box] += first and (rank == 0 or weight is not None)  # DCP writes it once
                tensor += 1
            if world == 1:
                assert part.min() == 1
        assert (written == 1).all() and (held >= 1).all()


def test_more_copies_than_examples_are_refused(monkeypatch):
    model = random_model(TINY)
    monkeypatch.setattr(devices, "copies", lambda: 3)
    with pytest.raises(ValueError, match="3 copies of the model can't share the 2 examples"):
        Trainer(model, ROWS, Recipe(batch_size=4, micro_batches=2))
