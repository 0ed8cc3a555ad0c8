"""Models larger than memory: the same numbers, in less; limits that a process has."""

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, random_weights, run_ranks, write_byte_tokenizer, write_checkpoint

from llama import Llama
from llama.backends import memory
from llama.backends import offloaded as offload
from llama.backends.offloaded import Plan, StreamedBlock, StreamedOutput
from llama.checkpoint import InMemory, gguf, huggingface, meta, weight_shapes
from llama.checkpoint import open as open_checkpoint
from llama.families.trace import trace
from llama.tokenizer import Tokenizer

CPU = torch.device("cpu")
DEEP = replace(TINY, n_layers=6)
BUILD = dict(device="cpu", dtype="fp32", max_seq_len=64, max_batch_size=4)
PROMPTS = [[1, 2, 3], [200, 7, 8, 9, 10], [4]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict:
    """The same weights in each format; the q and k rows of "hf" are in another order."""
    top = tmp_path_factory.mktemp("deep")
    source, tokenizer = InMemory(DEEP, random_weights(DEEP)), write_byte_tokenizer(top / "t.model")
    known = Tokenizer(tokenizer)
    tied = replace(DEEP, tied_embeddings=True)
    return {
        "tokenizer": tokenizer,
        "meta": meta.write(source, top / "meta", 2),
        "hf": huggingface.write(source, top / "hf"),
        "gguf": gguf.write(source, top / "deep.gguf", "q8_0", tokenizer=known),
        "tied": huggingface.write(InMemory(tied, random_weights(tied)), top / "tied"),
    }


@pytest.fixture
def squeeze(monkeypatch):
    """squeeze(path, blocks, output): leave room for so many blocks, and the output layer or not.

    Two of them are those that take turns.
    """

    def squeeze(path, blocks, output=True, dtype=torch.float32, more=0):
        args = replace(open_checkpoint(path).args, max_seq_len=64, max_batch_size=4)
        block, output_layer = offload._nbytes(args, 1, dtype)
        cache = memory.estimate(args, 1, dtype).cache
        room = 2 * block + (blocks - 2) * (block * 7 // 5 if "gguf" in str(path) else block)
        have = room + output * output_layer + cache + args.dim * dtype.itemsize + more
        monkeypatch.setattr(memory, "working", lambda *_: 0)
        monkeypatch.setattr(memory, "available", lambda _: have)

    return squeeze


def pair(path, tokenizer, squeeze, blocks=4, output=True, more=0, **build):
    """A model, and the same one with too little memory for it."""
    whole = Llama.build(path, tokenizer, **BUILD | build)
    dtype = whole.model.norm.weight.dtype
    squeeze(path, blocks, output, dtype, more)
    return whole, Llama.build(path, tokenizer, **BUILD | build, offload="auto")


@pytest.fixture
def squeezed(paths, squeeze):
    return pair(paths["meta"], paths["tokenizer"], squeeze)


def rings(llama):
    [ring] = {layer._ring for layer in llama.model.layers if isinstance(layer, StreamedBlock)}
    return ring


@pytest.mark.parametrize("blocks, output", [(4, True), (2, True), (2, False)])
@pytest.mark.parametrize("kind", ["meta", "hf", "gguf", "tied"])
def test_bits_are_those_of_the_whole_model(paths, squeeze, kind, blocks, output):
    whole, part = pair(paths[kind], paths["tokenizer"], squeeze, blocks, output)
    streamed = [isinstance(layer, StreamedBlock) for layer in part.model.layers]
    assert sum(streamed) == 6 - (blocks - 2)
    assert isinstance(part.model.output, StreamedOutput) is not output
    assert all(p.is_meta for layer in part.model.layers[-1:] for p in layer.parameters())
    with torch.inference_mode():
        tokens = torch.arange(24).view(2, 12)
        assert torch.equal(whole.model(tokens), part.model(tokens))
    options = dict(max_gen_len=9, temperature=0, logprobs=True)
    assert whole.generate(PROMPTS, **options) == part.generate(PROMPTS, **options)


def test_weights_are_converted_on_their_way(paths, squeeze):
    whole, part = pair(paths["hf"], paths["tokenizer"], squeeze, dtype="bf16", kv_cache="int8")
    options = dict(max_gen_len=5, temperature=0.8, seed=3, logprobs=True)
    assert whole.generate(PROMPTS, **options) == part.generate(PROMPTS, **options)


def test_two_ranks_bring_in_their_own_parts(paths, tmp_path):
    kinds = {kind: str(paths[kind]) for kind in ("meta", "hf", "gguf", "tied")}
    report = run_ranks(
        2, "offloaded", tmp_path / "out.json",
        ckpts=kinds, tokenizer=str(paths["tokenizer"]), prompts=PROMPTS, build=BUILD,
    )  # fmt: skip
    for kind in kinds:
        found = report[kind]
        assert found["streamed"] == [4, 6] and found["outputs"] == [0, 1]
        assert found["plain"] == found["some"] == found["all"]
    assert report["one_rank_only"]  # each rank decides for itself


def test_what_is_built_on_passes_works(paths, squeeze, tmp_path):
    whole, part = pair(
        paths["meta"], paths["tokenizer"], squeeze, more=10**6, prefix_cache_mb=1
    )  # fmt: skip
    texts = ["one two three one two", "four"]
    assert whole.score(texts) == part.score(texts)
    assert torch.equal(whole.embed(texts), part.embed(texts))
    for llama in (whole, part):
        llama.save_prefix(tmp_path / str(id(llama)), texts[0])
    for _ in range(2):
        answers = [
            llama.text_completion(texts, 0, max_gen_len=12, speculate="lookup")
            for llama in (whole, part)
        ]
        assert [a["generation"] for a in answers[0]] == [a["generation"] for a in answers[1]]
    tokens = torch.arange(8)[None]
    with torch.inference_mode(), trace(whole.model) as expected, trace(part.model) as seen:
        whole.model(tokens)
        part.model(tokens)
    assert all(map(torch.equal, expected.attentions, seen.attentions))
    assert all(map(torch.equal, expected.hidden_states, seen.hidden_states))


def test_a_draft_has_its_room(paths, squeeze, tmp_path):
    draft = write_checkpoint(tmp_path / "draft", replace(TINY, n_layers=1), seed=0)
    args = replace(TINY, n_layers=1, max_seq_len=64, max_batch_size=4)
    more = memory.estimate(args, 1, torch.float32).total
    whole, part = pair(
        paths["meta"], paths["tokenizer"], squeeze, more=more, draft_ckpt_dir=draft
    )  # fmt: skip
    assert sum(isinstance(layer, StreamedBlock) for layer in part.model.layers) == 4
    options = dict(max_gen_len=9, temperature=0, speculate="draft")
    assert whole.generate(PROMPTS, **options)[0] == part.generate(PROMPTS, **options)[0]


def test_each_block_is_read_once_a_pass_and_two_are_there(squeezed):
    _, part = squeezed
    ring, tokens = rings(part), torch.tensor([[1]])
    order, alive, most = [], weakref.WeakSet(), []
    load = ring.loader.load

    def counted(index, mark):
        order.append(index)
        most.append(len({weight._piece for weight in alive}))
        weights = load(index, mark)
        for weight in weights:
            weight._piece = len(order)
            alive.add(weight)
        return weights

    ring.loader.load = counted
    with torch.inference_mode():
        cache = part.model.new_cache(1)
        for start in range(5):
            part.model(tokens, start, cache)
    ring._next[1].result()
    assert order == [0, 1, 2, 3] * 5 + [0]  # the last one is for the next pass
    assert max(most) == 1  # the one in use; the one that is read makes two


def test_a_broken_off_pass_leaves_nothing_wrong(squeezed):
    whole, part = squeezed
    tokens = torch.tensor([[5, 6]])
    with torch.inference_mode():
        hook = part.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            part.model(tokens)
        hook.remove()
        assert torch.equal(part.model(tokens), whole.model(tokens))


def test_threads_may_share_a_model(squeezed):
    whole, part = squeezed
    found = {}

    def ask(prompt):
        with torch.inference_mode():
            found[prompt] = [part.model(torch.tensor([[prompt, 2, 3]])) for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with torch.inference_mode():
        for prompt in range(3):
            expected = whole.model(torch.tensor([[prompt, 2, 3]]))
            assert all(torch.equal(expected, logits) for logits in found[prompt])


@pytest.mark.parametrize("damage, error", [("deleted", FileNotFoundError), ("cut", ValueError)])
def test_a_file_that_goes_is_an_error_and_no_hang(squeeze, tmp_path, damage, error):
    path = write_checkpoint(tmp_path / "going", DEEP)
    whole, part = pair(path, None, squeeze, blocks=2, output=False)
    expected = whole.generate([[1, 2]], 3, temperature=0)
    file = path / "consolidated.00.pth"
    del whole  # its weights are in this file: touching what is cut off would end the process
    gc.collect()
    data = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        os.truncate(file, 4096)
    with pytest.raises(error, match=r"consolidated\.00\.pth|No such file"):
        part.generate([[1, 2]], 3, temperature=0)
    file.write_bytes(data)
    assert part.generate([[1, 2]], 3, temperature=0) == expected


def test_no_thread_outlives_the_model(paths, squeeze):
    def reading():
        return [t for t in threading.enumerate() if t.name.startswith("llama-offload")]

    gc.collect()
    squeeze(paths["meta"], 4)
    part = Llama.build(paths["meta"], paths["tokenizer"], **BUILD, offload="auto")
    part.generate([[1]], 2, temperature=0)
    ours = reading()[-1]
    assert ours.is_alive()
    del part
    gc.collect()
    ours.join(10)
    assert not ours.is_alive()


def test_what_fits_stays_as_it_is(paths, capfd):
    llama = Llama.build(paths["meta"], paths["tokenizer"], **BUILD, offload="auto")
    assert not any(isinstance(layer, StreamedBlock) for layer in llama.model.layers)
    assert not hasattr(llama.model, "placement")
    assert "each pass streams" not in capfd.readouterr().err


def test_the_embedding_goes_first(paths, squeeze, capfd):
    """What it takes is freed without a cost: a pass needs only some of its rows."""
    whole, part = pair(paths["meta"], paths["tokenizer"], squeeze, blocks=6)
    assert not any(isinstance(layer, StreamedBlock) for layer in part.model.layers)
    assert whole.generate(PROMPTS, 5, temperature=0) == part.generate(PROMPTS, 5, temperature=0)
    assert "6 of 6 blocks and the output layer; the embedding" in capfd.readouterr().err


def test_refusals_name_the_way_out(paths, squeeze):
    def build(**arguments):
        return Llama.build(paths["meta"], paths["tokenizer"], **BUILD | arguments)

    squeeze(paths["meta"], 4)
    with pytest.raises(ValueError, match='can\'t fit.*offload="auto"'):
        build()
    with pytest.raises(ValueError, match="offload=.*: choose one of auto, or None"):
        build(offload="disk")
    squeeze(paths["meta"], 1, False)
    with pytest.raises(ValueError, match="not even block by block: two blocks.*max_seq_len"):
        build(offload="auto")
    with pytest.raises(ValueError, match="leave out quantize='int8'"):
        build(offload="auto", quantize="int8")
    args = replace(DEEP, max_seq_len=64, max_batch_size=4)
    with pytest.raises(ValueError, match="leave out compile=True"):
        source = open_checkpoint(paths["meta"])
        offload.plan(source, args, 1, torch.float32, CPU, compile=True)


def test_quantized_weights_that_fit_are_no_reason(paths, squeeze):
    squeeze(paths["meta"], 4)
    llama = Llama.build(
        paths["meta"], paths["tokenizer"], **BUILD, offload="auto", quantize="int8"
    )  # fmt: skip
    assert not hasattr(llama.model, "placement")


def test_a_gpus_copies_wait_for_what_computes(paths, squeeze, monkeypatch):
    """With stand-ins for a GPU's streams, in the order in which they are asked for things."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = str(name)

        def record_event(self):
            log.append("mark")
            return len(log)

        def wait_event(self, event):
            assert log[event - 1] == "mark"

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda weight: weight.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda buffer, stream: None)

    def on_gpu(pieces):
        block, _ = offload._nbytes(DEEP, 1, torch.float32)
        return offload._CudaLoader(pieces, [block] * len(pieces), CPU)

    monkeypatch.setattr(offload, "_Loader", lambda pieces: on_gpu(pieces))
    whole = Llama.build(paths["hf"], paths["tokenizer"], **BUILD)
    for pinned in (False, True):
        squeeze(paths["hf"], 4)
        part = Llama.build(paths["hf"], paths["tokenizer"], **BUILD, offload="auto")
        ring = rings(part)
        if pinned:
            monkeypatch.setattr(memory, "available", lambda _: 1 << 40)
            ring.loader = on_gpu(ring.loader.pieces)
        with torch.inference_mode():
            for tokens in (torch.tensor([[1, 2]]), torch.tensor([[3]])):
                assert torch.equal(whole.model(tokens), part.model(tokens))
        ring._next[1].result()  # of the pass that may come
        assert ring.loader._loads == (9 if pinned else 9 + 3)  # three of them were timed
    assert "computing waits for copies" in log


def test_streamed_blocks_stand_apart():
    for n_layers in range(1, 12):
        for resident in range(n_layers + 1):
            plan = Plan(resident, True)
            streamed = [i for i in range(n_layers) if plan.streams(i, n_layers)]
            assert len(streamed) == n_layers - resident
            gaps = [b - a for a, b in pairwise(streamed)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_expected_speed_is_about_right(paths, squeeze, monkeypatch):
    """By a clock on which nothing but reading takes time: 10 ms for a block."""
    read_all, clock = offload._read_all, [0.0]

    def slow(*arguments):
        clock[0] += 0.01
        return read_all(*arguments)

    monkeypatch.setattr(offload, "_read_all", slow)
    monkeypatch.setattr(offload, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    squeeze(paths["meta"], 3)
    part = Llama.build(paths["meta"], paths["tokenizer"], **BUILD, offload="auto")
    expected = float(part.model.placement.split("up to ")[1].split()[0])
    with torch.inference_mode():
        cache = part.model.new_cache(1)
        part.model(torch.tensor([[1]]), 0, cache)
        start = clock[0]
        for position in range(1, 9):
            part.model(torch.tensor([[1]]), position, cache)
        measured = 8 / (clock[0] - start)
    assert expected == pytest.approx(measured, rel=0.1)
    assert "in memory: 1 of 6 blocks and the output layer; each pass streams 0.58 MB" in (
        part.model.placement
    )


def test_on_a_gpu_a_pass_needs_room_beside_weights_and_cache(paths, monkeypatch):
    source, gpu = open_checkpoint(paths["meta"]), torch.device("cuda")
    args = replace(source.args, max_batch_size=1, max_seq_len=64)
    need = memory.estimate(args, 1, torch.float32)
    more = memory.working(args, 1, torch.float32)
    for room, fits in ((need.total, False), (need.total + more, True)):
        monkeypatch.setattr(memory, "available", lambda device, room=room: room)
        for check in (
            lambda: offload.plan(source, args, 1, torch.float32, gpu),
            lambda: memory.preflight(args, 1, torch.float32, gpu),
        ):
            with nullcontext() if fits else pytest.raises(ValueError, match="this can't fit"):
                check()


ROOM = 160 << 20

LIMITED = """
import json, resource, sys
from llama import Llama

def held(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) * 1024

build = dict(device="cpu", dtype="fp32", max_seq_len=64, max_batch_size=1)
Llama.build({tiny!r}, **build).generate([[1, 2, 3]], 5, temperature=0)
before, limit = held("VmRSS"), held("VmData") + {room}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    Llama.build({path!r}, **build)
except ValueError as error:
    refusal = str(error)
llama = Llama.build({path!r}, **build, offload="auto")
found = llama.generate([[1, 2, 3]], 5, temperature=0, logprobs=True)
print(json.dumps([refusal, found, held("VmHWM") - before, llama.model.placement]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of data are Linux's")
@pytest.mark.slow
def test_a_file_eight_times_larger_than_what_the_process_may_take(tiny_dir, tmp_path):
    """The same tokens and log-probabilities, beside what imports and a warm-up took.

    With a torch for the CPU alone, that and the room together are a third of the file.
    """
    args = replace(
        TINY, dim=768, n_layers=70, n_heads=12, n_kv_heads=4, head_dim=64, hidden_dim=1536
    )
    one = random_weights(replace(args, n_layers=1))
    weights = {
        name: one[".".join(["layers.0", *name.split(".")[2:]]) if "layers" in name else name]
        for name in weight_shapes(args)
    }
    path = meta.write(InMemory(args, weights), tmp_path / "large")
    write_byte_tokenizer(path / "tokenizer.model")
    file = path / "consolidated.00.pth"
    try:
        assert file.stat().st_size >= 8 * ROOM
        code = LIMITED.format(room=ROOM, tiny=str(tiny_dir), path=str(path))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        refusal, found, peak, placement = json.loads(done.stdout)
        whole = Llama.build(
            path, compile=False, device="cpu", dtype="fp32", max_seq_len=64, max_batch_size=1
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as there: sums in the same order
        try:
            tokens, logprobs = whole.generate([[1, 2, 3]], 5, temperature=0, logprobs=True)
        finally:
            torch.set_num_threads(threads)
    finally:
        file.unlink()
    assert "can't fit" in refusal and 'offload="auto"' in refusal
    assert peak < ROOM  # resident pages of files included
    assert "each pass streams" in placement
    assert found == [tokens, logprobs]


CGROUP_V1 = "4:memory:/job/step\n2:cpu:/\n0::/\n"
CGROUP_V2 = "0::/job/step\n"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["job", "job/step", "."])
def test_limits_of_control_groups_count(tmp_path, monkeypatch, version, limited):
    """At any level, and with what can be given back: pages of files."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    unlimited, total = str((1 << 63) - 4096), "total_"
    if version == 2:
        files, unlimited, total = ("memory.max", "memory.current"), "max", ""
    for level in (".", "job", "job/step"):
        group = root / level
        group.mkdir(parents=True, exist_ok=True)
        (group / files[0]).write_text("50000000\n" if level == limited else unlimited)
        (group / files[1]).write_text("30000000\n")
        (group / "memory.stat").write_text(
            f"anon 9\nactive_file 0\n{total}active_file 5000000\n{total}inactive_file 7000000\n"
        )
    own = tmp_path / "own"
    own.write_text(CGROUP_V1 if version == 1 else CGROUP_V2)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", own)
    assert memory.available(CPU) == 32000000


def test_a_group_of_another_name_outside_of_the_container(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("50000000")
    (tmp_path / "memory.current").write_text("10000000")
    (tmp_path / "memory.stat").write_text("anon 1\n")
    (tmp_path / "own").write_text("0::/../docker/1234\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    assert memory.available(CPU) == 40000000
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "none")  # not Linux
    assert memory.available(CPU) > 40000000


@pytest.mark.parametrize("used, limit", [("vms", "RLIMIT_AS"), ("data", "RLIMIT_DATA")])
def test_limits_of_the_process_count(used, limit):
    code = (
        "import psutil, resource, torch\nfrom llama.backends import memory\n"
        "cpu, info = torch.device('cpu'), psutil.Process().memory_info()\n"
        "limit = info.%s + (1 << 30)  # beside what imports took\n"
        "resource.setrlimit(resource.%s, (limit, limit))\n"
        "before = memory.available(cpu)\n"
        "kept = torch.empty(1 << 28, dtype=torch.uint8)\n"
        "print(before, before - memory.available(cpu))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code % (used, limit)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    before, taken = map(int, done.stdout.split())
    assert 1 << 29 < before <= 1 << 30
    assert abs(taken - (1 << 28)) < 1 << 24


def test_each_rank_has_a_limit_of_its_own(monkeypatch):
    """The machine's memory is shared, a process's limit isn't."""
    monkeypatch.setattr("resource.getrlimit", lambda _: (10**15, 10**15))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 10**18}))
    monkeypatch.setattr(memory, "OWN_CGROUPS", Path("/nowhere"))
    alone = memory.available(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.available(CPU) == pytest.approx(2 * alone, rel=1e-3)
