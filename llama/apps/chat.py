"""`llama chat`: a conversation in the terminal."""

from typing import Literal, Optional

from llama.apps.options import SAMPLING, CachingModel, Sampling, Text, Texts

WEEK = 7 * 24 * 3600.0  # seconds: the other ranks wait while a user thinks


def chat(
    model: CachingModel,
    sampling: Sampling = SAMPLING,
    *,
    system: Optional[Text] = None,
    max_gen_len: Optional[int] = None,
    speculate: Optional[Literal["lookup", "draft", "off"]] = None,
    history: Optional[str] = None,
    tools: Optional[str] = None,
    image: Optional[Texts] = None,
) -> None:
    """Talk with a model. /help lists the commands. In a pipe, each line is a message.

    Args:
        system: the system message.
        max_gen_len: tokens of an answer at most; by default what --max-seq-len leaves room for.
        speculate: speculative decoding, for the same answers in less time: lookup proposes what
            followed the same words before, draft asks the draft model.
        history: a file for the lines that you type; by default ~/.local/state/llama/history.

        tools: a JSON file with a list of tools' schemas. Calls are shown as the model writes them;
            the next line that you write is the tool's result.
        image: a path or an address of an image for the first message; may be given several times.

    Raises:
        ValueError: an option out of range, a checkpoint without a chat format, or what
            `Llama.build` raises; in a pipe, at the end, messages that couldn't be answered.
    """
    import signal
    import sys

    from llama.apps import repl
    from llama.apps.terminal import Rich, pick_terminal
    from llama.engine.params import SamplingParams
    from llama.generation import Llama
    from llama.layers import parallel

    if max_gen_len is not None and max_gen_len < 1:
        raise ValueError(f"max_gen_len={max_gen_len} must be at least 1")
    if speculate == "draft" and model.draft_ckpt_dir is None:
        raise ValueError("speculate='draft' needs a draft model: give --draft-ckpt-dir")
    repl.check_packages()
    known = repl.read_tools(tools) if tools else []
    parallel.initialize(device=model.device, timeout=model.rank_timeout, wait=WEEK)
    if not parallel.is_rank_zero():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says when to stop
    llama = Llama.build(**{**vars(model), "max_batch_size": 1})  # one dialog at a time
    params = SamplingParams(**vars(sampling))
    session = repl.Session(
        llama,
        params,
        system,
        max_gen_len,
        parallel.broadcast_object,
        speculate,
        known,
        (image or []) if parallel.is_rank_zero() else [],
    )
    if not parallel.is_rank_zero():
        return repl.follow(llama)
    terminal = pick_terminal(history)
    if isinstance(terminal, Rich):
        terminal.show("/help lists the commands")
    unanswered = repl.talk(session, terminal)
    parallel.broadcast_object(None)  # not after an error: the ranks may no longer be in step
    if unanswered and not sys.stdin.isatty():
        raise ValueError(f"{unanswered} of the messages couldn't be answered: see above")
