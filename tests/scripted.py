"""A server with an OpenAI-compatible API whose answers are scripted; it serves the chat page."""

import asyncio
import json
import socket
import threading

import uvicorn
from conftest import ROOT
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PAGE = ROOT / "llama" / "server" / "page"


def chunk(content=None, *, finish=None, logprobs=None, **delta):
    """A chunk of an answer, as /v1/chat/completions streams it."""
    delta |= {} if content is None else {"content": content}
    return {
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}]
    }


def said(*parts, finish="stop"):
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(parts)}}
    return [*map(chunk, parts), chunk(finish=finish), usage, "[DONE]"]


def refused(status, message):
    return JSONResponse({"error": {"message": message}}, status)


class Server:
    """Answers each request with the next of `script`: a response, or what is to be streamed.

    That is chunks, bytes that are sent as they are, and events that are waited for.
    """

    def __init__(self):
        self.reset()
        app = Starlette(
            routes=[
                Route("/v1/models", self.list_models),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
                Route("/favicon.ico", lambda request: Response(status_code=204)),
                Route("/", self.file),
                Route("/{name}", self.file),
            ]
        )
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([listening],), daemon=True)
        self.thread.start()

    def reset(self):
        self.script, self.bodies = [], []
        self.key = None  # which requests must have
        self.models = ["llama-a", "llama-b"]
        self.left = threading.Event()  # a client has left before the end

    def close(self):
        self.uvicorn.should_exit = self.uvicorn.force_exit = True
        self.thread.join()

    def file(self, request):
        policy = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:"}
        return FileResponse(PAGE / request.path_params.get("name", "index.html"), headers=policy)

    def refusal(self, request):
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return refused(401, "An API key is needed.")

    def list_models(self, request):
        data = {"data": [{"id": name} for name in self.models]}
        return self.refusal(request) or JSONResponse(data)

    async def answer(self, request):
        body = await request.json()
        if refusal := self.refusal(request):
            return refusal
        self.bodies.append(body)
        answer = self.script.pop(0)
        return (
            answer
            if isinstance(answer, Response)
            else StreamingResponse(self.stream(request, answer), media_type="text/event-stream")
        )

    async def stream(self, request, parts):
        for part in parts:
            if isinstance(part, bytes):
                yield part
            elif isinstance(part, threading.Event):
                try:
                    while not part.is_set() and not await request.is_disconnected():
                        await asyncio.sleep(0.01)
                finally:
                    if not part.is_set():
                        self.left.set()
            else:
                yield f"data: {part if isinstance(part, str) else json.dumps(part)}\n\n".encode()
