"""Llama 2's chat format."""

from typing import List

from llama.text.chat import PLAIN, Dialog, PromptOptions, content_of
from llama.text.encoder import Encoder
from llama.text.generic_tools import has_calls, tools_as_text
from llama.text.tools import Tools

_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Llama2Format:
    """Llama 2's chat format: <s>[INST] user [/INST] assistant </s><s>[INST] user [/INST].

    Source: Meta's `chat_completion` (meta-llama/llama, llama/generation.py). The system message is
    part of the first user message. The tags are ordinary text to the model, so that one inside of a
    message can't be distinguished from the format's: such messages are refused.
    """

    def __init__(self, tokenizer: Encoder):
        self.tokenizer = tokenizer

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Tools = None, options: PromptOptions = PLAIN
    ) -> List[int]:
        """The dialog up to and including the last user message, after which the model answers, or
        the last message if that is continued.

        Raises:
            ValueError: built-in tools, roles that don't alternate, one of the tags in a message, or
                what `PromptOptions.check` raises.
        """
        options.check(dialog)
        if tools or has_calls(dialog):
            dialog = tools_as_text(dialog, tools)
        texts = [content_of(message) for message in dialog]
        for tag in _TAGS:
            if any(tag in text for text in texts):
                raise ValueError(
                    f"a message contains {tag!r}, which Llama 2 can't tell from the end of a "
                    "message: write it differently"
                )
        roles = [message["role"] for message in dialog]
        if roles[:1] == ["system"] and roles[1:2] == ["user"]:
            texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
            roles = roles[1:]
        answered = not roles or (options.begins_answer and len(roles) % 2 == 0)
        if answered or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            raise ValueError(
                "Llama 2's dialogs are an optional system message, then user and assistant in "
                f"turns, a user last: not {', '.join(message['role'] for message in dialog)}"
            )
        ids: List[int] = []
        last = ""
        if len(roles) % 2:
            last = f"[INST] {texts[-1].strip()} [/INST]"
        elif options.continue_final_message:
            last = f"[INST] {texts[-2].strip()} [/INST] {texts[-1].strip()}"
            texts = texts[:-2]
        for user, answer in zip(texts[::2], texts[1::2], strict=False):
            turn = f"[INST] {user.strip()} [/INST] {answer.strip()} "
            ids += self.tokenizer.encode(turn, bos=True, eos=True)
        return ids + self.tokenizer.encode(last, bos=True, eos=False) if last else ids
