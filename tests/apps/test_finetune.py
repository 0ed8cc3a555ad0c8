"""finetune.py as a command: broken off and resumed, its results in every format, its errors."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    forked_python,
    llama_command,
    random_weights,
    torchrun,
    write_checkpoint,
)
from served import wait_for
from test_model import gap, ids, to_hugging_face

from llama import Llama, Tokenizer, checkpoint, training
from llama.apps.finetune import finetune as main
from llama.apps.plot import plot
from llama.backends import memory
from llama.checkpoint import InMemory, meta
from llama.checkpoint.adapter import Merged, read_adapter
from llama.families.llama4 import Llama4Args
from llama.text import templates
from llama.text.templates import TemplateFormat
from llama.training import Trainer, run

DIALOG = [
    {"role": "user", "content": "What is the word?"},
    {"role": "assistant", "content": "The word is lamp."},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("finetune")
    write_checkpoint(path / "base", replace(TINY, max_seq_len=128))
    lines = [{"messages": [{**DIALOG[0], "content": "?" * (1 + i)}, DIALOG[1]]} for i in range(20)]
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


OPTIONS = {
    "held_out": 4, "batch_size": 4, "max_seq_len": 128, "epochs": 6, "learning_rate": 0.01,
    "device": "cpu",
}  # fmt: skip


def here(base, out, **more):
    """The command's function, in this process."""
    where = {"data": str(base / "data.jsonl"), "ckpt_dir": str(base / "base")}
    main(out=str(out), **(where | OPTIONS | more))


def start(base, out, *more, ranks=1, script=None):
    """The command, in processes of its own."""
    command = llama_command() if script is None else [*forked_python(), str(script)]
    if ranks > 1:
        command = [*torchrun(ranks), "-m", "llama"]
    command = [*command, "finetune", str(base / "data.jsonl"), "--out", str(out)]
    command += ["--ckpt_dir", str(base / "base"), *more]
    command += [f"--{name}={value}" for name, value in OPTIONS.items()]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, cwd=base,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finetune(base, out, *more, ranks=1):
    """(exit status, stdout, stderr)."""
    process = start(base, out, *more, ranks=ranks)
    said = process.communicate(timeout=300)
    return process.returncode, *said


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    """What a run may be told from another by: all but the clock."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in log(out)]


@pytest.fixture(scope="module")
def whole(base):
    """A run to the end."""
    code, printed, said = finetune(base, base / "whole")
    assert code == 0 and printed == "" and "Traceback" not in said, said
    return base / "whole", said


def test_a_run_lowers_the_loss_and_says_so(whole, base):
    out, said = whole
    assert "16 examples to learn from, 4 held out, 24 steps" in said
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "log.jsonl", "loss.png"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    held_out = {line["step"]: line["held_out_loss"] for line in log(out) if "held_out_loss" in line}
    assert list(held_out) == [*range(0, 25, 4)] and held_out[24] < held_out[0] - 2
    for step, loss in held_out.items():
        assert f"step {step}: held-out loss {loss:.4f}" in said
    steps = [line for line in log(out) if "loss" in line]
    assert [line["step"] for line in steps] == [*range(1, 25)]
    assert all(line["tokens"] > 0 and line["seconds"] > 0 for line in steps)


WAITING = """
import signal
from llama.__main__ import main
from llama.training import Trainer

learned = Trainer.one_step

def one_step(trainer):
    if trainer.step == 8:
        signal.pause()
    return learned(trainer)

