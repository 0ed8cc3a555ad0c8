"""The log of a run as TensorBoard reads it."""

import sys

import pytest

from llama.training.run import Log, event_files, read_log


def test_tensorboard_reads_what_the_log_says(tmp_path):
    """Also after a run that went on from an earlier step than it was killed at."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path / "log.jsonl", 0, tensorboard=True)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 4.0 - step})
    again = Log(tmp_path / "log.jsonl", 2, tensorboard=True)
    for line in ({"step": 3, "loss": 0.5}, {"step": 3, "held_out_loss": 0.25}):
        again.write(line)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = {
        name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]
    }
    assert values == {"loss": [(1, 3.0), (2, 2.0), (3, 0.5)], "held_out_loss": [(3, 0.25)]}


def test_without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match=r"--tensorboard needs pip install 'llama-reference\[train\]'"
    ):
        event_files()


def test_a_damaged_line_is_named(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "los\n{"step": 3}\n{"st')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2 is damaged: take it out"):
        read_log(log)
    log.write_text('{"step": 1}\n{"st')  # what a killed run leaves
    assert read_log(log) == [{"step": 1}]
