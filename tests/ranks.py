"""What runs on several ranks, started by `conftest.run_ranks`. Not a test itself.

A server that has imported everything reads jobs, a line of JSON each, and forks the ranks of each:
that takes a moment, where each rank under torchrun imports torch anew. Tests of the commands and of
the example scripts start torchrun itself.
"""

import asyncio
import dataclasses
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from forked import enter
from vision import tiled

from llama import Llama, SamplingParams, checkpoint, training
from llama.apps import cli
from llama.backends import compiled, memory
from llama.checkpoint.adapter import read_adapter, write_adapter
from llama.engine.async_engine import AsyncEngine
from llama.engine.leader import follow
from llama.families.trace import trace
from llama.layers import parallel
from llama.training import lora


def generate(ckpt, prompts, max_gen_len=16, temperature=0.0, build=None, params=None, **kwargs):
    llama = Llama.build(
        ckpt, device="cpu", **({"dtype": "fp32", "max_batch_size": 16} | (build or {}))
    )
    if params is None:
        kwargs["temperature"] = temperature
    else:
        kwargs["params"] = SamplingParams(**params)
    if kwargs.pop("no_stops", False):
        kwargs["stop_tokens"] = set()
    tokens, logprobs = llama.generate(prompts, max_gen_len, logprobs=True, **kwargs)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, tokens)
    return {"tokens": tokens, "logprobs": logprobs, "all_ranks": gathered}


def traced(ckpt, tokens):
    """What is recorded of a forward pass, all heads of it."""
    model = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128).model
    with torch.inference_mode(), trace(model) as seen:
        model(torch.tensor(tokens))
    return {
        name: [part.tolist() for part in getattr(seen, name)]
        for name in ("attentions", "hidden_states")
    }


def chat_with_images(ckpt, dialogs):
    """Of each dialog the answer, or the error that every rank raises."""
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_batch_size=4, max_seq_len=256)
    answers = []
    for dialog in dialogs:
        try:
            [found] = llama.chat_completion([dialog], 0, max_gen_len=6, stop_tokens=set())
            answers.append(found["generation"]["content"])
        except FileNotFoundError as error:
            answers.append(str(error))
    return {"answers": answers}


def structured(ckpt, formats):
    """Texts of given forms, and an error that only the rank that draws can know of."""
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128)
    options = dict(max_gen_len=60, seed=3, response_format=formats)
    found = llama.text_completion(["a"] * len(formats), 1.5, **options)
    texts = [prediction["generation"] for prediction in found]
    guessed = llama.text_completion(["a"] * len(formats), 1.5, speculate="lookup", **options)
    assert [prediction["generation"] for prediction in guessed] == texts

    def refuse(ids, logits):
        raise ValueError("no")

    try:
        llama.text_completion(["a"], params=SamplingParams(logits_processor=refuse))
    except ValueError as error:
        message = str(error)
    all_texts, errors = [None] * dist.get_world_size(), [None] * dist.get_world_size()
    dist.all_gather_object(all_texts, texts)
    dist.all_gather_object(errors, message)
    return {"texts": texts, "all_ranks": all_texts, "errors": errors}


def prefixes(ckpt, prompt, shots, read, write):
    """A prefix from a file, and one into a file."""
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128, prefix_cache_mb=100)
    llama.save_prefix(write, shots)
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128, prefix_cache_mb=100)
    llama.load_prefix(read)
    fed, forward = [], llama.model.hidden
    llama.model.hidden = lambda tokens, *rest: fed.append(tokens.shape[1]) or forward(tokens, *rest)
    [answer] = llama.text_completion([prompt], 0, max_gen_len=9)
    return {"text": answer["generation"], "fed": fed[0]}


