"""What bitsandbytes writes: 8 bits, see `llm_int8`, and 4 bits, see `nf4`."""

from typing import Any, Dict, Mapping, Optional

from llama.checkpoint.schemes import llm_int8, nf4
from llama.checkpoint.schemes.weight import QuantizedWeight
from llama.checkpoint.source import Stored


class BitsAndBytes:
    def __init__(self, config: Mapping[str, Any]):
        if config.get("load_in_8bit") is not True and config.get("load_in_4bit") is not True:
            raise ValueError("neither load_in_8bit nor load_in_4bit: nothing else is read")

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        return nf4.weight(parts) or llm_int8.weight(parts)
