"""Many tasks, one engine: each gets its answer, and who leaves costs nothing more."""

import asyncio
import random
import threading
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
            end = time.monotonic() + 60
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
            await engine.submit([1], 5)

    asyncio.run(stop())


def test_an_answer_has_all_events_of_all_its_samples(tiny: Llama):
    async def ask():
        async with tiny.async_engine(cache_tokens=1024) as engine:
            options = dict(n=3, params=SAMPLED, seed=4, stop_tokens=set(), logprobs=True, echo=True)
            answer = await engine.submit([1, 2, 3], 6, **options)
            events = [event async for event in answer]
            assert [event async for event in answer] == []  # it has ended, and stays so
            answer.cancel()
            return events

    events = asyncio.run(ask())
    expected, scores = tiny.generate(
        [[1, 2, 3]], 6, params=SAMPLED, seed=4, n=3, stop_tokens=set(), logprobs=True, echo=True
    )
    for sample in range(3):
        own = [event for event in events if event.sample == sample]
        assert [event.token for event in own] == expected[sample]
        assert own[0].logprob is None
        assert [event.logprob for event in own[1:]] == pytest.approx(scores[sample][1:])
        assert [event.finish_reason for event in own] == [None] * 8 + ["length"]


def test_cancel_ends_the_reader_and_the_work(tiny: Llama):
    async def cancel():
        async with tiny.async_engine(cache_tokens=256) as engine:
            answer = await engine.submit([1, 2, 3], 120, stop_tokens=set())
            await anext(answer)
            reading = asyncio.create_task(read(answer))
            await asyncio.sleep(0)
            answer.cancel()
            answer.cancel()
            await reading
            with pytest.raises(StopAsyncIteration):
                await anext(answer)
            left = await engine.submit([4, 5], 120, stop_tokens=set())
            left.cancel()  # before its first step, perhaps
            other = await engine.submit([6], 3, stop_tokens=set())
            assert len([event async for event in other]) == 3
            stats = engine.stats
            assert stats.running == stats.waiting == stats.blocks_used == 0

    async def read(answer):
        async for _ in answer:
            pass

    asyncio.run(cancel())


def test_mistakes_are_raised_where_they_are_made(tiny: Llama):
    async def ask():
        async with tiny.async_engine(cache_tokens=64) as engine:
            with pytest.raises(ValueError, match="up to 70 tokens, and the cache holds 64"):
                await engine.submit([1] * 10, 60)
            with pytest.raises(ValueError, match="top_p=2 must"):
                await engine.submit([1], 5, top_p=2)
            assert engine.stats.waiting == 0 and engine.failure is None

    asyncio.run(ask())


def test_a_step_that_fails_ends_the_thread_and_tells_everybody(tiny: Llama, monkeypatch):
    async def fail():
        async with tiny.async_engine(cache_tokens=256) as engine:
            answers = [await engine.submit([i], 100, stop_tokens=set()) for i in range(3)]
            await anext(answers[0])
            monkeypatch.setattr("llama.engine.steps.hidden", broken)
            for answer in answers:
                with pytest.raises(RuntimeError, match="has failed: out of memory"):
                    async for _ in answer:
                        pass
            assert isinstance(engine.failure, MemoryError)
            with pytest.raises(RuntimeError, match="has failed: out of memory"):
                await engine.submit([1], 5)

    def broken(*_):
        raise MemoryError("out of memory")

    asyncio.run(fail())


def test_it_runs_within_its_context(tiny: Llama):
    async def ask():
        engine = tiny.async_engine(cache_tokens=64)
        with pytest.raises(RuntimeError, match="async with"):
            async for _ in engine.stream([1], 5):
                pass

    asyncio.run(ask())


def test_calls_that_are_given_up_or_never_made(tiny: Llama, monkeypatch):
    async def call():
        held, entered = threading.Event(), threading.Event()

        def wait():
            entered.set()
            return held.wait(30)

        async with tiny.async_engine(cache_tokens=256) as engine:
            first = asyncio.create_task(engine.call(wait))
            await asyncio.to_thread(entered.wait)
            given_up = asyncio.create_task(engine.call(lambda: 1))
            await asyncio.sleep(0)
            given_up.cancel()
            held.set()
            assert await first
            assert await engine.call(lambda: 2) == 2
            assert engine.failure is None

            def fail(*_):
                late.append(asyncio.run_coroutine_threadsafe(engine.call(lambda: 3), loop))
                held.wait(0.2)  # it has been queued meanwhile
                raise MemoryError("out of memory")

            late: list = []
            loop = asyncio.get_running_loop()
            monkeypatch.setattr("llama.engine.steps.hidden", fail)
            with pytest.raises(RuntimeError, match="has failed: out of memory"):
                async for _ in engine.stream([1], 5):
                    pass
            with pytest.raises(RuntimeError, match="has failed: out of memory"):
                await asyncio.wrap_future(late[0])

    asyncio.run(call())


def test_the_event_loop_is_called_once_a_step(tiny: Llama):
    async def count():
        async with tiny.async_engine(cache_tokens=1024) as engine:
            loop, calls = engine._loop, []
            engine._loop = type("Loop", (), {"call_soon_threadsafe": lambda _, call, *args: (
                calls.append(args), loop.call_soon_threadsafe(call, *args))})()  # fmt: skip
            answers = [await engine.submit([i], 20, stop_tokens=set()) for i in range(5)]
            for answer in answers:
                assert len([event async for event in answer]) == 20
            assert 20 <= len(calls) < 60 and sum(len(found) for [found] in calls) == 100

    asyncio.run(count())