def seeing(ckpt, rows):
    """Logits and greedy answers of rows with images; requests that reach rank 0 alone."""
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128)
    images = tiled(rows)
    model, options = llama.model, dict(temperature=0, stop_tokens=set())
    with torch.inference_mode():
        encoded = [[model.encode(one.pixels, one.aspect_ratio) for one in row] for row in images]
        logits = model(torch.tensor(rows), images=encoded).tolist()
    tokens, _ = llama.generate(rows, 9, images=images, **options)
    engine = llama.engine()
    if parallel.rank():
        follow(engine)
        return {}

    async def ask():
        async with AsyncEngine(engine) as running:
            asked = [
                await running.submit(row, 9, images=[of_row], **options)
                for row, of_row in zip(rows, images, strict=True)
            ]
            return [[event.token async for event in answer] for answer in asked]

    return {"logits": logits, "tokens": tokens, "served": asyncio.run(ask())}


def cache_sizes(ckpt):
    """The blocks of each rank's cache, which one has less memory for than the others."""
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128)
    each = llama.model.new_cache(1, 1).nbytes
    memory.available = lambda device: (
        (3000 - 1000 * parallel.rank()) * memory.sharers(device) * each
    )
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, llama.engine().stats.blocks)
    return {"blocks": found, "sharers": memory.sharers(llama.device)}


def served(ckpt, prompts):
    """Requests that reach rank 0 alone, one of which is cancelled and one of which fails."""
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128)
    engine = llama.engine(cache_tokens=512, max_rows=3)
    if parallel.rank():
        follow(engine)
        assert engine.idle and engine.stats.blocks_used == 0
        return {}

    def broken(ids, logits):
        raise KeyError("mine")

    async def ask():
        async with AsyncEngine(engine) as running:
            options = dict(params=SamplingParams(0.9), stop_tokens=set())
            gone = await running.submit([5], 100, **options)
            await anext(gone)
            gone.cancel()
            bad = SamplingParams(logits_processor=broken)
            failing = await running.submit([1], 5, params=bad, stop_tokens=set())
            form = {"type": "regex", "regex": "[ab]{6}"}
            formed = await running.submit([1], 9, response_format=form, stop_tokens={7})
            asked = []
            stopping = await running.submit(
                [4], 90, should_stop=lambda: asked.append(1) or len(asked) == 3, **options
            )
            answers = [
                await running.submit(prompt, 9, seed=i, n=2, **options)
                for i, prompt in enumerate(prompts)
            ]
            found = [[event async for event in answer] for answer in answers]
            text = "".join([event.text async for event in formed])
            assert len([event async for event in stopping if event.token is not None]) == 3
            try:
                await anext(failing)
            except KeyError as error:
                message = str(error)
        return found, text, message

    found, text, message = asyncio.run(ask())
    tokens = [[e.token for e in events if e.sample == n] for events in found for n in (0, 1)]
    return {"tokens": tokens, "text": text, "error": message}


def batch(words):
    """`llama batch`, of which rank 0 reads and writes the files."""
    cli.parse(["batch", *words])()
    return {}


def by_torch_compile(ckpt, prompts):
    """What a GPU's layers say, on the CPU; the part without communication is run as traced."""
    before = torch.compile(compiled._before, dynamic=True, backend="aot_eager")
    after = torch.compile(compiled._after, dynamic=True)
    compiled._compiled = lambda: (before, after)
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", compile=False)
    compiled.swap(llama.model)
    options = dict(temperature=0, stop_tokens=set(), logprobs=True, echo=True)
    tokens, logprobs = llama.generate(prompts, 1, **options)
    return {"tokens": tokens, "logprobs": logprobs}


def twice(ckpt):
    """Starting again is harmless; a second model works beside the first. What it imports, too."""
    there = {*sys.modules}
    first = Llama.build(ckpt, device="cpu", dtype="fp32")
    second = Llama.build(ckpt, device="cpu", dtype="fp32")
    a, _ = first.generate([[1, 2, 3]], 8, temperature=0)
    b, _ = second.generate([[1, 2, 3]], 8, temperature=0)
    return {"same": a == b, "imported": [*({*sys.modules} - there)]}


def messages(ckpt):
    """Rank 0's objects reach everyone; collectives carry bf16."""
    parallel.initialize(device="cpu")
    heard = parallel.broadcast_object(f"said by rank {parallel.rank()}")
    tokens = parallel.broadcast(torch.tensor([parallel.rank() + 7]))
    mine = torch.full((3,), parallel.rank() + 1.0, dtype=torch.bfloat16)
    dist.all_reduce(mine)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (heard, tokens.tolist(), mine.tolist()))
    return {"gathered": gathered}


