"""Llama reference inference: any Llama checkpoint, any number of ranks, any device."""

from llama.cache import KVCache
from llama.generation import ChatPrediction, CompletionPrediction, Event, Llama
from llama.model import ModelArgs, Transformer
from llama.sampling import SamplingParams
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer
from llama.tools import parse_tool_calls, tool_schema

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Event",
    "KVCache",
    "Llama",
    "Message",
    "ModelArgs",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "parse_tool_calls",
    "tool_schema",
]
