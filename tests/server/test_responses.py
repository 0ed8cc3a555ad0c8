"""`/v1/responses`: its events, what it keeps, and what a failure in the middle becomes.

Events are checked by folding: items that are built from nothing but the events are those of the
final response.
"""

import asyncio
import contextlib
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from conftest import TINY, write_checkpoint

from llama import Llama
from llama.engine.predictions import Event
from llama.layers.paged import PAGE
from llama.server.app import make_app
from llama.server.bodies import Chat, FunctionTool
from llama.server.chat import ChatAnswer, Piece
from llama.server.items import Output
from llama.server.responses import KEPT, Store, Stored
from llama.server.service import Service, limits
from llama.server.settings import Settings
from llama.text.tool_stream import ToolCallStream

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
}
TOOL = {"type": "function", "name": "weather", "description": "The weather", "parameters": SCHEMA}
ENDS = {"stop": "completed", "length": "incomplete", "error": "failed"}


def fold(events):
    """The response that events tell of, from its items' events alone.

    Raises:
        AssertionError: events out of order.
    """
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    created, in_progress, *rest, last = events
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"]["status"] == "in_progress" and not created["response"]["output"]
    items, kinds = [], []  # and the kinds of events of the last one
    for event in rest:
        assert event["output_index"] == len(items) - (event["type"] != "response.output_item.added")
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not kinds or kinds[-1] == "output_item.done"  # one after the other
            items.append(event["item"])
            kinds = []
            assert event["item"]["status"] == "in_progress"
        else:
            assert event.get("item_id", items[-1]["id"]) == items[-1]["id"]
        item = items[-1]
        if kind == "content_part.added":
            assert item["content"] == [] and event["part"]["text"] == ""
            item["content"] = [event["part"]]
        elif kind == "output_text.delta":
            item["content"][0]["text"] += event["delta"]
            item["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "output_text.done":
            [part] = item["content"]
            assert (event["text"], event["logprobs"]) == (part["text"], part["logprobs"])
        elif kind == "content_part.done":
            assert [event["part"]] == item["content"]
        elif kind == "function_call_arguments.delta":
            assert item["type"] == "function_call"
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == item["arguments"]
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert event["item"] == item
            ends = {"message": ["output_text.done", "content_part.done"]}
            ends = ends.get(item["type"], ["function_call_arguments.done"])
            assert kinds[-len(ends) :] == ends
        else:
            assert kind == "output_item.added", kind
        kinds.append(kind)
    assert not kinds or kinds[-1] == "output_item.done"
    assert len({item["id"] for item in items}) == len(items)
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["output"] == items
    return last["response"]


class Said:
    """Stands in for a chat answer: says a text in pieces, and then fails, if that is the reason."""

    tokenizer = SimpleNamespace(decode_bytes=lambda ids: bytes(ids))

    def __init__(self, pieces, reason="stop"):
        self._pieces, self._reason = pieces, reason
        self.stream = ToolCallStream([TOOL])
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        usage |= {"prompt_tokens_details": {}, "completion_tokens_details": {}}
        self.running = SimpleNamespace(usage=lambda: usage)
        self.complete = lambda choice: self.stream.whole

    async def pieces(self):
        for i, text in enumerate(self._pieces):
            yield Piece(0, Event(0, 0, i, text, logprob=-i / 8), self.stream.feed(text))
        if self._reason == "error":
            raise RuntimeError("out of luck")
        yield Piece(0, Event(0, 0, None, "", finish_reason=self._reason), self.stream.finish())


def told(answer):
    """The events of an answer, as they are sent, and what built them."""
    output = Output(answer, {"id": "resp_1", "status": "in_progress", "error": None, "output": []})

    async def run():
        return [json.loads(json.dumps(event)) async for event in output.events()]

    return asyncio.run(run()), output


def cut(text, rng):
    """A text in pieces."""
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(24))
def test_events_add_up_to_the_response(seed):
    """Texts and calls in any order, cut anywhere, with any end."""
    rng = random.Random(seed)
    words, said = [], []
    for i in range(rng.randrange(4)):
        if rng.random() < 0.5:
            arguments = json.dumps({"city": f"Rome {i} é"})
            words.append(f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>')
            said.append(("weather", arguments))
        else:
            words.append(f"Let me see {i}. ")
            said.append(words[-1])
    reason = rng.choice(sorted(ENDS))
    pieces = cut("".join(words), rng)
    events, output = told(Said(pieces, reason))
    response = fold(events)
    assert response["status"] == ENDS[reason]
    assert (response["error"] is None) == (reason != "error")
    assert response["incomplete_details"] == (
        {"reason": "max_output_tokens"} if reason == "length" else None
    )
    items = response["output"]
    assert all(item["status"] == "completed" for item in items[:-1])
    if reason == "stop":
        assert [i["status"] for i in items[-1:]] == ["completed"]
    if reason != "error":
        found = [
            item["content"][0]["text"] if item["type"] == "message"
            else (item["name"], item["arguments"])
            for item in items
        ]  # fmt: skip
        texts = [one for one in found if isinstance(one, str)]
        calls = [one for one in found if not isinstance(one, str)]
        assert "".join(texts).split() == "".join(x for x in said if isinstance(x, str)).split()
        assert calls == [one for one in said if not isinstance(one, str)]
        # The message that goes on a later dialog has the same.
        message = output.message()
        assert message.content.split() == "".join(texts).split()
        assert [(c.function.name, c.function.arguments) for c in message.tool_calls or ()] == calls


def test_text_before_a_call_is_a_message_of_its_own():
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    response = fold(told(Said(["Let me ", "see.", call[:20], call[20:]]))[0])
    message, called = response["output"]
    assert message["content"][0]["text"] == "Let me see."
    assert (called["name"], json.loads(called["arguments"])) == ("weather", {"city": "Rome"})
    tokens = [entry["bytes"] for entry in message["content"][0]["logprobs"]]
    assert tokens[:2] == [[0], [1]]  # those of the call aren't the text's


def test_an_answer_without_text_has_an_empty_message():
    [item] = fold(told(Said([]))[0])["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")


def test_log_probabilities_wait_for_their_text():
    """A token whose text comes later, as half a character does, loses nothing."""
    [item] = fold(told(Said(["", "é", "", "!"]))[0])["output"]
    assert len(item["content"][0]["logprobs"]) == 4


def test_the_store_is_bounded():
    store = Store()
    for i in range(KEPT + 3):
        store.add(Stored({"id": f"r{i}", "output": []}, [], [{"id": f"i{i}", "role": "user"}]))
    for i in range(3):
        with pytest.raises(Exception, match=f"r{i}.*{KEPT}"):
            store.get(f"r{i}")
        with pytest.raises(Exception, match=f"i{i}"):
            store.item(f"i{i}")
    assert store.item("i3").role == "user" and store.get("r3")
    store.delete("r3")
    with pytest.raises(Exception, match="r3"):
        store.delete("r3")


# --- over HTTP, in this process -------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random model whose shape suits the CPU kernels: bit-identical however a prompt comes."""
    shape = replace(TINY, n_heads=2, n_kv_heads=1, head_dim=32, max_seq_len=2048)
    path = write_checkpoint(tmp_path_factory.mktemp("tiny") / "mp1", shape)
    return Llama.build(path, max_seq_len=2048, max_batch_size=4, device="cpu", dtype="fp32")


def serving(llama, test, engine=None, **settings):
    """Run a test with a client of a server with this model; it may replace the engine's answers."""
    given = Settings(log="off", **settings)

    async def run():
        async with llama.async_engine(**(engine or {})) as running:
            app = make_app(given, contextlib.nullcontext, [])
            app.state.service = Service(llama, running, given, "tiny")
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await test(client, app)

    return asyncio.run(run())


async def post(client, **body):
    path = body.pop("path", "/v1/responses")
    reply = await client.post(path, json=body)
    if not body.get("stream"):
        assert reply.status_code == 200, reply.text
        return reply.json()
    lines = reply.text.splitlines()
    found = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    names = [line[7:] for line in lines if line.startswith("event: ")]
    assert names == [event["type"] for event in found]
    return found


BODY = {"temperature": 0, "max_output_tokens": 12, "include": ["message.output_text.logprobs"]}


def content(response):
    """What a response says, with log-probabilities."""
    keep = ("type", "content", "name", "arguments", "status")
    return [{k: v for k, v in item.items() if k in keep} for item in response["output"]]


def test_a_chain_is_the_same_dialog_sent_whole(llama):
    """To the bit, over four turns, one of them a call, with instructions that aren't carried on."""

    async def test(client, app):
        sent, earlier, before = [], None, {}
        for turn in range(4):
            own = [{"role": "user", "content": f"turn {turn}"}]
            if turn == 2:  # the call's result
                [call] = before["output"]
                own = [{"type": "function_call_output", "call_id": call["call_id"], "output": "4"}]
            more = {"tools": [TOOL], "tool_choice": "required"} if turn == 1 else {}
            more |= {"max_output_tokens": 80} if turn == 1 else {}
            body = {**BODY, **more, "instructions": f"be {turn}"}
            chained = await post(client, input=own, previous_response_id=earlier, **body)
            whole = await post(client, input=[*sent, *own], **body)
            assert content(chained) == content(whole)
            assert chained["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
            streamed = await post(client, input=own, previous_response_id=earlier, stream=True,
                                  **body)  # fmt: skip
            assert content(fold(streamed)) == content(whole)
            sent += [*own, *whole["output"]]
            earlier, before = chained["id"], chained
        assert len({item["id"] for item in sent if "id" in item}) == 4

    serving(llama, test)


@pytest.mark.parametrize(
    "more",
    [
        {"top_k": 5, "min_p": 0.01, "ignore_eos": True, "repetition_penalty": 1.2, "seed": 1},
        {"seed": 2, "stop": ["e"], "logit_bias": {"9": 3}, "presence_penalty": 1, "min_tokens": 2},
        {"guided_regex": "[ab]{5}", "seed": 3, "priority": 1, "cache_prompt": False},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_are_those_of_chat_requests(llama, more):
    async def test(client, app):
        given = {"temperature": 1.5, "top_p": 1, **more}
        one = await post(client, input="a", max_output_tokens=12, **given)
        other = await post(
            client, path="/v1/chat/completions", messages=[{"role": "user", "content": "a"}],
            max_tokens=12, **given,
        )  # fmt: skip
        [item], [choice] = one["output"], other["choices"]
        assert item["content"][0]["text"] == choice["message"]["content"]
        assert one["usage"]["output_tokens"] == other["usage"]["completion_tokens"]

    serving(llama, test)


def test_reasoning_of_earlier_answers_is_taken_and_left_out(llama):
    """As OpenAI's SDK sends it back with the rest of an answer: before a call, for example."""

    async def test(client, app):
        call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "c1", "output": "4"}
        dialog = [{"role": "user", "content": "a"}, call, result]
        thought = {"type": "reasoning", "id": "rs_1", "status": None, "encrypted_content": "x==",
                   "summary": [{"type": "summary_text", "text": "Call f."}],
                   "content": [{"type": "reasoning_text", "text": "Shall I?"}]}  # fmt: skip
        empty = {"type": "reasoning", "id": "rs_2", "summary": []}
        plain = await post(client, input=dialog, **BODY)
        found = await post(client, input=[dialog[0], thought, *dialog[1:], empty], **BODY)
        assert content(found) == content(plain)
        assert found["usage"]["input_tokens"] == plain["usage"]["input_tokens"]
        reply = await client.get(f"/v1/responses/{found['id']}/input_items?order=asc")
        assert [one["type"] for one in reply.json()["data"]] == [
            "message", "reasoning", "function_call", "function_call_output", "reasoning",
        ]  # fmt: skip
        reply = await client.post("/v1/responses", json={"input": [empty]})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "input"

    serving(llama, test)


def test_a_branch_leaves_its_origin_as_it_is(llama):
    async def test(client, app):
        first = await post(client, input="a", **BODY)
        one = await post(client, input="b", previous_response_id=first["id"], **BODY)
        await post(client, input="c", previous_response_id=first["id"], **BODY)
        again = await post(client, input="b", previous_response_id=first["id"], **BODY)
        assert content(again) == content(one)
        assert (await client.get(f"/v1/responses/{first['id']}")).json() == first

    serving(llama, test)


def test_what_is_kept_and_what_isnt(llama):
    async def test(client, app):
        async def status(response, method="GET", more=""):
            return (
                await client.request(method, f"/v1/responses/{response['id']}{more}")
            ).status_code

        kept, passing = [await post(client, input="a", store=s, **BODY) for s in (True, False)]
        events = await post(client, input="a", stream=True, **BODY)
        streamed = events[-1]["response"]
        assert [await status(x) for x in (kept, passing, streamed)] == [200, 404, 200]
        assert (await client.get(f"/v1/responses/{streamed['id']}")).json() == streamed
        assert await status(kept, more="?stream=true") == 400  # isn't offered, and says so
        after = await post(client, input="b", previous_response_id=kept["id"], **BODY)
        assert await status(kept, "DELETE") == 200
        assert [await status(kept, m) for m in ("GET", "DELETE")] == [404, 404]
        reply = await client.post(
            "/v1/responses", json={"input": "c", "previous_response_id": kept["id"]}
        )
        assert reply.status_code == 400
        # what was built on it has its own copy
        await post(client, input="c", previous_response_id=after["id"], **BODY)
        assert len(app.state.store._kept) == 3

    serving(llama, test)


class Breaking:
    """An answer of the engine that fails after some events."""

    def __init__(self, answer, count):
        self._answer, self._left = answer, count

    def __aiter__(self):
        return self

    async def __anext__(self):
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("out of luck")
        return await anext(self._answer)

    def cancel(self):
        self._answer.cancel()


def test_a_failure_in_the_middle_is_told(llama, monkeypatch):
    """On every endpoint: an event in a stream, status 500 otherwise, and the server goes on."""
    dialog = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
    bodies = {
        "/v1/responses": {"input": "x", **BODY},
        "/v1/chat/completions": dialog,
        "/v1/completions": {"prompt": ["x", "y"], "max_tokens": 9},
    }

    async def test(client, app):
        engine = app.state.service.engine
        submit = engine.submit

        async def breaking(*args, **options):
            return Breaking(await submit(*args, **options), 3)

        monkeypatch.setattr(engine, "submit", breaking)
        for path, body in bodies.items():
            reply = await client.post(path, json=body)
            assert reply.status_code == 500, path
            assert "out of luck" in reply.json()["error"]["message"]
            reply = await client.post(path, json={**body, "stream": True})
            if path == "/v1/responses":
                continue
            lines = [line for line in reply.text.splitlines() if line.startswith("data: ")]
            assert "out of luck" in json.loads(lines[-1][6:])["error"]["message"]
        events = await post(client, input="x", stream=True, **BODY)
        failed = fold(events)
        assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
        assert "out of luck" in failed["error"]["message"]
        assert app.state.service.rows == 0
        monkeypatch.undo()
        again = await post(client, input="x", **BODY)
        assert again["status"] in ("completed", "incomplete")

    serving(llama, test)


def test_a_dialog_that_is_too_long_is_refused_or_truncated(llama):
    async def test(client, app):
        turns = [
            {"role": "user", "content": "x" * 300},
            {"role": "assistant", "content": "y" * 300},
        ]
        dialog = [*turns * 4, {"role": "user", "content": "z"}]
        reply = await client.post("/v1/responses", json={"input": dialog})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == "input"
        found = await post(client, input=dialog, truncation="auto", **BODY)
        assert found["truncation"] == "auto" and found["usage"]["input_tokens"] < 2048
        count = {
            "input": dialog,
            "truncation": "auto",
            "max_output_tokens": BODY["max_output_tokens"],
        }
        counted = await client.post("/v1/responses/input_tokens", json=count)
        assert counted.json()["input_tokens"] == found["usage"]["input_tokens"]
        short = await post(client, input=dialog[4:], **BODY)
        assert found["usage"]["input_tokens"] >= short["usage"]["input_tokens"]

    serving(llama, test)


def test_truncation_is_to_what_the_cache_holds(llama):
    """And its refusal speaks of what clients can change."""

    async def test(client, app):
        turn = [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 40}]
        dialog = [*turn * 4, {"role": "user", "content": "z"}]
        found = await post(client, input=dialog, truncation="auto", **BODY)
        assert found["usage"]["total_tokens"] <= 256
        body = {"input": "x" * 300, "truncation": "auto"}
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            reply = await client.post(path, json=body)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
            assert error["param"] == "input" and "max_output_tokens" in error["message"]
            assert "max_gen_len" not in error["message"]

    serving(llama, test, engine={"cache_tokens": 256})


@pytest.mark.parametrize("name, calls", [("weather", 0), ("brave_search", 1)])
def test_only_declared_tools_are_called(name, calls):
    """Clients know no others; a model may have been trained on some."""

    async def events():
        for text, reason in (('brave_search.call(query="a")', None), ("", "stop")):
            yield 0, Event(0, 0, None, text, finish_reason=reason)

    service = SimpleNamespace(llama=SimpleNamespace(tokenizer=None))
    running = SimpleNamespace(answers=[None], each=1, events=events)
    tool = FunctionTool({"name": name})
    answer = ChatAnswer(service, running, Chat(messages=[], tools=[tool]))

    async def run():
        return [piece async for piece in answer.pieces()]

    deltas = [delta for piece in asyncio.run(run()) for delta in piece.deltas]
    assert len({delta.index for delta in deltas} - {None}) == calls
    assert any(delta.text for delta in deltas) == (not calls)


def test_half_of_a_surrogate_pair_becomes_a_replacement_character(llama):
    """JSON can spell it, and UTF-8 can't: it could be read, and not be answered."""

    async def test(client, app):
        texts = {  # as JSON has it, and as it is understood
            r"a\ud83d": "a\ufffd", r"\ud83d\ude00": "\U0001f600", r"\\ud83d": r"\ud83d",
            r"\ude00\ud83d": "\ufffd\ufffd", r"\\\ud83d\n": "\\\ufffd\n", r"\uD7FF": "\ud7ff",
        }  # fmt: skip
        for spelled, text in texts.items():
            data = f'{{"input": "{spelled}", "instructions": "{spelled}", "max_output_tokens": 1,'
            data += f'"metadata": {{"m": "{spelled}"}}}}'
            reply = await client.post("/v1/responses", content=data)
            assert reply.status_code == 200, reply.text
            found = reply.json()
            assert (found["instructions"], found["metadata"]) == (text, {"m": text})
            items = await client.get(f"/v1/responses/{found['id']}/input_items")
            assert items.json()["data"][0]["content"][0]["text"] == text

    serving(llama, test)


def test_prompts_have_a_bos_token_unless_it_is_declined(llama):
    async def test(client, app):
        for path in ("/v1/completions", "/tokenize"):
            counts = []
            for more in ({}, {"add_special_tokens": False}):
                found = await post(client, path=path, prompt="abc", **more)
                counts.append(found.get("count") or found["usage"]["prompt_tokens"])
            assert counts == [4, 3]

    serving(llama, test)


def test_rows_at_once_follow_from_the_batch_size(llama):
    """Four times as many, in the same cache: most requests are shorter than the context."""
    for given, positions in ((None, 4 * 2048), (2048, 2048)):
        engine = llama.engine(**limits(llama, Settings(cache_tokens=given)))
        assert engine.scheduler.max_rows == 4 * 4
        assert engine.stats.blocks * PAGE == positions


def test_input_items_have_ids_and_pages(llama):
    async def test(client, app):
        items = [{"role": "user", "content": str(i)} for i in range(5)]
        response = await post(client, input=items, **BODY)

        async def page(**query):
            reply = await client.get(f"/v1/responses/{response['id']}/input_items", params=query)
            return reply.status_code, reply.json()

        _, whole = await page(order="asc")
        ids = [item["id"] for item in whole["data"]]
        assert len({*ids}) == 5 and not whole["has_more"]
        assert (whole["first_id"], whole["last_id"]) == (ids[0], ids[-1])
        _, some = await page(order="asc", after=ids[1], limit=2)
        assert [item["id"] for item in some["data"]] == ids[2:4] and some["has_more"]
        _, last = await page(after=ids[2])  # the newest first
        assert [item["id"] for item in last["data"]] == [ids[1], ids[0]]
        for wrong in (
            {"limit": 0},
            {"limit": "x"},
            {"order": "up"},
            {"before": "x"},
            {"after": "x"},
        ):
            status, error = await page(**wrong)
            assert status == 400 and error["error"]["message"]

    serving(llama, test)
