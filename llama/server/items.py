"""The output of `/v1/responses`: items that grow, told as events."""

import time
import uuid
from contextlib import aclosing
from typing import Any, AsyncGenerator, Dict, Iterator, List, Optional

from llama.server.bodies import Call, ChatMessage, FunctionCall
from llama.server.chat import ChatAnswer
from llama.server.errors import as_api_error
from llama.server.texts import chat_logprob
from llama.text.tool_stream import Delta

Data = Dict[str, Any]


class Output:
    """Builds a response from an answer.

    Attributes:
        response: the response so far.
        failure: what ended it early.
    """

    def __init__(self, answer: ChatAnswer, head: Data):
        self._answer, self.response = answer, head
        self._items: List[Data] = head["output"]
        self._number = 0
        self._logprobs: List[Data] = []  # of tokens whose text hasn't come yet
        self.failure: Optional[Exception] = None

    async def events(self) -> AsyncGenerator[Data, None]:
        """The events, in the order that OpenAI's clients expect."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self.response)
        reason: Optional[str] = None
        try:
            async with aclosing(self._answer.pieces()) as pieces:
                async for piece in pieces:
                    entry = chat_logprob(self._answer.tokenizer, piece.event)
                    self._logprobs += [entry] if entry else []
                    for delta in piece.deltas:
                        for event in self._call(delta) if delta.name else self._more(delta):
                            yield event
                    reason = piece.event.finish_reason
            if not self._items:  # clients expect one
                for event in self._text(""):
                    yield event
        except Exception as error:
            self.failure = error
            text = as_api_error(error).body["error"]["message"]
            self.response["error"] = {"code": "server_error", "message": text}
            reason = "error"
        is_text = bool(self._items) and self._items[-1]["type"] == "message"
        whole = reason == "stop" and (is_text or self._answer.complete(0))
        for event in self._end_item("completed" if whole else "incomplete"):
            yield event
        yield self._end(reason)

    def message(self) -> ChatMessage:
        """The output as a message of a dialog."""
        texts = [i["content"][0]["text"] for i in self._items if i["type"] == "message"]
        calls = [
            Call(FunctionCall(item["name"], item["arguments"]), id=item["call_id"])
            for item in self._items
            if item["type"] == "function_call"
        ]
        return ChatMessage(role="assistant", content="".join(texts), tool_calls=calls or None)

    def _more(self, delta: Delta) -> Iterator[Data]:
        """A text, or a piece of the arguments of the call that is under way."""
        if delta.index is None:
            yield from self._text(delta.text)
        else:
            self._items[-1]["arguments"] += delta.arguments
            yield self._of_item("function_call_arguments.delta", delta=delta.arguments)

    def _text(self, text: str) -> Iterator[Data]:
        if not self._items or self._items[-1]["type"] != "message":
            yield from self._end_item()
            item: Data = {
                "id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant",
                "status": "in_progress", "content": [],
            }  # fmt: skip
            self._items.append(item)
            yield self._of_item("output_item.added", item=item)
            part: Data = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._of_item("content_part.added", content_index=0, part=part)
            item["content"] = [part]
        part, logprobs = self._items[-1]["content"][0], self._logprobs
        part["text"] += text
        part["logprobs"] += logprobs
        self._logprobs = []
        yield self._of_item("output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _call(self, delta: Delta) -> Iterator[Data]:
        """The beginning of a call."""
        yield from self._end_item()
        item: Data = {
            "id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": delta.id,
            "name": delta.name, "arguments": "", "status": "in_progress",
        }  # fmt: skip
        self._items.append(item)
        self._logprobs = []
        yield self._of_item("output_item.added", item=item)
        if delta.arguments:
            yield from self._more(delta)

    def _end_item(self, status: str = "completed") -> Iterator[Data]:
        """Complete the last item, if it is under way."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            more = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._of_item("output_text.done", content_index=0, **more)
            yield self._of_item("content_part.done", content_index=0, part=part)
        else:
            yield self._of_item("function_call_arguments.done", arguments=item["arguments"])
        yield self._of_item("output_item.done", item=item)

    def _end(self, reason: Optional[str]) -> Data:
        status = {"stop": "completed", "length": "incomplete"}.get(reason or "", "failed")
        usage = self._answer.running.usage()
        self.response.update(
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if reason == "length" else None,
            completed_at=int(time.time()) if status == "completed" else None,
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        )
        return self._event(f"response.{status}", response=self.response)

    def _of_item(self, name: str, **values: Any) -> Data:
        at = {"output_index": len(self._items) - 1}
        if "item" not in values:
            at["item_id"] = self._items[-1]["id"]
        return self._event(f"response.{name}", **at, **values)

    def _event(self, name: str, **values: Any) -> Data:
        self._number += 1
        return {"type": name, "sequence_number": self._number - 1, **values}