def too_many(ckpt):
    """Every rank gets the same clear error."""
    try:
        Llama.build(ckpt, device="cpu", dtype="fp32")
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def silent_peer(ckpt):
    """A rank that doesn't answer is an error after the timeout, not a hang."""
    parallel.initialize(device="cpu", wait=5.0)
    noticed = Path(f"{sys.argv[2]}.noticed")
    if parallel.rank() != 0:
        while not noticed.exists():
            time.sleep(0.02)
        return {}
    try:
        parallel.broadcast(torch.zeros(1))
        dist.all_reduce(torch.zeros(1), group=parallel.fs_init.get_model_parallel_group())
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        noticed.touch()
    return {"error": None}


def everywhere(builds, prompts):
    """Several models, each built with a rank's own options; what each of them generates, or the
    error of each rank."""
    found = []
    for of_ranks in builds:
        try:
            options = {"device": "cpu", "dtype": "fp32", "max_seq_len": 64}
            llama = Llama.build(**options | of_ranks[int(os.environ["RANK"])])
            said = llama.generate(prompts, 9, temperature=0, stop_tokens=set())[0]
        except (ValueError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
        found.append([None] * len(of_ranks))
        dist.all_gather_object(found[-1], said)
    return {"found": found}


def endless(ckpt, timeout):
    """Generates until something happens. Each rank says who it is once it has begun."""
    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=64, rank_timeout=timeout)
    while True:
        llama.generate([[1, 2, 3]], 50, temperature=0, stop_tokens=set())
        Path(f"{sys.argv[2]}.{parallel.rank()}").write_text(str(os.getpid()))


def absent(ckpt):
    """A rank that ends before it has met the others."""
    if os.environ["RANK"] != "1":
        parallel.initialize(device="cpu", timeout=1.0)


def replicas(ckpt, prompts):
    """Two ranks that each hold the whole model (model_parallel_size=1)."""
    llama = Llama.build(ckpt, model_parallel_size=1, device="cpu", dtype="fp32")
    tokens, _ = llama.generate(prompts, 8, temperature=0)
    dist.barrier()  # a rank that has ended can't be connected to, by one that is still starting
    return {"tokens": tokens, "world": parallel.world_size()}


def classified(ckpt, rows, labels):
    """Logits of a classifier and gradients of what each rank holds whole."""
    from llama.layers.ids import padded
    from llama.training.classification import SequenceClassifier

    classifier = SequenceClassifier.build(ckpt, device="cpu", dtype="fp32")
    logits = classifier(padded(rows, "cpu"), torch.tensor([len(row) for row in rows]))
    classifier.loss(logits, torch.tensor(labels)).backward()
    whole = [classifier.score.weight, classifier.model.layers[0].attention_norm.weight]
    mine = [logits.tolist(), *(weight.grad.tolist() for weight in whole)]
    classifier.write(f"{ckpt}-again")
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return {"all_ranks": gathered}


def adapted(ckpt, adapter, copy, tokens, sees=False):
    """Logits with an adapter: attached, merged, built in; and the adapter given back."""

    def logits(model):
        options = {}
        if sees:
            options["images"] = [[model.encode(*one[:2]) for one in row] for row in tiled(tokens)]
        return model(torch.tensor(tokens), **options).tolist()

    llama = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128)
    model, found = llama.model, {}
    lora.attach(model, read_adapter(adapter, model.params))
    with torch.inference_mode():
        found["attached"] = logits(model)
        again = lora.adapter_of(model, "default")
        lora.merge(model, "default")
        found["merged"] = logits(model)
        built = Llama.build(ckpt, device="cpu", dtype="fp32", adapter_dir=adapter).model
        found["built"] = logits(built)
    if parallel.is_rank_zero():
        write_adapter(again, copy, model.params)
    return found


