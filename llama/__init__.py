"""Llama reference inference: any Llama checkpoint, any number of ranks, any device."""

from llama.cache import KVCache
from llama.generation import ChatPrediction, CompletionPrediction, Llama
from llama.model import ModelArgs, Transformer
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer
from llama.tools import parse_tool_calls, tool_schema

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "KVCache",
    "Llama",
    "Message",
    "ModelArgs",
    "Tokenizer",
    "Transformer",
    "parse_tool_calls",
    "tool_schema",
]
