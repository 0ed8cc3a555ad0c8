"""What the tests share: a tiny random model, a byte-level tokenizer, the two real assets, ranks."""

import atexit
import base64
import gc
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

# Workers take turns on the cores (`pytest_xdist_auto_num_workers`); more threads would wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test has two threads after all, one that waits for the other leaves the core to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Of workers and what they start: pages of 2 MB for large tensors, whose places are found sooner.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# torch.compile would start processes that import torch, to compile side by side.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# It would try each instruction set that the processor has by compiling programs, for 15 s.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# XLA compiles each shape anew: that takes most of the time, and less without LLVM's optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Where it is set, as in containers, each process would compile all that it imports, and each worker
# all the tests.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False

# A job in a shell's background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import forked
import hypothesis
import psutil
import pytest
import setuptools  # noqa: F401  # torch.compile needs it to come before the standard distutils
import torch
from filelock import FileLock
from namespaces import INTERFACE, Node

from llama import Llama, ModelArgs, Tokenizer, Transformer, checkpoint
from llama.checkpoint import InMemory, gguf, meta, weight_shapes
from llama.checkpoint.convert import convert
from llama.families.registry import build
from llama.layers import parallel

hypothesis.settings.register_profile("suite", deadline=None)  # machines differ, and are busy
hypothesis.settings.load_profile("suite")

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
THOROUGH = bool(os.environ.get("LLAMA_THOROUGH"))  # `make soak`: more texts, seeds and shapes

# Grouped-query attention, heads that 1, 2, 4 and 8 ranks can share, a width that isn't Meta's rule.
TINY = ModelArgs(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=512, hidden_dim=96, max_seq_len=128
)


SHARED, OWNER = "LLAMA_TESTS_SHARED", "LLAMA_TESTS_OWNER"


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores, since a quarter of the time is waiting; 5 GB each."""
    fitting = psutil.virtual_memory().available // 5_000_000_000
    return max(1, min(os.cpu_count() + 1, fitting, 8))


def pytest_configure(config):
    """A folder for what the workers share, which inherit its name."""
    if SHARED not in os.environ:
        os.environ[SHARED] = folder = tempfile.mkdtemp(prefix="llama-tests-")
        os.environ[OWNER] = str(os.getpid())
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(SHARED, None))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Looking for garbage in all that is imported, millions of objects, would take seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


class Later:
    """A module, or a name in one, that is imported when it is used: each worker collects all tests
    and runs some of them."""

    def __init__(self, module: str, name: Optional[str] = None):
        self._place = module, name

    def _found(self):
        module, name = self._place
        found = importlib.import_module(module)
        return getattr(found, name) if name else found

    def __getattr__(self, attribute: str):
        return getattr(self._found(), attribute)

    def __call__(self, *args, **options):
        return self._found()(*args, **options)


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """Files that only the first worker to need them makes, for as long as the tests run."""
    path = Path(os.environ[SHARED]) / name
    with FileLock(path.with_name(f"{name}.lock")):
        done = path.with_name(f"{name}.done")
        if not done.exists():
            make(path)
            done.touch()
    return path


# Files that take longest. A worker takes a file at a time, these first, so that at the end none
# waits long for another's.
LONGEST = (
    "test_docs", "test_bulk", "test_native", "test_compiled", "test_convert", "test_flax_model",
    "test_nodes", "test_server", "test_page", "test_examples", "test_benchmarks", "test_package",
    "test_openai_sdk", "test_hostile_clients", "test_finetune", "test_repl", "test_devices",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """`slow` is what `make check` leaves out: what is marked so, and what needs the real model."""
    for item in items:
        if {"smollm2_path", "either"} & {*item.fixturenames}:
            item.add_marker(pytest.mark.slow)
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def forked_python() -> List[str]:
    """Python for -m or a script, without the seconds that imports take: see tests/forked.py."""

    def start(address: Path) -> None:
        command = [sys.executable, forked.__file__, "--serve", str(address), os.environ[OWNER]]
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        while not address.exists():
            assert server.poll() is None
            time.sleep(0.02)

    os.environ[forked.ADDRESS] = str(shared("forked", start))
    return forked.PYTHON


def torchrun(ranks: int | None = None, python: List[str] | None = None) -> List[str]:
    """As above, and so are its ranks. Without a number, its options follow.

    python: for torchrun itself. What is killed before it has ended its ranks must not be forked.
    """
    forked = forked_python()
    script = shared("python", lambda path: path.write_text(f'#!/bin/sh\n{shlex.join(forked)} "$@"'))
    script.chmod(0o755)
    options = [] if ranks is None else ["--standalone", f"--nproc_per_node={ranks}"]
    launch = [*(python or forked), "-m", "torch.distributed.run", *options]
    return ["env", f"PYTHON_EXEC={script}", *launch]


def llama_command() -> List[str]:
    return [*forked_python(), "-m", "llama"]


def random_weights(args: ModelArgs, seed: int = 0, dtype=torch.float32) -> Dict[str, torch.Tensor]:
    """Whole weights of a shape, large enough that outputs differ clearly from token to token."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(args).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = (1 + 0.1 * noise).to(dtype)
        else:
            embeds = "embed" in name.removeprefix("vision_embeddings.")
            weights[name] = (noise * (1.0 if embeds else shape[1] ** -0.5)).to(dtype)
    return weights


def random_model(args: ModelArgs, seed: int = 0) -> Transformer:
    """A model of a shape with random weights, fp32, on the CPU."""
    parallel.initialize(device="cpu")
    model = build(args, device="meta")
    return checkpoint.load(InMemory(args, random_weights(args, seed)), model)