def with_adapters(ckpt, prompts, new, names, build):
    """Requests of an engine, each with its adapter, which is a directory beside the model."""
    llama = Llama.build(ckpt, device="cpu", max_batch_size=8, max_seq_len=128, **build)
    for name in filter(None, names):
        llama.add_adapter(name, Path(ckpt).with_name(name))
    engine, pairs = llama.engine(cache_tokens=1024), zip(prompts, names, strict=True)
    requests = [
        engine.add(prompt, new, temperature=0, logprobs=True, stop_tokens=set(), adapter=name)
        for prompt, name in pairs
    ]
    while not engine.idle:
        engine.step()
    found = [[(event.token, event.logprob) for event in request.events] for request in requests]
    return {"found": found}


def gradients(ckpt, given):
    """Losses of each rank; logits and gradients, whole, into files beside the report."""
    given, losses = torch.load(given), {}
    for case, inputs, options in (
        ("plain", given["tokens"], {}),
        ("masked", given["embeds"], {"mask": given["mask"]}),
    ):
        model = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128).model
        loss = training.next_token_loss(model, inputs, given["labels"], **options)
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:  # the embedding's, where there are embeddings
                parameter.grad = torch.zeros_like(parameter)
        training.sum_replicas(model)
        norm = training.clip_gradients(model, 1e9)
        saved = {"logits": model(inputs, **options).detach(), "norm": norm}
        for parameter in model.parameters():
            parameter.data = parameter.grad
        saved |= checkpoint.gather(model).weights
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, float(loss))
        losses[case] = gathered
        if parallel.is_rank_zero():
            torch.save(saved, f"{sys.argv[2]}.{case}.pt")
    return losses


def learned(ckpt, rows, stop, adapter, state, recipe):
    """A run, and one that is broken off and resumed; what was learned, whole, into a file."""

    def start():
        model = Llama.build(ckpt, device="cpu", dtype="fp32", max_seq_len=128).model
        if adapter is not None:
            model.requires_grad_(False)
            lora.attach(model, read_adapter(adapter, model.params))
        examples = [training.Example(*row) for row in rows]
        return training.Trainer(model, examples, training.Recipe(**recipe))

    first, second, third = start(), start(), start()
    whole = [(step.loss, step.norm) for step in first.run()]
    resumed = [(step.loss, step.norm) for step in (second.one_step() for _ in range(stop))]
    second.save(Path(state), {})
    third.load(Path(state), {})
    resumed += [(step.loss, step.norm) for step in third.run()]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, whole)
    if adapter is None:
        found = checkpoint.gather(third.model).weights
    else:
        found = {
            name: tuple(p) for name, p in lora.adapter_of(third.model, "default").pairs.items()
        }
    if parallel.is_rank_zero():
        torch.save(found, f"{sys.argv[2]}.pt")
    return {"whole": whole, "resumed": resumed, "all_ranks": gathered}


def learn(
    ckpt, rows, recipe, *, size=1, shard=False, adapter=None, pack=False,
    load=None, save=None, at=0, die=0,
):  # fmt: skip
    """A run: losses and norms of its steps, the bytes that this rank holds, and what was learned.

    load, save: a state to begin with, and one to write after step `at`; die: the step after which
    the last rank is killed.
    """
    from llama.training import devices, run

    device = parallel.initialize(size, "cpu")
    source = checkpoint.open(ckpt)
    args = dataclasses.replace(source.args, max_seq_len=128, max_batch_size=1)
    model = run.load_model(source, args, torch.float32, device, adapter, False, shard)
    examples = [training.Example(*row) for row in rows]
    trainer = training.Trainer(model, examples, training.Recipe(**recipe), pack)
    if load is not None:
        trainer.load(Path(load), {})
    steps = []
    while trainer.step < trainer.steps:
        step = trainer.one_step()
        steps.append((step.loss, step.norm))
        if save is not None and trainer.step == at:
            trainer.save(Path(save), {})
        if trainer.step == die and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    steps.append((trainer.loss(examples[:7]), 0.0))
    parts = [part for _, p, _ in trainer.trained for part in (p, p.grad)]
    for state in trainer.optimizer.state.values():
        parts += [state["exp_avg"], state["exp_avg_sq"]]
    held = sum(devices.local(part).nbytes for part in parts)
    if adapter is None:
        found = checkpoint.gather(model).weights
    else:
        pairs = lora.adapter_of(model, "default").pairs
        found = {f"{name}.{half}": getattr(pairs[name], half) for name in pairs for half in "AB"}
    return {"steps": steps, "held": held}, found


