"""The `openai` package against `llama serve`, with strict validation of all that comes back.

Three things that OpenAI's own API sends aren't in the package's types, and are read without it: no
finish_reason in a streamed text completion's pieces, no log-probability for the first token of an
echoed prompt, and embeddings in base64.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import threading
from collections import Counter
from operator import attrgetter
from typing import Literal

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from served import PATIENCE, ray_cluster, serve, wait_for

MODEL, KEY = "SmolLM2-135M-Instruct.Q4_1", "a key for tests"
QUESTION = "What is the capital of France?"
HELLO = [{"role": "user", "content": QUESTION}]
PARIS = [{"role": "user", "content": "How is the weather in Paris?"}]
MOST = 8  # answers at once


class Place(BaseModel):
    """Where it is."""

    city: Literal["Paris", "Rome"]


CITY = {"type": "string", "enum": ["Paris", "Rome"]}
SCHEMA = {
    "type": "object", "properties": {"city": CITY}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip


def function(name):
    return {"name": name, "description": "About a city", "parameters": SCHEMA}


TOOLS = [{"type": "function", "function": function(name)} for name in ("get_weather", "get_time")]
FLAT = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
NAMED = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture(scope="module")
def server(smollm2_path):
    with contextlib.ExitStack() as ends:
        options = ["--device=cpu", f"--max_queue={MOST}"]
        if "LLAMA_RAY_NODES" in os.environ:  # as many replicas
            nodes = int(os.environ["LLAMA_RAY_NODES"])
            cluster = ends.enter_context(ray_cluster(nodes))
            options += [f"--ray={cluster.address}", f"--replicas={nodes}"]
        running = ends.enter_context(serve(smollm2_path, *options, env={"LLAMA_API_KEY": KEY}))
        running.client.headers["authorization"] = f"Bearer {KEY}"
        yield running


@pytest.fixture(scope="module")
def options(server):
    return dict(
        base_url=f"{server.url}/v1", api_key=KEY, timeout=PATIENCE, max_retries=0,
        _strict_response_validation=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def client(options):
    with OpenAI(**options) as found:
        yield found


@pytest.fixture(scope="module")
def asynchronous(options):
    """The same for asyncio, and what runs its coroutines."""
    with asyncio.Runner() as runner:
        found = AsyncOpenAI(**options)
        yield found, runner.run
        runner.run(found.close())


@pytest.fixture(scope="module")
def ask(client, asynchronous):
    """Call a method of the client; every second time of the asynchronous one.

    Returns what it returns, or the list of what it streams.
    """
    turns, (other, run) = itertools.count(), asynchronous

    async def awaited(method, *args, **parameters):
        found = await attrgetter(method)(other)(*args, **parameters)
        return [x async for x in found] if isinstance(found, openai.AsyncStream) else found

    def call(method, *args, **parameters):
        if next(turns) % 2:
            return run(awaited(method, *args, **parameters))
        found = attrgetter(method)(client)(*args, **parameters)
        return list(found) if isinstance(found, openai.Stream) else found

    return call


@pytest.fixture(scope="module")
def loose(options):
    """Without strict validation."""
    with OpenAI(**{**options, "_strict_response_validation": False}) as found:
        yield found


# --- chat completions -----------------------------------------------------------------------------


def in_chunks(chunks):
    """The choices of a stream, as those of a whole answer."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"text": "", "calls": [], "logprobs": []})
            one["text"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(one["calls"])
                    one["calls"].append([call.function.name, ""])
                one["calls"][call.index][1] += call.function.arguments
            one["logprobs"] += choice.logprobs.content if choice.logprobs else []
            one["reason"] = choice.finish_reason
    return [found[i] for i in range(len(found))]


def in_whole(answer):
    return [
        {
            "text": choice.message.content or "",
            "calls": [
                [c.function.name, c.function.arguments] for c in choice.message.tool_calls or ()
            ],
            "logprobs": choice.logprobs.content if choice.logprobs else [],
            "reason": choice.finish_reason,
        }
        for choice in answer.choices
    ]


PLACE = {"name": "place", "strict": True, "schema": SCHEMA}
PARAMETERS = [
    {"temperature": 0, "stop": ["the", " is"], "max_completion_tokens": 3},
    {
        "temperature": 1.2, "top_p": 0.7, "logit_bias": {"123": 5, "77": -100},
        "presence_penalty": 1.5, "frequency_penalty": -0.5,
    },
    {"n": 3, "logprobs": True, "top_logprobs": 3, "stop": "a"},
    {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "modalities": ["text"], "safety_identifier": "x", "prompt_cache_key": "y",
        "reasoning_effort": "none", "verbosity": "medium", "response_format": {"type": "text"},
    },
    {
        "extra_body": {
            "top_k": 20, "min_p": 0.01, "typical_p": 0.99, "repetition_penalty": 1.1,
            "min_tokens": 2, "stop_token_ids": [1], "cache_prompt": False, "priority": 1,
            "ignore_eos": True,
        }
    },
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": PLACE}},
    {"extra_body": {"guided_choice": ["yes", "no"]}},
    {"tools": TOOLS, "tool_choice": "none"},
    {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False, "max_tokens": 12},
    {"tools": TOOLS, "tool_choice": "required", "logprobs": True},
    {"tools": TOOLS, "tool_choice": NAMED, "n": 2},
    {
        "tools": TOOLS,
        "tool_choice": {
            "type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}
        },
    },
]  # fmt: skip


def named(value):
    return json.dumps(value)[:70] if isinstance(value, dict) else None


def test_strict_tools_while_the_model_decides(ask):
    """Text stays possible; a schema that couldn't be kept is refused, for strict tools only."""
    body = dict(model=MODEL, messages=PARIS, temperature=0, max_tokens=12)
    odd = {**function("odd"), "parameters": {**SCHEMA, "dependentRequired": {}}}
    texts = []
    for tool in ({**function("get_time"), "strict": True}, {**odd, "strict": False}):
        tools = [{"type": "function", "function": tool}]
        [answer] = in_whole(ask("chat.completions.create", tools=tools, **body))
        texts.append(answer["text"])
    assert all(texts)
    tools[0]["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match="dependentRequired") as caught:
        ask("chat.completions.create", tools=tools, **body)
    assert caught.value.param == "tools"


@pytest.mark.parametrize("parameters", PARAMETERS, ids=named)
def test_chat_whole_and_streamed(ask, parameters):
    limit = {} if "max_completion_tokens" in parameters else {"max_tokens": 8}
    if "json" in str(parameters) or "tool_choice" in parameters:
        limit = {"max_tokens": 40}
    messages = PARIS if "tools" in parameters else HELLO
    body = dict(model=MODEL, messages=messages, seed=11, **limit) | parameters
    whole = ask("chat.completions.create", **body)
    chunks = ask(
        "chat.completions.create", stream=True, stream_options={"include_usage": True}, **body
    )
    assert in_chunks(chunks) == in_whole(whole)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens < whole.usage.prompt_tokens
    assert len(whole.choices) == parameters.get("n", 1)
    choice = parameters.get("tool_choice", "auto")
    for answer in in_whole(whole):
        assert answer["text"] or answer["calls"] or "stop" in parameters
        if choice not in ("auto", "none"):
            [[name, arguments]] = answer["calls"]
            assert name == "get_time" or choice == "required"
            assert Place.model_validate_json(arguments)
            assert answer["reason"] == "tool_calls"
        if choice == "none":
            assert not answer["calls"]
        if "json_schema" in str(parameters):
            assert Place.model_validate_json(answer["text"])


def test_messages_of_all_kinds(ask):
    """What clients send back of answers, and content in parts."""
    call = {"id": "call_1", "type": "function",
            "function": {"name": "get_time", "arguments": "{}"}}  # fmt: skip
    again = ask(
        "chat.completions.create", model=MODEL, messages=HELLO, max_tokens=4, temperature=0
    ).choices[0].message  # fmt: skip
    forced = ask(
        "chat.completions.create", model=MODEL, messages=PARIS, tools=TOOLS, tool_choice=NAMED,
        max_tokens=40,
    ).choices[0].message  # fmt: skip
    parts = [
        {"type": "text", "text": "What is the capital"},
        {"type": "text", "text": " of Italy?"},
    ]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": QUESTION, "name": "Ann"},
        again,
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I won't say."}]},
        {"role": "user", "content": [{"type": "text", "text": "And the time there?"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "noon"}]},
        {"role": "user", "content": "And the weather?"},
        forced,
        {"role": "tool", "tool_call_id": forced.tool_calls[0].id, "content": "sunny"},
        {**again.model_dump(), "content": "It is"},
    ]  # fmt: skip
    answer = ask(
        "chat.completions.create", model=MODEL, messages=messages, tools=TOOLS, max_tokens=4
    )
    assert answer.choices[0].message.content


def test_functions_as_they_were_before_tools(ask, client):
    """`functions`, `function_call` and the role "function": asked, answered, sent back."""
    body = dict(model=MODEL, functions=[tool["function"] for tool in TOOLS], temperature=0)
    body |= {"function_call": {"name": "get_time"}, "max_tokens": 40}
    [choice] = ask("chat.completions.create", messages=PARIS, **body).choices
    call = choice.message.function_call
    assert (choice.finish_reason, choice.message.content) == ("function_call", None)
    assert call.name == "get_time" and Place.model_validate_json(call.arguments)
    assert choice.message.tool_calls is None
    chunks = list(client.chat.completions.create(messages=PARIS, stream=True, **body))
    assert chunks[-1].choices[0].finish_reason == "function_call"
    deltas = [chunk.choices[0].delta.function_call for chunk in chunks]
    name, *pieces = [delta for delta in deltas if delta is not None]
    assert name.name == "get_time" and {piece.name for piece in pieces} == {None}
    assert "".join(piece.arguments for piece in [name, *pieces]) == call.arguments
    body |= {"function_call": "none"}
    answers = [
        [choice.message, {"role": "function", "name": "get_time", "content": "noon"}],
        [  # the same, of tools
            {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "noon"},
        ],
    ]
    told = [
        ask("chat.completions.create", messages=[*PARIS, *answer], **body) for answer in answers
    ]
    assert told[0].usage.prompt_tokens == told[1].usage.prompt_tokens
    texts = {one.choices[0].message.content for one in told}
    assert len(texts) == 1 and texts != {None}


def test_parts_are_joined(client):
    """A text in parts, and the same in one, are the same prompt."""
    parts = [{"type": "text", "text": text} for text in (QUESTION[:9], QUESTION[9:])]
    found = [
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=4, seed=1
        )
        for content in (QUESTION, parts)
    ]
    assert in_whole(found[0]) == in_whole(found[1])


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of the message that goes back
def test_parsed_answers_and_the_helpers_stream(client):
    body = dict(model=MODEL, messages=HELLO, response_format=Place, temperature=0, max_tokens=40)
    whole = client.chat.completions.parse(**body)
    assert isinstance(whole.choices[0].message.parsed, Place)
    with client.chat.completions.stream(**body) as stream:
        kinds = Counter(event.type for event in stream)
        final = stream.get_final_completion()
    assert kinds["content.delta"] > 3 and kinds["content.done"] == 1
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    # and goes back
    messages = [*HELLO, whole.choices[0].message, {"role": "user", "content": "Why?"}]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).choices


