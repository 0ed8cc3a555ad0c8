"""Where this machine keeps what was fetched or compiled once."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """$LLAMA_CACHE, or else llama-reference in the user's cache (on Linux, ~/.cache)."""
    own = os.environ.get("LLAMA_CACHE")
    return Path(own).expanduser() if own else platformdirs.user_cache_path("llama-reference", False)
