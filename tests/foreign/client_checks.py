"""What each client of OpenAI's API does: run by clients.py, in an environment that has them.

    python client_checks.py CLIENT BASE_URL MODEL TOKENIZER

Each client holds a chat, streams one, has a tool called, and gets an answer of a given structure.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

URL, MODEL, TOKENIZER = sys.argv[2:5]
QUESTION = "What is the capital of France?"
SETTINGS = {"temperature": 0, "max_tokens": 48}
MESSAGES = [{"role": "user", "content": QUESTION}]


class Country(BaseModel):
    """A country."""

    name: Literal["France", "Spain", "Italy"]
    european: bool


def get_weather(city: Literal["Paris", "Madrid", "Rome"]) -> str:
    """The weather of a city.

    Args:
        city: its name.
    """
    return f"sunny in {city}"


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Madrid", "Rome"]}},
            "required": ["city"],
        },
    },
}


def same(whole: str, pieces: list[str]) -> None:
    assert whole and "".join(pieces) == whole, (whole, pieces)


def is_call(name: str, arguments: Any) -> None:
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "get_weather" and arguments["city"] in ("Paris", "Madrid", "Rome"), arguments


def langchain() -> None:
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(base_url=URL, api_key="none", model=MODEL, **SETTINGS)
    same(llm.invoke(QUESTION).text, [chunk.text for chunk in llm.stream(QUESTION)])
    [call] = llm.bind_tools([get_weather], tool_choice="required").invoke(QUESTION).tool_calls
    is_call(call["name"], call["args"])
    for method in ("json_schema", "function_calling"):
        found = llm.with_structured_output(Country, method=method).invoke(QUESTION)
        assert isinstance(found, Country)


def llama_index() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        api_base=URL, api_key="none", model=MODEL, is_chat_model=True,
        is_function_calling_model=True, context_window=2048, **SETTINGS,
    )  # fmt: skip
    messages = [ChatMessage(role="user", content=QUESTION)]
    pieces = [chunk.delta or "" for chunk in llm.stream_chat(messages)]
    same(llm.chat(messages).message.content, pieces)
    tool = FunctionTool.from_defaults(get_weather)
    reply = llm.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    [call] = llm.get_tool_calls_from_response(reply)
    is_call(call.tool_name, call.tool_kwargs)
    assert isinstance(llm.structured_predict(Country, PromptTemplate(QUESTION)), Country)


def litellm() -> None:
    import litellm

    def ask(**more: Any) -> Any:
        return litellm.completion(
            f"openai/{MODEL}", MESSAGES, api_base=URL, api_key="none", **SETTINGS, **more
        )

    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
    same(ask().choices[0].message.content, pieces)
    [call] = ask(tools=[WEATHER], tool_choice="required").choices[0].message.tool_calls
    is_call(call.function.name, call.function.arguments)
    Country.model_validate_json(ask(response_format=Country).choices[0].message.content)
    rows = litellm.embedding(f"openai/{MODEL}", ["a", "b"], api_base=URL, api_key="none").data
    assert len(rows) == 2


def instructor() -> None:
    import instructor
    from openai import OpenAI

    openai = OpenAI(base_url=URL, api_key="none")
    given: Any = {"model": MODEL, "messages": MESSAGES, **SETTINGS}
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai, mode=mode)
        assert isinstance(client.create(response_model=Country, **given), Country), mode
    client = instructor.from_openai(openai)
    *_, last = client.create_partial(response_model=Country, **given)
    assert last.name
    reply = client.create(response_model=None, **given)
    assert reply.choices[0].message.content


def openai_agents() -> None:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )  # fmt: skip
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    settings = ModelSettings(temperature=0, max_tokens=48)

    async def run() -> None:
        client = AsyncOpenAI(base_url=URL, api_key="none")
        for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
            model = kind(model=MODEL, openai_client=client)
            agent = Agent("A", instructions="Answer.", model=model, model_settings=settings)
            whole = (await Runner.run(agent, QUESTION)).final_output
            pieces = []
            async for event in Runner.run_streamed(agent, QUESTION).stream_events():
                if (
                    getattr(getattr(event, "data", None), "type", "")
                    == "response.output_text.delta"
                ):
                    pieces.append(event.data.delta)
            same(whole, pieces)
            calling = agent.clone(
                tools=[function_tool(get_weather)], tool_use_behavior="stop_on_first_tool",
                model_settings=ModelSettings(temperature=0, tool_choice="required"),
            )  # fmt: skip
            assert (await Runner.run(calling, QUESTION)).final_output.startswith("sunny in ")
            typed = agent.clone(output_type=Country)
            assert isinstance((await Runner.run(typed, QUESTION)).final_output, Country)

    asyncio.run(run())


def lm_eval() -> None:
    """Prints the scores of tasks, computed over HTTP."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = Path(TOKENIZER).parent / "tasks"
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = {}
    for model, path, task in (
        ("local-completions", "completions", "local_choice"),
        ("local-completions", "completions", "local_text"),
        ("local-chat-completions", "chat/completions", "local_answer"),
    ):
        given = {"model": MODEL, "base_url": f"{URL}/{path}", "num_concurrent": 2}
        if model == "local-completions":
            given.update(tokenizer_backend="huggingface", tokenizer=TOKENIZER)
        results = lm_eval.simple_evaluate(
            model, model_args=given, tasks=[task], task_manager=manager, bootstrap_iters=0,
            apply_chat_template=model == "local-chat-completions",
        )  # fmt: skip
        found[task] = results["results"][task]
    print("RESULTS", json.dumps(found, default=str))


CLIENTS = (langchain, llama_index, litellm, instructor, openai_agents, lm_eval)

if __name__ == "__main__":
    {client.__name__: client for client in CLIENTS}[sys.argv[1]]()
