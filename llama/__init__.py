"""Llama reference inference: any Llama checkpoint, any number of ranks, any device."""

from llama.engine.params import SamplingParams
from llama.generation import ChatPrediction, CompletionPrediction, Event, Llama
from llama.layers.cache import KVCache
from llama.model import ModelArgs, Transformer
from llama.text.tools import parse_tool_calls, tool_schema
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

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
