"""What bitsandbytes writes: 8 bits; see `llm_int8`."""

from typing import Any, Dict, Mapping, Optional

from llama.checkpoint.schemes import llm_int8
from llama.checkpoint.schemes.weight import QuantizedWeight
from llama.checkpoint.source import Stored


class BitsAndBytes:
    def __init__(self, config: Mapping[str, Any]):
        if config.get("load_in_8bit") is not True:
            raise ValueError(f"load_in_8bit={config.get('load_in_8bit')!r}: only 8 bits are read")

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        return llm_int8.weight(parts)