def test_parsed_calls_and_the_helpers_stream(asynchronous):
    client, run = asynchronous
    body = dict(
        model=MODEL, messages=PARIS, tools=[openai.pydantic_function_tool(Place)],
        tool_choice="required", temperature=0, max_tokens=60,
    )  # fmt: skip

    async def streamed():
        async with client.chat.completions.stream(**body) as stream:
            kinds = Counter([event.type async for event in stream])
            return kinds, (await stream.get_final_completion()).choices[0].message

    message = run(client.chat.completions.parse(**body)).choices[0].message
    [call] = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Place)
    kinds, final = run(streamed())
    assert final.tool_calls[0].function == call.function
    assert kinds["tool_calls.function.arguments.delta"] > 3
    assert kinds["tool_calls.function.arguments.done"] == 1
    result = {"role": "tool", "content": "sunny", "tool_call_id": call.id}
    body |= {"messages": [*PARIS, message, result], "tool_choice": "none", "max_tokens": 2}
    assert run(client.chat.completions.create(**body)).choices[0].message.content


def test_a_stream_that_is_left_and_raw_answers(client, server):
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=2
    )
    assert raw.headers["content-type"] == "application/json" and raw.parse().choices
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=HELLO, max_tokens=2, stream=True
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert list(reply.iter_lines())[-2] == "data: [DONE]"
    long = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(long))
    long.close()
    server.wait_idle()


