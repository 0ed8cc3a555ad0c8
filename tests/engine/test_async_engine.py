"""Many tasks, one engine: each gets its answer, and who leaves costs nothing more."""

import asyncio
import random
import time

import pytest

from llama import Llama, SamplingParams
from llama.engine.async_engine import AsyncEngine

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95)


def prompt(i: int) -> list:
    chance = random.Random(i)
    return [chance.randrange(250) for _ in range(chance.randint(1, 60))]


async def answer(engine: AsyncEngine, i: int) -> list:
    await asyncio.sleep(random.Random(i).random() / 20)
    options = dict(params=SAMPLED, seed=i, stop_tokens=set())
    events = [event async for event in engine.stream(prompt(i), 12, **options)]
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
    return [event.token for event in events]


def test_each_task_gets_its_own_answer(tiny: Llama):
    async def all_of_them():
        async with tiny.async_engine(cache_tokens=1024, max_rows=8) as engine:
            found = await asyncio.gather(*(answer(engine, i) for i in range(30)))
            assert engine.stats.blocks_used == 0
            return found

    found = asyncio.run(all_of_them())
    for i, tokens in enumerate(found):
        expected, _ = tiny.generate([prompt(i)], 12, params=SAMPLED, seed=i, stop_tokens=set())
        assert [tokens] == expected


def test_a_reader_who_leaves_frees_its_blocks(tiny: Llama):
    async def leave():
        async with tiny.async_engine(cache_tokens=256) as engine:
            stream = engine.stream([1, 2, 3], 100, stop_tokens=set())
            async for event in stream:
                assert event.token is not None
                break
            await stream.aclose()
            begun = asyncio.Event()

            async def read():
                async for _ in engine.stream([4, 5], 120, stop_tokens=set()):
                    begun.set()

            task = asyncio.create_task(read())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            end = time.monotonic() + 10
            while engine.stats.running or engine.stats.waiting or engine.stats.blocks_used:
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            done = engine.stats.computed_tokens
            await asyncio.sleep(0.05)
            assert engine.stats.computed_tokens == done

    asyncio.run(leave())


def test_errors_reach_their_own_reader(tiny: Llama):
    def broken(ids, logits):
        raise KeyError("mine")

    async def fail():
        async with tiny.async_engine(cache_tokens=256) as engine:
            good = asyncio.create_task(answer(engine, 1))
            with pytest.raises(KeyError, match="mine"):
                async for _ in engine.stream(
                    [1], 5, params=SamplingParams(logits_processor=broken)
                ):
                    pass
            with pytest.raises(ValueError, match="is empty"):
                async for _ in engine.stream([], 5):
                    pass
            assert len(await good) == 12

    asyncio.run(fail())


def test_leaving_the_context_ends_who_still_reads(tiny: Llama):
    async def stop():
        async with tiny.async_engine(cache_tokens=256) as engine:
            stream = engine.stream([1, 2, 3], 100, stop_tokens=set())
            await anext(stream)
        with pytest.raises(RuntimeError, match="has been stopped"):
            while True:
                await anext(stream)
        with pytest.raises(RuntimeError, match="has been stopped"):
            await anext(engine.stream([1], 5))

    asyncio.run(stop())
