"""Server-sent events: comments in silence, and ends of every kind."""

import asyncio

import pytest

from llama.server import streams


def sent(events, timeout=30.0, reads=True, leaves=False):
    """What an EventStream of these events sends, and how often it was closed."""
    found, closed = [], []

    async def receive():
        while not leaves or len(found) < 2:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message):
        found.append(message)
        if not reads and message.get("body"):
            await asyncio.Event().wait()

    async def run():
        before = asyncio.all_tasks()
        stream = streams.EventStream(events, timeout, close=lambda: closed.append(True))
        await stream({"type": "http"}, receive, send)
        assert asyncio.all_tasks() == before  # nothing is left running

    asyncio.run(asyncio.wait_for(run(), 30))
    assert closed == [True]
    return [message.get("body") for message in found[1:]]


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(streams, "KEEP_ALIVE", 0.01)


def test_comments_keep_a_silent_stream_open(often):
    async def events():
        yield 1
        await asyncio.sleep(0.1)
        yield 2

    first, *comments, second, end = sent(events())
    assert (first, second, end) == (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")
    assert comments and set(comments) == {b": working\n\n"}


def test_a_failure_is_an_event():
    async def events():
        yield 1
        raise ValueError("too hot")

    first, failure, end = sent(events())
    assert first == b"data: 1\n\n" and b"too hot" in failure and end == b""


@pytest.mark.parametrize("silent", [False, True], ids=["speaks", "silent"])
def test_a_reader_that_reads_nothing_is_dropped(often, silent):
    async def events():
        while True:
            if silent:
                await asyncio.sleep(3600)
            yield 1

    assert len(sent(events(), timeout=0.05, reads=False)) == 1


def test_a_reader_that_leaves_ends_the_events(often):
    ended = []

    async def events():
        try:
            yield 1
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    sent(events(), leaves=True)
    assert ended == [True]
