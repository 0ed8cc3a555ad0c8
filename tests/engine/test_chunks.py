"""Layers that attend within chunks: what they stored of earlier ones is dropped, and never read."""

import mmap
import random
from collections import Counter
from dataclasses import replace

import pytest
import test_scheduler
import torch
from conftest import random_weights, write_byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama import Llama, SamplingParams
from llama.backends.cpu.layers import NativeTransformer
from llama.checkpoint import InMemory, meta
from llama.engine.chunks import ChunkedBlocks
from llama.engine.scheduler import Scheduler, Sequence
from llama.families.llama4 import Llama4Args
from llama.layers.cache import KVCache
from llama.layers.paged import PAGE, free_layers, runs

SIZE, CHUNK = 4, 8
ARGS = Llama4Args(
    dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=512, hidden_dim=96,
    num_experts=4, expert_dim=64, nope_layer_interval=4, attention_chunk_size=2 * PAGE,
    use_qk_norm=True, attn_temperature_tuning=True, floor_scale=4, attn_scale=0.3,
    use_scaled_rope=True, max_seq_len=1024,
)  # fmt: skip
CHUNKED = [0, 1, 2]  # of its layers
HOW = {
    "plain": dict(dtype="fp32", compile=False), "kernels": dict(dtype="fp32"),
    "kernels-bf16-int8": dict(dtype="bf16", kv_cache="int8"),
}  # fmt: skip


class Cache(test_scheduler.Cache):
    """What each position of each block holds, for the layers that read all and for the others."""

    def __init__(self, scheduler):
        self.scheduler, self.whole, self.chunked = scheduler, {}, {}

    def step(self):
        plan, blocks = self.scheduler.plan(), self.scheduler.blocks
        for block in {*blocks.dropped}.difference(source for source, _ in plan.copies):
            for i in range(SIZE):
                self.chunked.pop((block, i), None)
        blocks.dropped.clear()
        for source, target in plan.copies:
            for held in (self.whole, self.chunked):
                for i in range(SIZE):
                    held[target, i] = held.get((source, i))
        for sequence, n in plan.counts.items():
            for at in range(sequence.computed, sequence.computed + n):
                place = sequence.table[at // SIZE], at % SIZE
                self.whole[place] = self.chunked[place] = (*sequence.tokens[: at + 1],)
        for sequence, n in plan.counts.items():
            end = sequence.computed + n
            for at in range(end):
                place = sequence.table[at // SIZE], at % SIZE
                assert self.whole[place] == (*sequence.tokens[: at + 1],)
                if at >= sequence.computed // CHUNK * CHUNK:  # what the pass reads
                    assert self.chunked.get(place) == (*sequence.tokens[: at + 1],)
        return plan


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=30),  # prompts that often share beginnings
        st.integers(1, 12),  # new tokens
        st.sampled_from([0, 0, 1, 3, 8]),  # steps before the next one comes
        st.integers(0, 60),  # steps until it is cancelled, 60: never
    ),
    min_size=1,
    max_size=12,
)


# A text is continued from a part of a block that another one, admitted with it, evicts.
EVICTED = [([0] * 6, 1, 8, 60), ([0] * 5 + [1] * 2, 1, 0, 60), ([1] * 30, 1, 0, 60)]


@settings(max_examples=300)
@example(EVICTED, 10, 64, 6)
@given(requests, st.integers(11, 40), st.integers(1, 64), st.integers(1, 6))
def test_any_schedule_reads_what_it_should(requests, n, max_tokens, max_rows):
    blocks = ChunkedBlocks(n + 1, SIZE, CHUNK)
    scheduler = Scheduler(blocks, max_tokens=max_tokens, max_rows=max_rows)
    cache, alive, todo, step, wait = Cache(scheduler), {}, list(requests), 0, 0
    while todo or alive:
        while todo and wait <= 0:
            prompt, new, wait, patience = todo.pop(0)
            sequence = Sequence(list(prompt), len(prompt) + new)
            scheduler.add(sequence)
            alive[sequence] = step + patience if patience < 60 else 10**9
        wait -= 1
        for sequence in [s for s, end in alive.items() if end <= step]:
            scheduler.remove(sequence)
            del alive[sequence]
        plan = cache.step()
        assert plan.counts or not alive
        for sequence in cache.generate(plan):
            del alive[sequence]
        step += 1
        assert step < 5000, "somebody waits for ever"
        users = Counter(block for s in scheduler.running for block in s.table)
        left = Counter(block for s in scheduler.running for block in s.table[: s.left])
        for block in users:  # kept by those that no row needs it for, no longer
            assert (block in blocks._partial) or left[block] < users[block]
    blocks.clear()
    assert blocks.available == n and not blocks._partial and not any(blocks._left)


