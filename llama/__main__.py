"""`python -m llama`, `torchrun -m llama` and the `llama` command."""

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType
from typing import List, NoReturn, Optional


def interrupted(number: int, frame: Optional[FrameType]) -> NoReturn:
    """Ctrl-C. Ends the process while modules are imported: some of them swallow exceptions."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def leave(codes: List[int]) -> None:
    """End the process, if the exit code is known: to take down torch's modules takes half a second.

    Python calls it when threads have ended and the handlers that were registered later have run.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if codes:
        os._exit(codes[0])


def main() -> int:
    """Run the command line in sys.argv. Returns the exit code, with which the process will end."""
    codes: List[int] = []
    atexit.register(leave, codes)  # what is registered first is called last
    signal.signal(signal.SIGINT, interrupted)
    from llama.apps import cli  # from here on, Ctrl-C is one line

    codes.append(cli.main())
    return codes[0]


if __name__ == "__main__":
    sys.exit(main())
