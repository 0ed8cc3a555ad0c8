"""Dialogs to token ids: the messages, and the formats of the Llama family itself."""

from typing import TYPE_CHECKING, List, Literal, Protocol, Sequence, TypedDict

if TYPE_CHECKING:
    from llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "ipython", "tool"]
ROLES = ("system", "user", "assistant", "ipython", "tool")


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]


class Format(Protocol):
    """How a checkpoint wants its dialogs."""

    def encode_dialog_prompt(self, dialog: Dialog) -> List[int]:
        """The dialog, and what precedes the assistant's answer."""


def check_dialog(i: int, dialog: Dialog) -> None:
    """Raises ValueError for what isn't a dialog, naming its index i and what is wrong."""
    if not dialog:
        raise ValueError(f"dialog {i} is empty: it takes at least one message")
    for message in dialog:
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise ValueError(
                f"dialog {i}: a message is {{'role': ..., 'content': a string}}, not {message!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"dialog {i}: unknown role {message['role']!r}; roles are {', '.join(ROLES)}"
            )
    if dialog[0]["role"] == "assistant":
        raise ValueError(
            f"dialog {i} begins with the assistant: begin with a user or a system message"
        )


class ChatFormat:
    """Llama 3's chat format: <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>.

    Source: Meta's `ChatFormat` (meta-llama/llama3, llama/tokenizer.py). Roles and contents are
    encoded as ordinary text, so that the only control tokens are those put here.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> List[int]:
        special, encode = self.tokenizer.special_tokens, self.tokenizer.encode
        role = "ipython" if message["role"] == "tool" else message["role"]
        return [
            special["<|start_header_id|>"],
            *encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> List[int]:
        return [
            *self.encode_header(message),
            *self.tokenizer.encode(message["content"].strip(), bos=False, eos=False),
            self.tokenizer.special_tokens["<|eot_id|>"],
        ]

    def encode_dialog_prompt(self, dialog: Dialog) -> List[int]:
        """The dialog, and the header of the assistant's answer for the model to go on from."""
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            ids.extend(self.encode_message(message))
        return ids + self.encode_header({"role": "assistant", "content": ""})