def test_a_text_is_continued_from_the_begin_of_a_chunk():
    scheduler = Scheduler(ChunkedBlocks(65, SIZE, CHUNK), max_tokens=64, max_rows=4)
    cache, text = Cache(scheduler), [*range(100, 130)]  # 3 chunks, and 6 positions of a fourth

    def computed(n: int) -> int:
        """The tokens that are computed of the first n and another."""
        sequence, before = Sequence([*text[:n], 7], n + 2), scheduler.computed
        scheduler.add(sequence)
        assert cache.generate(cache.step()) == [sequence]
        return scheduler.computed - before

    assert computed(30) == 31
    assert computed(30) == 1  # what is known of the last chunk is whole
    assert computed(22) == 7  # of its chunk not: from 16 on
    assert computed(22) == 1  # but now it is
    assert computed(16) == 1  # the begin of a chunk


# --- in memory -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=HOW)
def llama(request, tmp_path_factory) -> Llama:
    path = tmp_path_factory.mktemp("chunks") / "model"
    meta.write(InMemory(ARGS, random_weights(ARGS)), path)
    write_byte_tokenizer(path / "tokenizer.model")
    return Llama.build(
        path, device="cpu", max_batch_size=4, prefix_cache_mb=8, **HOW[request.param]
    )


def resident(part: torch.Tensor, layers) -> int:
    """Bytes of some layers' part of a cache that take memory: not those that were only read."""
    pages = 0
    with open("/proc/self/pagemap", "rb") as file:  # admin-guide/mm/pagemap.rst: 8 bytes a page
        for layer in layers:
            begin = -(-part[layer].data_ptr() // mmap.PAGESIZE)
            end = (part[layer].data_ptr() + part[layer].nbytes) // mmap.PAGESIZE
            file.seek(8 * begin)
            entries = torch.frombuffer(bytearray(file.read(8 * (end - begin))), dtype=torch.int64)
            pages += (entries >> 56 & 1).sum().item()  # exclusively mapped
    return pages * mmap.PAGESIZE


def prompt(n: int, seed: int = 0):
    return [random.Random(seed).randrange(500) for _ in range(n)]


def test_a_long_text_holds_no_more_than_a_chunk(llama):
    """In the layers that read no more; 64 positions a pass beside it."""
    engine = llama.engine(cache_tokens=1024, max_tokens_per_step=64, max_rows=2)
    request = engine.add(prompt(700), 280, temperature=0, stop_tokens=set())
    while not request.finished:
        engine.step()
        if engine.stats.blocks_used < 3:
            continue
        for part in engine.pool.parts.values():
            block = part[0, 0].nbytes
            if block >= mmap.PAGESIZE:  # an int8 cache's scales are less than a page
                used = resident(part, CHUNKED) / len(CHUNKED)
                most = ARGS.attention_chunk_size // PAGE + 1  # and those of the pass
                assert used <= (most + 1) * block, engine.stats
    assert resident(engine.pool.k, [3]) >= 900 // PAGE * engine.pool.k[0, 0].nbytes


def test_a_block_that_is_evicted_is_copied_first(llama):
    """Where the cache is full: of one text a part is continued, and another takes its block."""
    known = prompt(100)
    text, other = [*known[:90], *prompt(10, 1)], prompt(120, 2)
    options = dict(temperature=0, stop_tokens=set(), logprobs=True)

    def answer(engine, *prompts):
        requests = [engine.add(ids, 8, **options) for ids in prompts]
        found = [[(e.token, e.logprob) for e in engine.events(r)] for r in requests]
        return found[0]

    expected = answer(llama.engine(cache_tokens=512), text)
    engine = llama.engine(cache_tokens=4 * PAGE, max_tokens_per_step=1024)
    answer(engine, known)
    found = answer(engine, text, other)
    assert [token for token, _ in found] == [token for token, _ in expected]
    if type(llama.model).__name__ == "NativeTransformer":
        assert found == expected


@pytest.mark.parametrize("step", [7, 64, 512])
def test_answers_are_those_of_a_whole_cache(llama, step, monkeypatch):
    """Several texts at once that share beginnings, samples of one, and each once more."""
    how = dict(max_tokens_per_step=step, max_rows=4, cache_tokens=2048)
    prompts = [prompt(300), [*prompt(200), 1, 2], prompt(130), [*prompt(128), 9], prompt(310, 1)]

    def answers(engine):
        found = []
        for _turn in range(2):
            requests = [
                engine.add(ids, 40, params=SamplingParams(temperature=0.8), seed=i, n=1 + i % 2,
                           stop_tokens=set(), logprobs=True)
                for i, ids in enumerate(prompts)
            ]  # fmt: skip
            while not engine.idle:
                engine.step()
            found.append([[(e.sample, e.token, e.logprob) for e in r.events] for r in requests])
        return found

    parts = llama.engine(**how)
    assert isinstance(parts.scheduler.blocks, ChunkedBlocks)
    mine = answers(parts)
    assert parts.stats.cached_tokens > 0
    monkeypatch.setattr(Llama4Args, "chunks", (0, ()))
    whole = llama.engine(**how)
    assert not isinstance(whole.scheduler.blocks, ChunkedBlocks)
    exact = isinstance(llama.model, NativeTransformer)  # the plain layers' sums vary
    shown = 3 if exact else 2  # sample and token, and log-probability
    for turn, expected in zip(mine, answers(whole), strict=True):
        for a, b in zip(turn, expected, strict=True):
            of_both = [sorted(event[:shown] for event in events) for events in (a, b)]
            assert of_both[0] == of_both[1]


def test_a_saved_prefix_is_of_all_layers(llama, tmp_path):
    """Saved after it was continued beyond its chunk, and loaded where nothing is known."""
    text = prompt(200)
    long = llama.generate([[*text, *prompt(200, 2)]], 4, temperature=0, stop_tokens=set())
    expected = llama.generate([[*text, 5, 6]], 8, temperature=0, stop_tokens=set())[0]
    prefixes = llama.prefixes
    prefixes.compute([*text, *prompt(200, 2)])
    prefixes.save(tmp_path / "prefix", text)
    prefixes._engine.scheduler.blocks.clear()
    assert prefixes.load(tmp_path / "prefix") == len(text)
    assert prefixes.cached([*text, 5, 6]) == len(text)
    assert prefixes.cached([*text[:100], 5]) == 0  # of its chunk the others' part is missing
    assert llama.generate([[*text, 5, 6]], 8, temperature=0, stop_tokens=set())[0] == expected
    again = llama.generate([[*text, *prompt(200, 2)]], 4, temperature=0, stop_tokens=set())
    assert again == long


def test_a_prefix_that_lacks_a_part_is_not_for_a_whole_cache(llama, tmp_path, monkeypatch):
    """As GPUs have it, which would read the missing part of its first chunk."""
    for name, n in (("long", 200), ("short", 100)):  # of the latter's only chunk nothing is dropped
        llama.prefixes.save(tmp_path / name, prompt(n))
    content = torch.load(tmp_path / "long")
    assert content.pop("dropped") == ARGS.attention_chunk_size
    torch.save(content, tmp_path / "old")
    monkeypatch.setattr(Llama4Args, "chunks", (0, ()))
    whole = Llama(llama.model, llama.tokenizer)
    whole._keep_prefixes(8_000_000, llama.prefixes.fingerprint)
    with pytest.raises(ValueError, match="long lacks what some layers.*first 128 of its 200.*save"):
        whole.load_prefix(tmp_path / "long")
    assert whole.load_prefix(tmp_path / "short") == 100
    assert whole.load_prefix(tmp_path / "old") == 200  # from before this was noted
    whole.prefixes.save(tmp_path / "long", prompt(200, 1))
    assert whole.load_prefix(tmp_path / "long") == 200
    monkeypatch.undo()
    assert llama.load_prefix(tmp_path / "long") == 200


def test_chunks_of_half_a_block_stay_whole(tmp_path):
    args = replace(ARGS, attention_chunk_size=96)
    meta.write(InMemory(args, random_weights(args)), tmp_path / "m")
    write_byte_tokenizer(tmp_path / "m" / "tokenizer.model")
    llama = Llama.build(tmp_path / "m", device="cpu", dtype="fp32")
    assert not isinstance(llama.engine(cache_tokens=256).scheduler.blocks, ChunkedBlocks)


def test_freed_pages_are_whole_and_of_these_blocks_alone():
    where = dict(dtype=torch.float32, device=torch.device("cpu"))
    pool = KVCache(2, 9, PAGE, 2, 24, **where)  # blocks of 12 KB, three pages
    for part in pool.parts.values():
        part.fill_(1)
    free_layers(pool, [1], [2, 3, 7])
    for part in pool.parts.values():
        assert (part[0] == 1).all()
        assert [(part[1, i] == 1).all().item() for i in range(9)] == [
            i not in (2, 3, 7) for i in range(9)
        ]
        assert not part[1, [2, 3, 7]].any()


def test_runs():
    assert list(runs([5, 1, 2, 3, 7, 6, 3])) == [(1, 3), (5, 7)]
    assert list(runs([4])) == [(4, 4)] and list(runs([])) == []