def copies_learn(ckpt, jobs):
    """Runs on several copies of a model; what each learned goes into a file beside the report."""
    report = {}
    for name, job in jobs.items():
        report[name], found = learn(ckpt, **job)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, dict(report[name]))
        report[name]["all_ranks"] = everyone
        if parallel.is_rank_zero():
            torch.save(found, f"{sys.argv[2]}.{name}.pt")
    return report


def finetuned(options):
    """The command, in this process."""
    from llama.apps.finetune import finetune

    finetune(**options)
    return {}


def offloaded(ckpts, tokenizer, prompts, build):
    """Each rank's blocks brought in, some and all, against those that stay; by checkpoint."""
    from llama.backends import memory
    from llama.backends import offloaded as offload

    plenty, report = memory.available, {}
    memory.working = lambda *_: 0
    for kind, ckpt in ckpts.items():
        args = dataclasses.replace(
            checkpoint.open(ckpt).args,
            max_seq_len=build["max_seq_len"],
            max_batch_size=build["max_batch_size"],
        )
        parallel.initialize(device="cpu")
        world = parallel.world_size()
        block, output = offload._nbytes(args, world, torch.float32)
        around = memory.estimate(args, world, torch.float32).cache + args.dim * 4
        found = {"streamed": [], "outputs": []}
        for name, blocks, outputs in (("plain", 0, 0), ("some", 4, 1), ("all", 2, 0)):
            room = 2 * block + (blocks - 2) * (block * 7 // 5 if kind == "gguf" else block)
            have = world * (around + room + outputs * output)
            memory.available = plenty if name == "plain" else lambda _, have=have: have
            llama = Llama.build(ckpt, tokenizer, **build, offload="auto")
            found[name] = llama.generate(prompts, 9, temperature=0, logprobs=True)
            if name != "plain":
                blocks = [isinstance(layer, offload.StreamedBlock) for layer in llama.model.layers]
                found["streamed"].append(sum(blocks))
                found["outputs"].append(int(isinstance(llama.model.output, offload.StreamedOutput)))
        report[kind] = found
    if parallel.rank() > 0:
        memory.available = plenty
    mixed = Llama.build(ckpt, tokenizer, **build, offload="auto")
    tokens = mixed.generate(prompts, 9, temperature=0, logprobs=True)
    memory.available = plenty
    report["one_rank_only"] = tokens == found["plain"]
    return report


def be_rank(rank: int, job: dict) -> None:
    """One of the ranks: a process of its own, with torchrun's environment."""
    os.setsid()  # what it starts is ended with it
    if job["nodes"]:
        enter(job["nodes"][rank])
    signal.alarm(job["timeout"])
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{job['out']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv[1:] = job["task"], job["out"]
    report = globals()[job["task"]](**job["arguments"])
    if parallel.is_rank_zero():
        Path(job["out"]).write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # to take all modules down would take a second


def wait(ranks: list, until_all: bool) -> list:
    """The exit statuses of all. Unless it is to wait for all, those that run when one fails are
    ended."""
    statuses = dict.fromkeys(ranks, 0)
    left = set(ranks)
    while left:
        pid, statuses[pid] = os.wait()
        left.discard(pid)
        if statuses[pid] and not until_all:
            for other in left:
                os.killpg(other, signal.SIGKILL)
                os.waitpid(other, 0)
            break
    return [*statuses.values()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as in forked.py
    for line in sys.stdin:
        job, ranks = json.loads(line), []
        for rank in range(job["world"]):
            if (pid := os.fork()) == 0:
                be_rank(rank, job)
            ranks.append(pid)
        print(json.dumps(wait(ranks, job["all"])), flush=True)
