"""Tool calls while an answer is generated."""

from typing import Any, List, NamedTuple, Optional


class Delta(NamedTuple):
    text: str = ""
    index: Optional[int] = None
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolCallStream:
    def __init__(self, tools: Any):
        self.error = None

    def feed(self, text: str) -> List[Delta]:
        return [Delta(text)] if text else []

    def finish(self) -> List[Delta]:
        return []
