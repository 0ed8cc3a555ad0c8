"""What `Llama` returns, and the events that it is made of."""

from typing import List, Literal, NamedTuple, Optional, Required, TypedDict

from llama.chat import Message

FinishReason = Literal["stop", "length"]


class Prediction(TypedDict, total=False):
    """What predictions of text and of messages have in common."""

    finish_reason: FinishReason  # "stop": a stop token; "length": max_gen_len or the context's end
    tokens: List[str]  # with logprobs only
    logprobs: List[float]  # with logprobs only


class CompletionPrediction(Prediction):
    generation: str


class ChatPrediction(Prediction, total=False):
    generation: Required[Message]
    tool_call_error: str  # with tools only: why a call in the generation is left as text


class Step(NamedTuple):
    """One event of the generation loop."""

    row: int  # index of the prompt
    token: Optional[int]  # None: the row ended without a further token
    logprob: Optional[float]  # natural logarithm, of the model's own distribution; if asked for
    finish_reason: Optional[FinishReason]  # set in the last event of a row