def write_byte_tokenizer(path: Path) -> Path:
    """A tokenizer.model in Meta's format whose tokens are the 256 bytes."""
    lines = [base64.b64encode(bytes([b])) + f" {b}\n".encode() for b in range(256)]
    path.write_bytes(b"".join(lines))
    return path


def with_user_defined(tokenizer: Tokenizer, *names: str) -> Tokenizer:
    """The tokenizer with more tokens, which text may contain."""
    known = tokenizer.vocabulary
    added = {name: known.n_words + i for i, name in enumerate(names)}
    return Tokenizer(
        known._replace(
            special_tokens={**known.special_tokens, **added},
            user_defined=frozenset({*known.user_defined, *names}),
            n_words=known.n_words + len(names),
        )
    )


def write_checkpoint(path: Path, args: ModelArgs, mp: int = 1, seed: int = 0) -> Path:
    """A random checkpoint in Meta's format, with the byte-level tokenizer."""
    meta.write(InMemory(args, random_weights(args, seed)), path, mp)
    write_byte_tokenizer(path / "tokenizer.model")
    return path


@cache
def _rank_server() -> subprocess.Popen:
    """What forks the ranks; it ends with this process, whose pipe it reads."""
    server = subprocess.Popen(
        [*forked_python(), str(ROOT / "tests" / "ranks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate, timeout=60)  # it ends when its input does
    return server


def run_ranks(
    world: int,
    task: str,
    out: Path,
    nodes: Sequence[Node] = (),
    during: Optional[Callable[[], object]] = None,
    **arguments,
) -> dict:
    """Run a task of tests/ranks.py on several ranks; returns what its rank 0 reports.

    Args:
        nodes: those of `namespaces.network` that the ranks run on, one for each, rank 0 on the
            first; by default all run here.
        during: called when the ranks have been started. Then they may end as they like, and their
            exit statuses are in the report, which holds nothing else but what they have printed.
    """
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }  # fmt: skip
    if nodes:
        environment |= {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": "29500"}
        environment |= {"GLOO_SOCKET_IFNAME": INTERFACE}
    else:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # that store, as under torchrun
    job = dict(world=world, task=task, out=str(out), arguments=arguments, timeout=300)
    job |= dict(environment=environment, nodes=[node.pid for node in nodes], all=bool(during))
    server = _rank_server()
    print(json.dumps(job), file=server.stdin, flush=True)
    try:
        if during:
            during()
    finally:
        statuses = json.loads(server.stdout.readline())
    said = {name: Path(f"{out}.{name}").read_text() for name in ("stdout", "stderr")}
    if during:
        return said | {"statuses": statuses}
    assert not any(statuses), f"{statuses}\n" + said["stdout"][-2000:] + said["stderr"][-6000:]
    return json.loads(out.read_text()) | said


def asset(name: str) -> Path:
    path = ROOT / "checkpoints" / name
    if not path.exists():
        pytest.fail(f"{path} is missing: run `llama download smollm2 tokenizer` (`make test` does)")
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return asset("SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def llama3_tokenizer_path() -> Path:
    return asset("llama3-tokenizer/tokenizer.model")


@pytest.fixture(scope="session")
def smollm2(smollm2_path) -> Llama:
    """The real model, in fp32, with the CPU kernels."""
    return Llama.build(
        smollm2_path, max_batch_size=16, device="cpu", dtype="fp32", quantize="dense"
    )


@pytest.fixture(scope="session")
def smollm2_plain(smollm2_path) -> Llama:
    """The same with the plain layers of model.py."""
    return Llama.build(
        smollm2_path, max_batch_size=16, device="cpu", dtype="fp32", quantize="dense", compile=False
    )


@pytest.fixture(scope="session")
def smollm2_hf(smollm2_path) -> Path:
    """The real model in Hugging Face's format, fp32."""
    return shared("hf", lambda path: convert(smollm2_path, path, "hf", quiet=True))


@pytest.fixture(scope="session")
def shallow(smollm2_path) -> Path:
    """A directory with the real model's first two layers; in `make soak`, all of them."""
    if THOROUGH:
        return smollm2_path.parent

    def make(path: Path) -> None:
        whole, tokenizer = checkpoint.open(smollm2_path), Tokenizer(str(smollm2_path))
        args = replace(whole.args, n_layers=2)
        weights = {n: whole.read(n, 0, 0, shape[0]) for n, shape in weight_shapes(args).items()}
        path.mkdir()
        gguf.write(InMemory(args, weights), path / smollm2_path.name, tokenizer=tokenizer)

    return shared("shallow", make)


@pytest.fixture(scope="session")
def smollm2_transformers(smollm2_hf):
    """The real model as transformers runs it, fp32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(smollm2_hf, dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "mp1", TINY)


@pytest.fixture(scope="session")
def tiny(tiny_dir) -> Llama:
    """A random model over bytes, fp32 on the CPU."""
    return Llama.build(tiny_dir, max_seq_len=128, max_batch_size=16, device="cpu", dtype="fp32")


@pytest.fixture(scope="session")
def parity() -> dict:
    """Reference outputs for the real model; `source` in the file says what made them."""
    return json.loads((DATA / "smollm2_parity.json").read_text())


@pytest.fixture
def tiny_args() -> ModelArgs:
    return TINY


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    """make_model(dim=..., ...): a random model that differs from the tiny one in these fields."""
    return lambda seed=0, **fields: random_model(replace(TINY, **fields), seed)
