"""Bounds on what a response format may cost.

llguidance bounds the automata that it builds, but not the work for some of them: `multipleOf`, and
intersections of patterns with each other or with long enumerations, can take hours or all memory.
What may do so is compiled in a process of its own first, with a limit on both.
"""

import subprocess
import sys
from typing import Any, Callable

MAX_CHARS = 200_000  # of a format as JSON
MAX_DEPTH = 100  # brackets of that JSON
CPU_SECONDS, MEMORY_MB = 2, 2048  # of the trial

_SMALL = 4_000  # characters of a format that needs no trial, unless it has one of these
_COSTLY = ('"multipleOf"', '"pattern', '"type": "grammar"')


def check_size(text: str, refuse: Callable[[str], Any]) -> None:
    """Refuse a format, given as JSON, that is too long or nested too deeply."""
    if len(text) > MAX_CHARS:
        refuse(f"it has {len(text):,} characters, and the limit is {MAX_CHARS:,}: simplify it")
    depth, quoted, escaped = 0, False, False
    for char in text:
        quoted ^= char == '"' and not escaped
        escaped = char == "\\" and not escaped
        depth += not quoted and (char in "{[") - (char in "]}")
        if depth > MAX_DEPTH:
            refuse(f"it is nested more than {MAX_DEPTH} levels deep: simplify it")


def check_cost(text: str, grammar: str, refuse: Callable[[str], Any]) -> None:
    """Refuse a format, given as JSON, whose grammar takes too much time or memory to compile."""
    if len(text) <= _SMALL and not any(word in text for word in _COSTLY):
        return
    command = [sys.executable, "-P", __file__, str(CPU_SECONDS), str(MEMORY_MB)]
    try:
        failed = subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=30 * CPU_SECONDS
        ).returncode
    except subprocess.TimeoutExpired:
        failed = 1
    if failed:
        refuse(
            f"compiling it takes more than {CPU_SECONDS} s or {MEMORY_MB} MB: simplify it; "
            "multipleOf, patterns combined with others and long lists of choices cost most"
        )


class _Bytes:
    """A vocabulary of the 256 bytes: masks of a larger one cost more, but that is bounded."""

    bos_token_id, eos_token_id = None, 256
    special_token_ids = (256,)
    tokens = (*(bytes([i]) for i in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _trial(cpu_seconds: int, memory_mb: int) -> None:
    """Compile the grammar that stdin has; errors that llguidance reports are no failure here."""
    import resource

    import llguidance

    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    trie = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    matcher = llguidance.LLMatcher(trie, sys.stdin.read(), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()


if __name__ == "__main__":
    _trial(int(sys.argv[1]), int(sys.argv[2]))
