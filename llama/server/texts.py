"""Texts of clients to tokens, and what clients are told of tokens."""

from typing import Any, Dict, List, Optional, Sequence

from llama.engine.predictions import Event
from llama.tokenizer import Tokenizer

MOST_TOP_LOGPROBS = 20


def text_ids(tokenizer: Tokenizer, text: str, bos: bool, special: bool) -> List[int]:
    """A text's ids. The names of control tokens in it are text, unless they are asked for: it may
    hold what strangers wrote."""
    allowed: Any = "all" if special else frozenset()
    return tokenizer.encode(text, bos=bos, eos=False, allowed_special=allowed)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text by itself; bytes that are no character become U+FFFD."""
    return tokenizer.decode_bytes([token]).decode("utf-8", "replace")


def chat_logprob(tokenizer: Tokenizer, event: Event) -> Optional[Dict[str, Any]]:
    """An entry of a chat answer's logprobs; None for an event without token."""
    if event.token is None or event.logprob is None:
        return None
    best = event.top_logprobs or []
    return {
        **_entry(tokenizer, event.token, event.logprob),
        "top_logprobs": [_entry(tokenizer, token, value) for token, value in best],
    }


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> Dict[str, Any]:
    data = tokenizer.decode_bytes([token])
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


class Offsets:
    """Where the texts of tokens begin, in characters. Events' own texts may be held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder, self._at = tokenizer.stream(), 0

    def of(self, token: int) -> int:
        """The next token's."""
        at = self._at
        self._at += len(self._decoder.feed(token))
        return at


def text_logprobs(
    tokenizer: Tokenizer, events: Sequence[Event], best: int, offsets: Offsets
) -> Dict[str, Any]:
    """A text completion's logprobs.

    Args:
        best: most probable tokens of each; its own is added if it is none of them.
        offsets: of the choice; it is advanced.
    """
    found: Dict[str, Any] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [] if best else None, "text_offset": [],
    }  # fmt: skip
    for event in events:
        if event.token is not None:
            text = token_text(tokenizer, event.token)
            found["tokens"].append(text)
            found["token_logprobs"].append(event.logprob)
            found["text_offset"].append(offsets.of(event.token))
            if best:
                top = {token_text(tokenizer, t): value for t, value in event.top_logprobs or ()}
                found["top_logprobs"].append({text: event.logprob, **top} if top else None)
    return found
