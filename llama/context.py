"""A dialog that outgrows the context: what is left out of it."""

from typing import Callable, List, Tuple

from llama.chat import Dialog, Message


def oldest_turns_out(
    dialog: Dialog, encode: Callable[[Dialog], List[int]], limit: int
) -> Tuple[List[int], List[Message]]:
    """Leave out a dialog's oldest turns until it has at most `limit` tokens.

    A turn is a user's message with all that follows it, up to the next user's. The system message
    and the last turn always stay.

    Returns:
        The ids, and the messages that were left out.

    Raises:
        ValueError: what must stay doesn't fit.
    """
    kept, dropped = list(dialog), []
    start = int(kept[0]["role"] == "system")
    while len(ids := encode(kept)) > limit:
        turns = [i for i, message in enumerate(kept) if i > start and message["role"] == "user"]
        if not turns:
            raise ValueError(
                f"the last turn and the system message take {len(ids)} tokens, and there is room "
                f"for {limit}: shorten them, ask for a shorter answer (max_gen_len), or build with "
                "a larger max_seq_len"
            )
        dropped += kept[start : turns[0]]
        del kept[start : turns[0]]
    return ids, dropped
