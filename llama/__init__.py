"""Llama reference inference: any Llama checkpoint, any number of ranks, any device.

Names are imported when they are first used: `import llama` alone doesn't wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, List

from llama._version import __version__

if TYPE_CHECKING:  # what type checkers see; at run time, __getattr__ does it
    from llama import checkpoint as checkpoint
    from llama import ray as ray
    from llama.backends.options import ModelOptions
    from llama.checkpoint.convert import convert
    from llama.engine.async_engine import AsyncEngine
    from llama.engine.engine import Engine
    from llama.engine.params import SamplingParams
    from llama.families.trace import trace
    from llama.generation import ChatPrediction, CompletionPrediction, Event, Llama
    from llama.layers.cache import KVCache
    from llama.model import ModelArgs, Transformer
    from llama.text.tool_stream import parse_tool_calls
    from llama.text.tools import tool_schema
    from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer
    from llama.training import Trainer
    from llama.training.classification import SequenceClassifier

__all__ = [
    "AsyncEngine", "ChatFormat", "ChatPrediction", "CompletionPrediction", "Dialog", "Engine",
    "Event", "KVCache", "Llama", "Message", "ModelArgs", "ModelOptions", "SamplingParams",
    "SequenceClassifier", "Tokenizer", "Trainer", "Transformer", "__version__", "checkpoint",
    "convert", "parse_tool_calls", "tool_schema", "trace",
]  # fmt: skip

_HOME = {  # the module that a name is from
    "backends.options": ["ModelOptions"],
    "checkpoint.convert": ["convert"],
    "engine.async_engine": ["AsyncEngine"],
    "engine.engine": ["Engine"],
    "engine.params": ["SamplingParams"],
    "families.trace": ["trace"],
    "generation": ["ChatPrediction", "CompletionPrediction", "Event", "Llama"],
    "layers.cache": ["KVCache"],
    "model": ["ModelArgs", "Transformer"],
    "text.tool_stream": ["parse_tool_calls"],
    "text.tools": ["tool_schema"],
    "tokenizer": ["ChatFormat", "Dialog", "Message", "Tokenizer"],
    "training": ["Trainer"],
    "training.classification": ["SequenceClassifier"],
}


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "generation", "model", "ray", "tokenizer"):
        return import_module(f"llama.{name}")
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"llama.{module}"), name)
    raise AttributeError(f"module 'llama' has no attribute {name!r}")


def __dir__() -> List[str]:
    return sorted([*globals(), *__all__])
