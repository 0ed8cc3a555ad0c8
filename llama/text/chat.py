"""Dialogs to token ids: what a chat format is, and Llama 3's."""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, List, Mapping, Optional, Protocol

from llama.text.encoder import Encoder, image_id
from llama.text.generic_tools import has_calls, tools_as_text
from llama.text.messages import (
    ROLES,
    Dialog,
    ImagePart,
    Message,
    Role,
    check_dialog,
    check_dialogs,
    content_of,
    parts_of,
    read_calls,
    tool_calls,
)
from llama.text.tools import Tools

if TYPE_CHECKING:
    import torch

__all__ = [
    "PLAIN", "ROLES", "ChatFormat", "Dialog", "Format", "Message", "PromptOptions", "Role",
    "check_dialog", "check_dialogs", "content_of", "encode_parts", "read_calls", "tool_calls",
    "warn_of_base_model",
]  # fmt: skip


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt ends, and what a chat template is told.

    Args:
        add_generation_prompt: the header of the assistant's answer follows the dialog; by default
            unless the last message is continued.
        continue_final_message: the last message, the assistant's, is left open: the answer is its
            continuation.
        template_kwargs: further variables of a chat template, of JSON types.

    Raises:
        ValueError: both add_generation_prompt and continue_final_message.
    """

    add_generation_prompt: Optional[bool] = None
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt begins a new message and continue_final_message goes on "
                "with the last one: choose one"
            )

    @property
    def begins_answer(self) -> bool:
        """Whether the header of a new message follows the dialog."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    def check(self, dialog: Dialog, *, takes_kwargs: bool = False) -> None:
        """Raises ValueError for a last message that can't be continued, and for template_kwargs of
        a format without template."""
        last = dialog[-1] if dialog else {"role": "nobody", "content": ""}
        if self.continue_final_message and last["role"] != "assistant":
            raise ValueError(
                "continue_final_message: the last message is the assistant's, not of the role "
                f"{last['role']!r}"
            )
        if self.continue_final_message and (last.get("tool_calls") or last.get("end_of_message")):
            raise ValueError("continue_final_message: the last message ends with its tool calls")
        if self.template_kwargs and not takes_kwargs:
            named = ", ".join(map(str, self.template_kwargs))
            raise ValueError(f"template_kwargs: this model has no chat template to take {named}")


PLAIN = PromptOptions()


class Format(Protocol):
    """A chat format: how a checkpoint expects dialogs to be encoded."""

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Tools = None, options: PromptOptions = PLAIN
    ) -> List[int]:
        """The dialog, followed by the header of the assistant's answer; see `PromptOptions`.

        Raises:
            ValueError: something that the format can't express, tools for example.
        """


def encode_parts(tokenizer: Encoder, message: Any) -> List[int]:
    """A message's texts, each encoded apart, and `image_id` where its images stand.

    Raises:
        ValueError: a part that is neither; an image, and a vocabulary without its token.
    """
    ids: List[int] = []
    for part in parts_of(message):
        if isinstance(part, ImagePart):
            ids.append(image_id(tokenizer))
        else:
            ids += tokenizer.encode(part, bos=False, eos=False)
    return ids


class ChatFormat:
    """Llama 3's chat format: <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>.

    Source: Meta's `ChatFormat` (meta-llama/llama3, llama/tokenizer.py). Roles and contents are
    encoded as ordinary text, so that the only control tokens are those inserted here.
    """

    header = "<|start_header_id|>", "<|end_header_id|>"  # tokens around a role
    end_of_turn, end_of_message = "<|eot_id|>", "<|eom_id|>"

    def __init__(self, tokenizer: Encoder):
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> List[int]:
        encode = self.tokenizer.encode
        start, end = (self.tokenizer.special_tokens[name] for name in self.header)
        role = "ipython" if message["role"] == "tool" else message["role"]
        return [
            start,
            *encode(role, bos=False, eos=False),
            end,
            *encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> List[int]:
        if tool_calls(message):
            raise ValueError("Llama 3's chat format has no tool calls; Llama 3.1's has")
        if isinstance(message["content"], str):
            message = {**message, "content": message["content"].strip()}
        return [
            *self.encode_header(message),
            *encode_parts(self.tokenizer, message),
            self.tokenizer.special_tokens[self.end_of_turn],
        ]

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Tools = None, options: PromptOptions = PLAIN
    ) -> List[int]:
        """The dialog, and the header of the assistant's answer for the model to go on from. Tools,
        which this format doesn't know, are written as text.

        Raises:
            ValueError: what `tools_as_text` or `PromptOptions.check` raises.
        """
        options.check(dialog)
        if tools or has_calls(dialog):
            dialog = tools_as_text(dialog, tools)
        return self._encode_dialog(dialog, options)

    def _encode_dialog(self, dialog: Dialog, options: PromptOptions) -> List[int]:
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            ids.extend(self.encode_message(message))
        if options.continue_final_message:
            return ids[:-1]  # without the end of its turn
        header = self.encode_header({"role": "assistant", "content": ""})
        return ids + header if options.begins_answer else ids

    def turn_ids(self) -> List[int]:
        """The control tokens that a model must have been trained on to chat."""
        return [self.tokenizer.special_tokens[n] for n in (self.header[0], self.end_of_turn)]


def warn_of_base_model(turns: "torch.Tensor", others: "torch.Tensor") -> None:
    """Warn if the control tokens of chats look untrained.

    Base models share the tokenizer file of chat models, but the embeddings of tokens that occur
    only in chats are still as initialized: nearly zero, or all the same.

    Args:
        turns: embeddings of such control tokens, (at least 2, dim).
        others: embeddings of ordinary tokens, (n, dim).
    """
    usual = others.float().norm(dim=-1).median()
    small = turns.float().norm(dim=-1).max() < 1e-3 * usual
    if small or bool((turns == turns[:1]).all()):
        warnings.warn(
            "this looks like a base model: its chat format's control tokens were never trained, "
            "so expect no sensible answers; use the -Instruct checkpoint, or text_completion",
            stacklevel=6,
        )
