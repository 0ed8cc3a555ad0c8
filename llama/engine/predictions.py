"""What `Llama` returns, and the events that it is made of."""

from typing import List, Literal, NamedTuple, Optional, Required, Tuple, TypedDict

from llama.text.chat import Message

FinishReason = Literal["stop", "length"]


class Speculation(TypedDict):
    """What came of guessing a row's tokens; see `llama.engine.speculative`."""

    proposed: int  # guesses that the model looked at
    accepted: int  # those that were drawn
    passes: int  # of the model, for the row's tokens


class Prediction(TypedDict, total=False):
    """What predictions of text and of messages have in common."""

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
    generation: Required[Message]
    truncated: List[Message]  # with truncate only: what was left out of the dialog
    tool_call_error: str  # with tools only: why a call in the generation is left as text


class Event(NamedTuple):
    """One token of one row, as it comes about.

    The texts of a row's events add up to its generation: whole characters only, and nothing of a
    stop string or a stop token.
    """

    row: int  # index of the prompt
    sample: int  # which of its samples, from 0
    token: Optional[int]  # None: the row ended without a further token
    text: str  # what it adds to the generation, often nothing
    logprob: Optional[float] = None  # natural, of the model's own distribution; if asked for
    top_logprobs: Optional[List[Tuple[int, float]]] = None  # the most probable ids, if asked for
    finish_reason: Optional[FinishReason] = None  # set in the last event of a row
    speculation: Optional[Speculation] = None  # the same, with speculate only
