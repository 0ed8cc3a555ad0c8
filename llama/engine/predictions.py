"""What `Llama` returns: predictions, and the events of a stream."""

from typing import (
    Dict,
    Iterator,
    List,
    Literal,
    NamedTuple,
    Optional,
    Required,
    Sequence,
    Tuple,
    TypedDict,
)

from llama.text.messages import Answer, Message
from llama.text.tool_stream import Delta, ToolCallStream
from llama.text.tools import Tool

FinishReason = Literal["stop", "length", "error"]  # error: of an engine's request alone


class Speculation(TypedDict):
    """Counts of a row's speculative decoding; accepted / proposed is the acceptance rate."""

    proposed: int  # draft tokens that the model verified
    accepted: int  # those of them that became part of the answer
    passes: int  # forward passes of the model


class Prediction(TypedDict, total=False):
    """The fields that predictions of text and of messages share."""

    # "stop": a stop token, a stop string or should_stop; "length": max_gen_len or the context's end
    finish_reason: Required[FinishReason]
    tokens: List[str]  # with logprobs only
    logprobs: List[float]  # with logprobs only
    top_logprobs: List[List[Tuple[str, float]]]  # with top_logprobs only; of the answer's tokens
    speculation: Speculation  # with speculate only


class CompletionPrediction(Prediction):
    generation: str


class BeamPrediction(Prediction):
    generation: str
    score: float  # log-probability (natural) / length ** length_penalty


class ChatPrediction(Prediction, total=False):
    generation: Required[Answer]
    truncated: List[Message]  # with truncate only: the messages dropped from the dialog
    tool_call_error: str  # with tools only: why a call in the generation is left as text


class Event(NamedTuple):
    """One token of one row, when it has been sampled.

    The texts of a row's events add up to its generation: complete characters only, without the stop
    string or stop token.
    """

    row: int  # index of the prompt
    sample: int  # which of its samples, from 0
    token: Optional[int]  # None: the row ended without a further token
    text: str  # appended to the generation; often empty
    logprob: Optional[float] = None  # natural, of the model's own distribution; with logprobs only
    top_logprobs: Optional[List[Tuple[int, float]]] = None  # most probable ids; if requested
    finish_reason: Optional[FinishReason] = None  # in the last event of a row only
    speculation: Optional[Speculation] = None  # likewise, with speculate only
    cached_tokens: Optional[int] = None  # likewise: tokens of the prompt that were in the cache
    # Of chats with tools only: what of the row's text and tool calls is known with this token.
    deltas: Optional[List[Delta]] = None
    echoed: bool = False  # the token is one of the prompt's, with echo


def with_calls(events: Iterator[Event], tools: Sequence[Tool]) -> Iterator[Event]:
    """The events with their deltas: the calls in the texts of each row."""
    streams: Dict[Tuple[int, int], ToolCallStream] = {}
    for event in events:
        key = (event.row, event.sample)
        stream = streams.get(key) or streams.setdefault(key, ToolCallStream(tools))
        deltas = stream.feed(event.text)
        yield event._replace(deltas=deltas + (stream.finish() if event.finish_reason else []))