# --- text completions -----------------------------------------------------------------------------

TEXT = [
    {"prompt": "One, two,"},
    {"prompt": ["One, two,", "The sky is"], "n": 2},
    {"prompt": [3, 4, 5]},
    {"prompt": [[3, 4], [5]]},
    {"prompt": "One, two,", "echo": True},
    {"prompt": "One, two,", "logprobs": 2, "temperature": 0},
    {"prompt": "One, two,", "logprobs": 0, "stop": [" four", "\n"]},
    {"prompt": "One, two,", "logit_bias": {"123": 5}, "presence_penalty": 1, "user": "me"},
    {"prompt": "One, two,", "best_of": 1, "suffix": "", "frequency_penalty": 0.5, "top_p": 0.5},
]


@pytest.mark.parametrize("parameters", TEXT, ids=named)
def test_text_whole_and_streamed(ask, loose, parameters):
    body = dict(model=MODEL, max_tokens=6, seed=5) | parameters
    whole = ask("completions.create", **body)
    usage = {"include_usage": True}
    chunks = list(loose.completions.create(stream=True, stream_options=usage, **body))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    prompts = parameters["prompt"] if isinstance(parameters["prompt"], list) else [""]
    prompts = 1 if isinstance(prompts[0], int) else len(prompts)
    assert len(whole.choices) == prompts * parameters.get("n", 1)
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert choice.text.startswith("One, two,") or not parameters.get("echo")
        assert mine[-1].finish_reason == choice.finish_reason
        if "logprobs" in parameters:
            for name in ("tokens", "token_logprobs", "text_offset"):
                joined = [x for c in mine for x in getattr(c.logprobs, name)]
                assert joined == getattr(choice.logprobs, name)


