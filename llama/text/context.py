"""Encodes dialogs, and truncates those that exceed the context."""

from typing import Callable, List, Optional, Sequence, Tuple

from llama.text.chat import PLAIN, Dialog, Format, Message, PromptOptions, check_dialogs
from llama.text.tools import Tool


class TooLong(ValueError):
    """What can't be dropped from a dialog takes so many tokens, more than the limit."""

    def __init__(self, tokens: int, limit: int):
        super().__init__(
            f"the last turn and system messages take {tokens} tokens, and the limit is {limit}: "
            "shorten them, ask for a shorter answer (max_gen_len), or build with a larger "
            "max_seq_len"
        )
        self.tokens, self.limit = tokens, limit


def encode_dialogs(
    formatter: Format,
    dialogs: Sequence[Dialog],
    tools: Optional[Sequence[Tool]],
    truncate: Optional[str],
    max_gen_len: Optional[int],
    context: int,
    options: PromptOptions = PLAIN,
    assistant_first: bool = False,
) -> Tuple[List[List[int]], List[List[Message]]]:
    """The ids of each dialog, and the messages dropped from it; see `Llama.chat_completion`
    and, for assistant_first, `check_dialog`.

    Raises:
        ValueError: an unknown truncate, or dialogs that can't be encoded or don't fit.
    """
    if truncate not in (None, "oldest_turns"):
        raise ValueError(f"truncate={truncate!r}: choose 'oldest_turns' or None, an error")
    check_dialogs(dialogs, assistant_first)

    def encode(dialog: Dialog) -> List[int]:
        return formatter.encode_dialog_prompt(dialog, tools, options)

    if truncate is None:
        return [encode(dialog) for dialog in dialogs], [[] for _ in dialogs]
    if max_gen_len is None or max_gen_len >= context:  # the answer ends where the context does
        max_gen_len = context // 4
    fitted = [oldest_turns_out(dialog, encode, context - max_gen_len) for dialog in dialogs]
    return [ids for ids, _ in fitted], [left_out for _, left_out in fitted]


def without(dialog: Dialog, dropped: Sequence[Message]) -> List[Message]:
    """What is left of a dialog from which `oldest_turns_out` has dropped messages."""
    said = [i for i, message in enumerate(dialog) if message["role"] != "system"]
    return [message for i, message in enumerate(dialog) if i not in said[: len(dropped)]]


def oldest_turns_out(
    dialog: Dialog, encode: Callable[[Dialog], List[int]], limit: int
) -> Tuple[List[int], List[Message]]:
    """Drop a dialog's oldest turns until it has at most `limit` tokens.

    A turn is a user's message and all messages up to the next user's. System messages and the last
    turn are always kept.

    Returns:
        The ids, and the messages dropped.

    Raises:
        TooLong: system messages and the last turn don't fit.
    """
    kept = list(dialog)
    dropped: List[Message] = []
    while len(ids := encode(kept)) > limit:
        said = [i for i, message in enumerate(kept) if message["role"] != "system"]
        turns = [i for i in said[1:] if kept[i]["role"] == "user"]
        if not turns:
            raise TooLong(len(ids), limit)
        oldest = [kept[i] for i in said if i < turns[0]]
        kept = without(kept, oldest)
        dropped += oldest
    return ids, dropped