Trainer.one_step = one_step
raise SystemExit(main())
"""


def interrupted(base, out, number):
    """The command, stopped once it has done six steps, which goes no further than eight."""
    script = out.with_suffix(".py")
    script.write_text(WAITING)
    process = start(base, out, "--save_every", "2", script=script)
    lines = out / "log.jsonl"
    wait_for(lambda: lines.exists() and len(lines.read_text().splitlines()) > 7)
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_broken_off_and_resumed_is_undisturbed(number, whole, base, tmp_path):
    out = tmp_path / "run"
    code, said = interrupted(base, out, number)
    assert code != 0 and not (out / "adapter").exists()
    if number == signal.SIGINT:
        assert code == 130 and "interrupted after step" in said and "Traceback" not in said
        with pytest.raises(ValueError, match="seed=1, and this one has 5"):  # another run
            here(base, out, seed=5)
    code, _, said = finetune(base, out, "--save_every", "2")
    assert code == 0 and "going on after step" in said, said
    assert losses(out) == losses(whole[0])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, expected = (path / "adapter" / name for path in (out, whole[0]))
        assert ours.read_bytes() == expected.read_bytes()
    assert not (out / "state").exists()


@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_an_adapters_weights_in_every_format(to, base, tmp_path):
    """Is the base with the adapter that the same run writes."""
    here(base, tmp_path / "run", to=to, dtype="fp32")
    here(base, tmp_path / "adapter", dtype="fp32")
    source = checkpoint.open(base / "base")
    expected = Merged(source, read_adapter(tmp_path / "adapter" / "adapter", source.args))
    found = checkpoint.open(tmp_path / "run" / ("model.gguf" if to == "gguf" else "model"))
    for name, shape in checkpoint.weight_shapes(source.args).items():
        assert torch.equal(found.read(name, 0, 0, shape[0]), expected.read(name, 0, 0, shape[0]))


@pytest.mark.slow
def test_all_weights_on_two_ranks(base, tmp_path):
    """What two ranks learned and wrote is what one did, and transformers reads it."""
    from transformers import AutoModelForCausalLM

    options = {"method": "full", "dtype": "fp32", "recompute": True, "micro_batches": 2}
    here(base, tmp_path / "1", **options)
    written = [f"--{name}={value}" for name, value in options.items()]
    code, _, said = finetune(base, tmp_path / "2", *written, ranks=2)
    assert code == 0, said
    one, two = ([line.get("loss", line.get("held_out_loss")) for line in log(tmp_path / ranks)]
                for ranks in ("1", "2"))  # fmt: skip
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-3
    logits = {}
    for ranks in (1, 2):
        written = json.loads((tmp_path / str(ranks) / "model" / "config.json").read_text())
        known = checkpoint.open(base / "base").args.max_seq_len
        assert written["max_position_embeddings"] == known != 128  # which is the examples'
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(ranks) / "model")
        with torch.inference_mode():
            logits[ranks] = model(ids(1, 9)).logits
    start = to_hugging_face(TINY, random_weights(TINY))(ids(1, 9)).logits
    assert gap(logits[1], logits[2]) < 1e-2 < 0.5 < gap(logits[1], start.detach())

    llama = Llama.build(tmp_path / "1" / "model", base / "base" / "tokenizer.model",
                        device="cpu", dtype="fp32", max_seq_len=128)  # fmt: skip
    [answer] = llama.chat_completion([DIALOG[:1]], temperature=0, max_gen_len=40)
    assert answer["generation"]["content"] == DIALOG[1]["content"]
    assert answer["finish_reason"] == "stop"  # the end of the answer was learned, too


ERRORS = {
    "--method='half': choose lora or full": {"method": "half"},
    "choose hf, meta or gguf, or for lora adapter": {"method": "full", "to": "adapter"},
    "--held_out=20 of 20 examples leaves none .* at most 19": {"held_out": 20},
    "lora alpha 0 must be a number other than 0": {"lora_alpha": 0},
    "lora rank 0": {"lora_rank": 0},
    "--lora_rank=8 is for --method lora": {"method": "full", "lora_rank": 8},
    "--lora_alpha=8 is for --method lora": {"method": "full", "lora_alpha": 8},
    "--lora_matrices=wq is for --method lora": {"method": "full", "lora_matrices": "wq"},
    "--lora_dropout=0.1 is for --method lora": {"method": "full", "lora_dropout": 0.1},
    "lora matrices 'qkv_proj': choose some of wq, wk.* q_proj": {"lora_matrices": "wq,qkv_proj"},
    "batch_size=0 must be more than 0": {"batch_size": 0},
    "--max_seq_len=1 from 2": {"max_seq_len": 1},
    "learning_rate=0 must be more than 0": {"learning_rate": 0},
    "torch.float16: small gradients would be lost": {"dtype": "fp16"},
}


@pytest.mark.parametrize("complaint", ERRORS)
def test_errors(complaint, base, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        here(base, tmp_path / "run", **ERRORS[complaint])
    assert not (tmp_path / "run").exists()


def test_examples_longer_than_the_model_was_trained_for_are_said(base, tmp_path, capfd):
    known = checkpoint.open(base / "base").args.max_seq_len
    for length in (known, known + 1):
        here(base, tmp_path / str(length), epochs=1, held_out=16, max_seq_len=length)
        noted = f"base was trained for {known} tokens at most" in capfd.readouterr().err
        assert noted == (length > known)


def test_a_warmup_that_never_ends_is_said(base, tmp_path, capfd):
    for warmup in (1, 2):  # of a single step
        here(base, tmp_path / str(warmup), epochs=1, held_out=16, warmup_steps=warmup)
        said = "1 steps end within --warmup-steps=2: the learning rate never reaches 0.01"
        assert (said in capfd.readouterr().err) == (warmup == 2)


def test_a_second_interrupt_does_not_wait_for_the_step(base, tmp_path, monkeypatch):
    """The first waits, as do copies of it that launchers send; a step may take minutes."""
    now, out, learned = [0.0], tmp_path / "run", Trainer.one_step

    def slow(trainer):
        if trainer.step == 3:
            for now[0] in (5.0, 5.1, 9.0):
                signal.raise_signal(signal.SIGINT)
            raise AssertionError("it waits")
        return learned(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="the last save"):
        patch.setattr("llama.apps.finetune.time.monotonic", lambda: now[0])
        patch.setattr(Trainer, "one_step", slow)
        here(base, out, save_every=2)
    assert now == [9.0] and (out / "state" / "about.json").exists()
    here(base, out, save_every=2)
    assert [line["step"] for line in log(out) if "loss" in line] == [*range(1, 25)]


def test_a_file_in_the_place_of_the_directory_is_refused_before_data_is_read(base, tmp_path):
    (tmp_path / "run").write_text("a file")
    for out in ("run", "run/a/b"):
        with pytest.raises(FileExistsError, match="run is a file: --out is a directory"):
            here(base, tmp_path / out, data="nowhere", force=True)


def test_what_cannot_be_packed_is_refused_before_it_is_read(base, tmp_path):
    args = Llama4Args(**vars(TINY), num_experts=2, expert_dim=64)
    meta.write(InMemory(args, random_weights(args)), tmp_path / "llama4")
    with pytest.raises(ValueError, match="Llama4Transformer counts positions .* without --pack"):
        here(base, tmp_path / "run", ckpt_dir=str(tmp_path / "llama4"), pack=True, data="nowhere")
    assert not (tmp_path / "run").exists()


def test_what_cannot_fit_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr("llama.backends.memory.available", lambda device: 1000)
    with pytest.raises(ValueError, match=r"this can't fit: .* Ways out: --method lora"):
        here(base, tmp_path / "run", method="full")
    need = memory.estimate(TINY, 1, torch.float32).weights
    monkeypatch.setattr("llama.backends.memory.available", lambda device: 2 * need)
    here(base, tmp_path / "run", dtype="fp32", epochs=1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # four that share the memory
    with pytest.raises(ValueError, match=r"this can't fit: .* Ways out: --dtype bf16"):
        here(base, tmp_path / "other", dtype="fp32", epochs=1)


def test_a_run_that_is_done_is_left_alone(whole, base, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    code, printed, said = finetune(base, out)
    assert (code, printed) == (1, "") and said.startswith("error: ") and "run is done" in said
    assert losses(out) == losses(whole[0])
    here(base, out, force=True, epochs=1)
    assert len(log(out)) < len(log(whole[0]))


def test_a_forced_run_that_broke_off_goes_on_without_force(whole, base, tmp_path, monkeypatch):
    """And what was there stays until the new result is complete."""
    out = shutil.copytree(whole[0], tmp_path / "run")
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    learned = Trainer.one_step

    def broken_off(trainer):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
        return learned(trainer)

    monkeypatch.setattr(Trainer, "one_step", broken_off)
    with pytest.raises(
        KeyboardInterrupt, match="step 4: the same command, without --force, goes on"
    ):
        here(base, out, force=True, seed=5)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before
    here(base, out, seed=5)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() != before
    assert [line["step"] for line in log(out) if "loss" in line] == [*range(1, 25)]
    with pytest.raises(FileExistsError, match="adapter exists, this run is done"):
        here(base, out, method="full")  # nor is a run of another kind put beside it


DATED = """\
{{ strftime_now('%d %b %Y') }}{% for message in messages %}<|start_header_id|>{{ message.role }}\
<|end_header_id|>{{ message.content }}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"""


def test_a_run_whose_template_writes_the_date_goes_on_another_day(base, tmp_path, monkeypatch):
    """With the date of its first, which all its examples have."""
    monkeypatch.setattr(templates, "chat_format", lambda ids, _: TemplateFormat(ids, DATED))
    learned, read, seen = Trainer.one_step, training.read_examples, []

    def noted(*args):
        examples = read(*args)
        seen.append(Tokenizer(str(base / "base/tokenizer.model")).decode(examples.rows[0].tokens))
        return examples

    def broken_off(trainer):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
        return learned(trainer)

    monkeypatch.setattr(training, "read_examples", noted)

    def on(day, **options):
        monkeypatch.setattr(run, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, day)))
        here(base, tmp_path / "run", **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "one_step", broken_off)
        on(1)
    on(2)
    on(3, force=True)
    assert [text.partition("<")[0] for text in seen] == ["01 Jan 2026"] * 2 + ["03 Jan 2026"]


def test_a_forced_run_that_died_before_its_first_save_is_not_done(
    whole, base, tmp_path, monkeypatch
):
    out = shutil.copytree(whole[0], tmp_path / "run")
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Trainer, "one_step", lambda trainer: 1 / 0)
        here(base, out, force=True, seed=5)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before
    here(base, out, seed=5, epochs=1)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() != before
    assert [line["step"] for line in log(out) if "loss" in line] == [*range(1, 5)]


def test_a_forced_run_leaves_one_result(whole, base, tmp_path):
    """Else the next run would name the one before as done."""
    out = shutil.copytree(whole[0], tmp_path / "run")
    for to, name in (("hf", "model"), ("gguf", "model.gguf"), ("adapter", "adapter")):
        here(base, out, to=to, force=True, epochs=1)
        assert {path.name for path in out.iterdir()} == {name, "log.jsonl", "loss.png"}
        with pytest.raises(FileExistsError, match=f"{name} exists, this run is done"):
            here(base, out, to=to)


def test_a_directory_of_other_things_is_not_taken_for_a_result(base, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "network.py").write_text("")
    with pytest.raises(FileExistsError, match="model holds no model or adapter: another --out"):
        here(base, tmp_path / "run", force=True)


def test_what_fails_after_the_last_step_costs_no_step(base, tmp_path, monkeypatch):
    """A disk that is full, a file cut off while it was written."""
    out = tmp_path / "run"

    def full(*args, **options):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("llama.training.run.write_adapter", full)
        here(base, out)
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "los')
    monkeypatch.setattr(Trainer, "one_step", None)  # none is taken any more
    shutil.copytree(out / "state", out / ".state.done")  # of a run killed as it cleaned up
    here(base, out)
    assert (out / "adapter").exists() and not list(out.glob(".*"))
    assert [line["step"] for line in log(out) if "loss" in line] == [*range(1, 25)]


def test_another_base_is_another_run(base, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "base", replace(TINY, max_seq_len=128))
    shutil.copy(base / "data.jsonl", tmp_path)
    monkeypatch.setattr("llama.training.run.write_adapter", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here(tmp_path, tmp_path / "run")
    shutil.rmtree(path)
    write_checkpoint(path, replace(TINY, max_seq_len=128), seed=1)
    with pytest.raises(ValueError, match="is of a run with base="):
        here(tmp_path, tmp_path / "run")


def test_the_base_is_never_overwritten(base, tmp_path):
    write_checkpoint(tmp_path / "run" / "model", replace(TINY, max_seq_len=128))
    for method, to in (("lora", "hf"), ("full", "hf"), ("lora", "adapter")):
        with pytest.raises(ValueError, match="holds the model itself that is to be learned"):
            main(
                str(base / "data.jsonl"), out=str(tmp_path / "run"), method=method, to=to,
                ckpt_dir=str(tmp_path / "run" / "model"), force=True, **OPTIONS,
            )  # fmt: skip


def test_without_matplotlib_it_is_drawn_later(base, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        here(base, run, epochs=1, held_out=0)
        said = capfd.readouterr().err
        assert f"no loss.png: pip install 'llama-reference[train]', then llama plot {run}" in said
        assert sorted(path.name for path in run.iterdir()) == ["adapter", "log.jsonl"]
        with pytest.raises(ValueError, match=r"pip install 'llama-reference\[train\]'"):
            plot(str(run))
        with pytest.raises(FileExistsError, match="this run is done"):
            here(base, run)
    plot(str(run))
    drawn = (run / "loss.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and f"written: {run / 'loss.png'}" in capfd.readouterr().err
    (run / "loss.png").unlink()
    with pytest.raises(FileExistsError, match="this run is done"):  # nothing else is done again
        here(base, run)
    assert (run / "loss.png").read_bytes() == drawn


def test_a_run_can_be_drawn_before_it_is_done(tmp_path):
    with pytest.raises(FileNotFoundError, match="no log.jsonl in"):
        plot(str(tmp_path))
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "los')
    with pytest.raises(ValueError, match="log.jsonl is empty"):
        plot(str(tmp_path))
    log.write_text('{"step": 0, "held_out_loss": 3.5}\n{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    plot(str(tmp_path))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_matrices_go_by_hugging_faces_names_too(base, tmp_path):
    here(base, tmp_path / "run", epochs=1, lora_matrices="q_proj, wv")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_help_names_every_argument():
    said = subprocess.run(
        [sys.executable, "-m", "llama", "finetune", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in inspect.signature(main).parameters:
        assert f"--{name.replace('_', '-')} " in said.stdout.replace(",", " "), name