def test_what_the_packages_types_lack(loose):
    body = dict(model=MODEL, prompt="One, two,", echo=True, logprobs=1, max_tokens=2)
    [choice] = loose.completions.create(**body).choices
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    floats = loose.embeddings.create(model=MODEL, input="a cat", encoding_format="float")
    packed = loose.embeddings.create(model=MODEL, input="a cat", encoding_format="base64")
    unpacked = loose.embeddings.create(model=MODEL, input="a cat")  # by the package
    data = bytearray(base64.b64decode(packed.data[0].embedding))
    expected = torch.tensor(floats.data[0].embedding)
    torch.testing.assert_close(torch.frombuffer(data, dtype=torch.float32), expected)
    torch.testing.assert_close(torch.tensor(unpacked.data[0].embedding), expected)


# --- embeddings, models ---------------------------------------------------------------------------


def test_embeddings(ask):
    body = dict(model=MODEL, encoding_format="float")
    found = ask("embeddings.create", input=["a cat", "a dog"], user="me", **body)
    whole = torch.tensor([entry.embedding for entry in found.data])
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(2))
    short = ask("embeddings.create", input=[[3, 4], [5]], dimensions=16, **body)
    assert [len(entry.embedding) for entry in short.data] == [16, 16]
    assert short.usage.prompt_tokens == short.usage.total_tokens == 3
    other = {"pooling": "last", "normalize": False}
    last = ask("embeddings.create", input="a cat", extra_body=other, **body)
    assert last.data[0].embedding != found.data[0].embedding


def test_models(ask):
    [model] = ask("models.list").data
    assert model.id == MODEL
    assert ask("models.retrieve", MODEL) == model


# --- responses ------------------------------------------------------------------------------------


def without_names(response):
    """What two responses to the same request share."""
    found = response.model_dump()
    for key in ("id", "created_at", "completed_at", "usage"):
        found.pop(key, None)
    for item in found["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return found


FORMAT = {"type": "json_schema", "name": "place", "schema": SCHEMA}
ALLOWED = {"type": "allowed_tools", "mode": "required",
           "tools": [{"type": "function", "name": "get_time"}]}  # fmt: skip
RESPONSES = [
    {},
    {"input": HELLO, "instructions": "Be brief.", "truncation": "auto", "max_output_tokens": 3},
    {"input": [{"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": QUESTION}]}], "truncation": "disabled", "top_p": 0.5},
    {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
    {"metadata": {"a": "b"}, "user": "me", "store": False, "service_tier": "default",
     "background": False, "reasoning": {"effort": "none"}, "parallel_tool_calls": False,
     "max_tool_calls": 3, "text": {"format": {"type": "text"}, "verbosity": "medium"},
     "include": ["message.output_text.logprobs", "reasoning.encrypted_content"]},
    {"text": {"format": {"type": "json_object"}}},
    {"text": {"format": FORMAT}},
    {"tools": FLAT, "tool_choice": "none"},
    {"tools": FLAT, "tool_choice": "auto", "max_output_tokens": 12},
    {"tools": FLAT, "tool_choice": "required"},
    {"tools": FLAT, "tool_choice": {"type": "function", "name": "get_time"}},
    {"tools": FLAT, "tool_choice": ALLOWED},
]  # fmt: skip


