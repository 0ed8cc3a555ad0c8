"""Options of the example scripts, which Python Fire reads."""

import inspect
import itertools
import re
import sys
from typing import Any, Callable


def check_options(main: Callable[..., Any]) -> None:
    """Check the names of a script's options before it runs: Fire calls its function with those that
    it has, and complains of the others when it has answered.

    Raises:
        ValueError: an option that it doesn't have.
    """
    known = [*inspect.signature(main).parameters]
    for word in itertools.takewhile("--".__ne__, sys.argv[1:]):
        name = re.match(r"--([\w-]+)", word)
        if name and name[1].replace("-", "_") not in (*known, "help"):
            there_are = ", ".join(f"--{one}" for one in known)
            raise ValueError(f"there is no option --{name[1]}: there are {there_are}")
