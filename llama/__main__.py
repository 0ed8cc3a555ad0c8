"""`python -m llama`, `torchrun -m llama` and the `llama` command."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn, Optional


def interrupted(number: int, frame: Optional[FrameType]) -> NoReturn:
    """Ctrl-C. Ends the process while modules are imported: some of them swallow exceptions."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> int:
    """Run the command line in sys.argv. Returns the exit code."""
    signal.signal(signal.SIGINT, interrupted)
    from llama.apps import cli  # from here on, Ctrl-C is one line

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