@pytest.mark.parametrize("parameters", RESPONSES, ids=named)
def test_responses_whole_and_streamed(ask, parameters):
    longer = "json" in str(parameters) or "tools" in parameters
    limit = 40 if longer else 8
    body = dict(model=MODEL, input=QUESTION, max_output_tokens=limit, temperature=0) | parameters
    whole = ask("responses.create", **body)
    events = ask("responses.create", stream=True, **body)
    assert without_names(events[-1].response) == without_names(whole)
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    assert events[-1].type == f"response.{whole.status}"
    choice = parameters.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        [call] = whole.output
        assert call.type == "function_call" and Place.model_validate_json(call.arguments)
        assert call.name == "get_time" or choice == "required"
    else:
        assert whole.output_text
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text
        logprobs = whole.output[0].content[0].logprobs
        assert bool(logprobs) == ("include" in parameters)
        assert not logprobs or "".join(e.token for e in logprobs).startswith(whole.output_text)
    if "schema" in str(parameters.get("text")):
        assert Place.model_validate_json(whole.output_text)


def test_a_dialog_of_responses(ask):
    """Calls and their results, sent back as items, or known from before."""
    body = dict(model=MODEL, tools=FLAT, temperature=0, max_output_tokens=40)
    first = ask("responses.create", input=PARIS, tool_choice="required", **body)
    [call] = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    body |= {"tool_choice": "none", "max_output_tokens": 6}
    by_name = ask("responses.create", input=[result], previous_response_id=first.id, **body)
    assert by_name.previous_response_id == first.id
    reference = {"type": "item_reference", "id": call.id}
    for sent in (call, call.model_dump(), reference):
        by_items = ask("responses.create", input=[*PARIS, sent, result], **body)
        assert by_items.output_text == by_name.output_text != ""
        assert by_items.usage.input_tokens == by_name.usage.input_tokens
    more = [{"role": "user", "content": "And in Rome?"}]
    after = ask("responses.create", input=more, previous_response_id=by_name.id, **body)
    items = [*PARIS, *first.output, result, *by_items.output, *more]
    whole = ask("responses.create", input=items, **body)
    assert whole.output_text == after.output_text != ""
    count = ask("responses.input_tokens.count", model=MODEL, input=items)
    assert count.input_tokens == whole.usage.input_tokens

    listed = ask("responses.input_items.list", whole.id, order="asc").data
    kinds = ["message", "function_call", "function_call_output", "message", "message"]
    assert [item.type for item in listed] == kinds
    assert listed[1].id == call.id and listed[3].id == by_items.output[0].id
    assert ask("responses.input_items.list", whole.id).data == listed[::-1]


def test_pages_of_input_items(client):
    items = [{"role": "user", "content": str(i)} for i in range(7)]
    response = client.responses.create(model=MODEL, input=items, max_output_tokens=1)
    for order, expected in (("asc", "0123456"), ("desc", "6543210")):
        found = client.responses.input_items.list(response.id, limit=3, order=order)
        assert len(found.data) == 3
        assert "".join(item.content[0].text for item in found) == expected  # three pages
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.responses.input_items.list(response.id, limit=0)


def test_responses_are_kept_and_deleted(ask):
    response = ask("responses.create", model=MODEL, input=QUESTION, max_output_tokens=2)
    assert ask("responses.retrieve", response.id) == response
    ask("responses.delete", response.id)
    for method in ("responses.retrieve", "responses.delete", "responses.input_items.list"):
        with pytest.raises(openai.NotFoundError):
            ask(method, response.id)
    with pytest.raises(openai.BadRequestError) as raised:
        ask("responses.create", model=MODEL, input="x", previous_response_id=response.id)
    assert raised.value.code == "previous_response_not_found"
    assert raised.value.param == "previous_response_id"


