"""Llama 4's chat format, with its tools."""

from typing import List, Sequence

from llama.text.chat import Dialog, Message, tool_calls
from llama.text.llama31 import Llama31Format, with_tools
from llama.text.tools import Tool, split_tools


class Llama4Format(Llama31Format):
    """Llama 4's chat format: <|header_start|>role<|header_end|>\\n\\ncontent<|eot|>, and <|eom|>
    at the end of calls of tools and of their results.

    Source: Meta's `ChatFormat` (meta-llama/llama-models, llama4/chat_format.py). Tools are defined
    in Llama 3.1's words, without dates, as the model's chat template does.
    """

    header = "<|header_start|>", "<|header_end|>"
    end_of_turn, end_of_message = "<|eot|>", "<|eom|>"
    code_tag = None

    def goes_on(self, message: Message) -> bool:
        return (
            message["role"] in ("tool", "ipython")
            or bool(tool_calls(message))
            or message.get("end_of_message", False)
        )

    def with_tools(self, dialog: Dialog, tools: Sequence[Tool]) -> List[Message]:
        """The dialog with definitions of tools.

        Raises:
            ValueError: a built-in tool, and what `llama31.with_tools` raises.
        """
        if builtins := split_tools(tools)[1]:
            raise ValueError(f"Llama 4 has no built-in tools: define {', '.join(builtins)}")
        found = with_tools(dialog, tools, in_system=self.tools_in_system, dated=False)
        own_system = self.tools_in_system or dialog[0]["role"] == "system"
        return found if own_system else found[1:]
