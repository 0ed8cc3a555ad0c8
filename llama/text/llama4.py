"""Llama 4's chat format, with its tools."""

from typing import List, Mapping, Sequence, Tuple

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


def image_ids(special: Mapping[str, int], grid: Tuple[int, int], patches: int) -> List[int]:
    """The ids that stand for an image: <|patch|> for each feature, of the tiles row by row and then
    of the one that shows all of it, which is the only one if there is one tile.

    Args:
        special: the vocabulary's special tokens.
        grid: rows and columns of tiles.
        patches: features of a tile.
    """
    rows, columns = grid
    tile = [special["<|patch|>"]] * patches
    ids = [special["<|image_start|>"]]
    for _ in range(rows if rows * columns > 1 else 0):
        ids += [*tile, special["<|tile_x_separator|>"]] * (columns - 1)
        ids += [*tile, special["<|tile_y_separator|>"]]
    return [*ids, special["<|image|>"], *tile, special["<|image_end|>"]]
