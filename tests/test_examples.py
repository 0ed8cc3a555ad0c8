"""The example scripts as a user starts them, and the notebook."""

import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, forked_python, torchrun, write_checkpoint
from vision import TINY_VISION

import example_chat_completion
import example_multimodal_completion
import example_text_completion
from llama import Llama


def run(*command, timeout=300):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )


def test_chat_under_torchrun_says_paris(smollm2_path):
    """As users start it: torchrun itself."""
    done = run(
        Path(sys.executable).parent / "torchrun", "--nproc_per_node", "1",
        "example_chat_completion.py", "--ckpt_dir", "checkpoints/SmolLM2-135M-Instruct",
        "--max_gen_len", "24", "--temperature", "0.6", "--max_seq_len", "512",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    question, answer = done.stdout.split("==")[0].split("> Assistant:")
    assert "What is the capital of France?" in question and "Paris" in answer
    assert done.stdout.count("> Assistant:") == 4
    assert "System: Answer in one short sentence." in done.stdout


def test_text_without_a_launcher(smollm2_path):
    arguments = ["--max_gen_len", "8", "--temperature=0"]
    done = run(*forked_python(), "example_text_completion.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is\n>  Paris" in done.stdout
    assert "cheese =>" in done.stdout and done.stdout.count("\n> ") == 4


def test_text_on_three_ranks_prints_once(smollm2_path):
    arguments = ["--max_gen_len=8", "--temperature=0"]
    done = run(*torchrun(3), "example_text_completion.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is\n>  Paris")
    assert done.stdout.count("\n> ") == 4


def test_more_dialogs_than_max_batch_size_are_answered_in_turns(smollm2_path):
    arguments = ["--max_gen_len=4", "--max_batch_size=1", "--temperature=0"]
    done = run(*forked_python(), "example_chat_completion.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> Assistant:") == 4


def test_images_without_a_launcher(tmp_path):
    path = write_checkpoint(tmp_path / "model", TINY_VISION)
    arguments = ["--ckpt_dir", path, "--max_gen_len", "8", "--temperature=0"]
    done = run(*forked_python(), "example_multimodal_completion.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "User: [image] What is this?\n\n> Assistant: " in done.stdout
    assert "[image] If I had to write a haiku for this\n> " in done.stdout
    done = run(*forked_python(), "example_multimodal_completion.py", *arguments, "--image=none.png")
    assert done.returncode == 1 and "error: no such image file: none.png" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["example_chat_completion.py", "example_text_completion.py"])
def test_help_and_mistakes(script, monkeypatch, capfd):
    """The script as the main program: once in a process of its own, else in this one."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return exit.value.code, *capfd.readouterr()

    monkeypatch.chdir(ROOT)
    done = run(sys.executable, script, "--ckpt_dir", "nowhere")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: no checkpoint at nowhere" in done.stderr and done.stdout == ""
    code, out, err = main("--help")
    assert code == 0 and "ckpt_dir" in out + err
    for arguments, message in (
        (["--ckpt_dir", "nowhere"], "error: no checkpoint at nowhere: `llama download smollm2`"),
        (["--max_seq_len", "0"], "error: max_seq_len=0 must be at least 1"),
        (["--ckpt-dir=x", "--max_new_tokens", "8"], "error: there is no option --max_new_tokens: "),
        (["--max_seq_len=8", "--no-x"], "there are --ckpt_dir, --tokenizer_path, --temperature"),
    ):
        code, out, err = main(*arguments)  # a text: python prints it and ends with 1, as above
        assert message in str(code) and "Traceback" not in err and out == ""


def test_arguments_are_metas():
    metas = {"ckpt_dir", "tokenizer_path", "temperature", "top_p", "max_seq_len", "max_batch_size"}
    for script in (example_chat_completion, example_text_completion):
        parameters = inspect.signature(script.main).parameters
        assert set(parameters) == metas | {"max_gen_len"}
    parameters = inspect.signature(example_multimodal_completion.main).parameters
    assert set(parameters) == metas | {"max_gen_len", "image"}
    assert parameters["max_seq_len"].default >= 2467 + 512  # an image of Llama 4, and an answer
    for script in (example_chat_completion, example_text_completion, example_multimodal_completion):
        parameters = inspect.signature(script.main).parameters
        assert parameters["temperature"].default == 0.6 and parameters["top_p"].default == 0.9


def test_metas_own_script_runs_unchanged(smollm2_path):
    """The calls that Meta's example_chat_completion.py makes, keywords and all."""
    generator = Llama.build(
        ckpt_dir=str(smollm2_path.parent),
        tokenizer_path=str(smollm2_path),
        max_seq_len=512,
        max_batch_size=4,
    )
    dialogs = [[{"role": "user", "content": "what is the recipe of mayonnaise?"}]]
    results = generator.chat_completion(dialogs, max_gen_len=4, temperature=0.6, top_p=0.9)
    for dialog, result in zip(dialogs, results, strict=True):
        assert dialog[0]["content"]
        assert result["generation"]["role"].capitalize() == "Assistant"
        assert isinstance(result["generation"]["content"], str)
    assert generator.model and generator.tokenizer and generator.formatter


@pytest.mark.parametrize(
    "name, says, images",
    [
        ("quickstart", "Paris", 1),
        ("tools", "2100000 people live in Paris", 0),
        ("server", "The capital of France is Paris", 0),
        ("attention", "30 layers of (1, 9, ", 2),
        ("images", "2 layers of (8, ", 2),
    ],
)
def test_notebooks_run_from_top_to_bottom(smollm2_path, tmp_path, name, says, images):
    import nbformat
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    if name == "images":  # a tiny model in the place of one of 11 billion parameters
        path = str(write_checkpoint(tmp_path / "vision", TINY_VISION))
        for cell in notebook.cells:
            cell.source = cell.source.replace("checkpoints/Llama-3.2-11B-Vision-Instruct", path)
    kernel = AsyncKernelManager(kernel_name="python3")
    kernel.kernel_spec.argv[:1] = forked_python()
    NotebookClient(
        notebook, kernel, timeout=300, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.get("outputs", [])
    ]
    text = "".join(output.get("text", "") for output in outputs)
    assert says in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == images
