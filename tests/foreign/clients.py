"""Clients of OpenAI's API, each in its own environment, against `llama serve`.

    python tests/foreign/clients.py [NAME ...]

The environments, of exact versions (clients.txt, clients.json), are made once, in the cache. What
each client does is in client_checks.py and client_checks.mjs; lm-evaluation-harness' scores over
HTTP are compared with those of `llama eval`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, Dict, List

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from served import serve  # noqa: E402

from llama import Tokenizer  # noqa: E402
from llama.text.cache_dir import cache_dir  # noqa: E402
from llama.text.vocabulary.writing import write_for_hugging_face  # noqa: E402

MODEL = HERE.parent.parent / "checkpoints/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
PYTHON = ("langchain", "llama_index", "litellm", "instructor", "openai_agents", "lm_eval")
NODE = ("openai_js", "vercel_compatible", "vercel_chat", "vercel_responses")
MINUTES = 15  # for an environment to be installed, or a client to be checked

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHOICES = [
    ("The capital of France is", [" Paris", " Berlin"], 0),
    ("Two and two make", [" four", " a boat"], 0),
    ("The sky is", [" loud", " blue"], 0),  # wrong, as are some that follow: scores lie between
    ("Cats like to drink", [" milk", " sand"], 0),
    ("Water freezes at zero", [" degrees", " cats"], 1),
    ("The opposite of hot is", [" cold", " seven"], 0),
]
QUESTIONS = [
    ("What is the capital of France?", "The"), ("Say yes.", "Blue"), ("Is the sky blue?", "Yes"),
    ("How many legs has a cat?", "A"), ("Who wrote Hamlet?", "William"), ("What is 2+2?", "The"),
]  # fmt: skip


def environment(name: str, listing: Path) -> Path:
    """A folder with what the listing names, installed unless the cache has it.

    Raises:
        subprocess.SubprocessError: pip or npm fails, or takes too long.
    """
    digest = hashlib.sha256(listing.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_dir() / f"clients-{name}-{digest}"
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing {listing.name} into {folder}", flush=True)
    if name == "python":
        venv.create(folder, with_pip=True)
        command = [folder / "bin/pip", "install", "--quiet", "--no-deps", "-r", listing]
    else:
        folder.mkdir(parents=True)
        shutil.copyfile(listing, folder / "package.json")
        shutil.copy(HERE / "client_checks.mjs", folder)
        command = ["npm", "install", "--prefix", folder, "--no-audit", "--no-fund"]
    subprocess.run(list(map(str, command)), check=True, timeout=60 * MINUTES)
    (folder / "complete").touch()
    return folder


def write_tasks(folder: Path) -> None:
    """Three tasks of lm-evaluation-harness, and the last also as the model sees its dialogs."""
    folder.mkdir()
    choices = [{"question": q, "choices": c, "answer": a} for q, c, a in CHOICES]
    answers = [{"question": q, "answer": a} for q, a in QUESTIONS]
    dialog = (
        f"<|im_start|>system\\n{SYSTEM}<|im_end|>\\n<|im_start|>user\\n{{{{question}}}}<|im_end|>\\n"
        "<|im_start|>assistant\\n"
    )
    generate = (
        'output_type: generate_until\ndoc_to_target: "{{answer}}"\ntarget_delimiter: ""\n'
        "generation_kwargs: {until: [' ', ',', '.'], max_gen_toks: 8, do_sample: false, "
        'temperature: 0.0}\nmetric_list: [{metric: exact_match}]\ndoc_to_text: "%s"\n'
    )
    text = generate.replace("{{answer}}", "{{choices[answer]}}").replace("' ', ", "")
    for name, docs, task in (
        ("choice", choices, 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
         'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\ntarget_delimiter: ""\n'
         "metric_list: [{metric: acc}]\n"),
        ("text", choices, text % "{{question}}"),
        ("answer", answers, generate % "{{question}}"),
        ("dialog", answers, generate % dialog),
    ):  # fmt: skip
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, docs)))
        given = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        (folder / f"local_{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {json.dumps(given)}\n{task}"
        )


def own_scores(folder: Path) -> Dict[str, float]:
    """The tasks' scores as `llama eval` computes them."""
    command = f"-m llama eval {MODEL} --include_path {folder} --json --parse_special --tasks"
    done = subprocess.run(
        [sys.executable, *command.split(), "local_choice,local_text,local_dialog"],
        capture_output=True, text=True, check=True, timeout=60 * MINUTES,
    )  # fmt: skip
    found = scores(json.loads(done.stdout.splitlines()[-1])["results"])
    found["local_answer"] = found.pop("local_dialog")
    return found


def scores(results: Dict[str, Any]) -> Dict[str, float]:
    return {
        task: next(v for k, v in found.items() if k in ("acc,none", "exact_match,none"))
        for task, found in results.items()
    }


def check(name: str, url: str, folder: Path) -> str:
    """What is wrong with a client; nothing, if all is right."""
    if name in NODE:
        node = environment("node", HERE / "clients.json")
        shutil.copy(HERE / "client_checks.mjs", node)
        command = ["node", node / "client_checks.mjs", name, url, MODEL.stem]
    else:
        python = environment("python", HERE / "clients.txt") / "bin/python"
        command = [python, HERE / "client_checks.py", name, url, MODEL.stem, folder / "tokenizer"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60 * MINUTES, cwd=folder,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # no network
    )  # fmt: skip
    if done.returncode:
        return done.stderr[-3000:] or f"exit code {done.returncode}"
    if name == "lm_eval":
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
        theirs, ours = scores(json.loads(line[8:])), own_scores(folder / "tasks")
        print(f"lm_eval: {theirs}, llama eval: {ours}", flush=True)
        far = [task for task in ours if abs(ours[task] - theirs[task]) > 0.01]
        return f"other scores: {', '.join(far)}" if far else ""
    return ""


def run(names: List[str]) -> int:
    """0 if all clients do all that they should."""
    failed = 0
    own = dict(forked=False)  # the tests' way to start processes needs pytest
    with tempfile.TemporaryDirectory() as temporary, serve(MODEL, "--log=off", **own) as server:
        folder = Path(temporary)
        (folder / "tokenizer").mkdir()
        write_for_hugging_face(Tokenizer(str(MODEL)).vocabulary, folder / "tokenizer")
        write_tasks(folder / "tasks")
        for name in names:
            if name in NODE and not shutil.which("npm"):
                print(f"{name:20} left out: there is no npm", flush=True)
                continue
            began = time.monotonic()
            wrong = check(name, f"{server.url}/v1", folder)
            failed += bool(wrong)
            took = f"{time.monotonic() - began:.0f} s"
            print(f"{name:20} {'FAILS' if wrong else 'works'}  {took}\n{wrong}".strip(), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:] or [*PYTHON, *NODE]))