def test_parsed_responses_and_the_helpers_stream(client):
    body = dict(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=40)
    whole = client.responses.parse(text_format=Place, **body)
    assert isinstance(whole.output_parsed, Place)
    with client.responses.stream(text_format=Place, **body) as stream:
        kinds = Counter(event.type for event in stream)
        final = stream.get_final_response()
    assert final.output_parsed == whole.output_parsed
    assert kinds["response.output_text.delta"] > 3
    messages = [*HELLO, *whole.output, {"role": "user", "content": "Why?"}]
    assert client.responses.create(model=MODEL, input=messages, max_output_tokens=2).output

    body |= {"tools": [openai.pydantic_function_tool(Place)["function"] | {"type": "function"}]}
    with client.responses.stream(tool_choice="required", **body) as stream:
        kinds = Counter(event.type for event in stream)
        [call] = stream.get_final_response().output
    assert kinds["response.function_call_arguments.delta"] > 3
    [again] = client.responses.parse(tool_choice="required", **body).output
    assert again.arguments == call.arguments
    messages = [*PARIS, again, {"type": "function_call_output", "call_id": again.call_id,
                                "output": [{"type": "input_text", "text": "sunny"}]}]  # fmt: skip
    assert client.responses.create(model=MODEL, input=messages, max_output_tokens=2).output


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, parameters, kind, param",
    [
        ("chat.completions.create", {"messages": HELLO, "temperature": -1}, 400, "temperature"),
        ("chat.completions.create", {"messages": HELLO, "tools": [{"type": "custom"}]}, 400,
         "tools[0].type"),
        ("chat.completions.create", {"messages": HELLO, "extra_body": {"tmp": 1}}, 400, "tmp"),
        ("chat.completions.create", {"messages": HELLO, "store": True}, 400, "store"),
        ("chat.completions.create", {"messages": HELLO, "model": "gpt-9"}, 404, "model"),
        ("chat.completions.create", {"messages": HELLO, "tools": TOOLS, "tool_choice": {
            "type": "function", "function": {"name": "x"}}}, 400, "tool_choice"),
        ("chat.completions.create", {"messages": HELLO, "tools": TOOLS, "functions": []}, 400,
         None),
        ("chat.completions.create", {"messages": HELLO, "tools": TOOLS, "tool_choice": {
            "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
                {"type": "function", "function": {"name": "x"}}]}}}, 400, "tool_choice"),
        ("chat.completions.create", {"messages": HELLO, "response_format": {
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}}, 400,
         "response_format"),
        ("completions.create", {"prompt": "x", "best_of": 3}, 400, "best_of"),
        ("embeddings.create", {"input": "x", "dimensions": 10**9}, 400, "dimensions"),
        ("responses.create", {"input": []}, 400, "input"),
        ("responses.create", {"input": [{"role": "user", "content": None}]}, 400, "input"),
        ("responses.create", {"input": "x", "max_output_tokens": -2}, 400, "max_output_tokens"),
        ("responses.create", {"input": "x", "tools": [{"type": "web_search"}]}, 400,
         "tools[0].type"),
        ("responses.create", {"input": "x", "text": {"format": {"type": "x"}}}, 400, "text"),
        ("responses.create", {"input": "x", "background": True}, 400, "background"),
        ("responses.create", {"input": "x " * 9000}, 400, "input"),
        ("responses.create", {"input": [{"type": "item_reference", "id": "x"}]}, 400, "input"),
        ("responses.create", {"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": "x", "detail": "auto"}]}]}, 400, "input"),
        ("responses.retrieve", {"response_id": "x"}, 404, None),
        ("models.retrieve", {"model": "x"}, 404, "model"),
    ],
    ids=lambda value: named(value) or (value if isinstance(value, str) else ""),
)  # fmt: skip
def test_errors_have_the_packages_classes(ask, method, parameters, kind, param):
    expected = {400: openai.BadRequestError, 404: openai.NotFoundError}[kind]
    if method.endswith("create"):
        parameters = {"model": MODEL, **parameters}
    with pytest.raises(expected) as raised:
        ask(method, **parameters)
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"


def test_a_wrong_key(options):
    with (
        OpenAI(**{**options, "api_key": "another"}) as client,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        client.models.list()
    assert raised.value.code == "invalid_api_key"


def test_a_full_queue_is_a_rate_limit_that_retries_pass(client, server):
    server.wait_idle()
    body = dict(model=MODEL, messages=HELLO)
    long = client.chat.completions.create(
        n=MOST, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}, **body
    )
    next(iter(long))
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(max_tokens=1, **body)
    assert int(raised.value.response.headers["retry-after"]) > 0
    found = []
    statuses: list[int] = []
    noting = {"response": [lambda response: statuses.append(response.status_code)]}
    patient = client.with_options(max_retries=100, http_client=httpx.Client(event_hooks=noting))
    thread = threading.Thread(
        target=lambda: found.append(patient.chat.completions.create(max_tokens=1, **body))
    )
    thread.start()
    wait_for(lambda: 429 in statuses)
    long.close()
    thread.join(PATIENCE)
    assert found[0].choices and statuses[-1] == 200
