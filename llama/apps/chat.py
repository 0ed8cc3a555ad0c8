"""`llama chat`: a conversation in the terminal."""

from typing import Literal, Optional

from llama.apps.options import SAMPLING, CachingModel, Sampling, Text


def chat(
    model: CachingModel,
    sampling: Sampling = SAMPLING,
    *,
    system: Optional[Text] = None,
    max_gen_len: Optional[int] = None,
    speculate: Optional[Literal["lookup", "draft", "off"]] = None,
    history: Optional[str] = None,
) -> None:
    """Talk with a model. /help lists the commands. In a pipe, each line is a message.

    Args:
        system: the system message.
        max_gen_len: tokens of an answer at most; by default what --max-seq-len leaves room for.
        speculate: speculative decoding, for the same answers in less time: lookup proposes what
            followed the same words before, draft asks the draft model.
        history: a file for the lines that you type; by default ~/.local/state/llama/history.

    Raises:
        ValueError: a checkpoint without a chat format, or what `Llama.build` raises.
    """
    from llama.apps.repl import converse

    converse(model, sampling, system, max_gen_len, speculate, history)
