"""Many machines, on Ray: `Predictor` for Ray Data's pipelines, `serve` for Ray Serve.

Names are imported when they are first used: `import llama.ray` alone needs no Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from llama.ray.predictor import Predictor
    from llama.ray.serving import serve

__all__ = ["Predictor", "serve"]

_HOME = {"Predictor": "llama.ray.predictor", "serve": "llama.ray.serving"}  # a name's module


def __getattr__(name: str) -> Any:
    """Raises ValueError: Ray isn't installed."""
    if name not in _HOME:
        raise AttributeError(f"module 'llama.ray' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llama"):
            raise
        raise ValueError(
            f"llama.ray needs {error.name}: pip install llama-reference[ray]"
        ) from None


def __dir__() -> List[str]:
    return sorted([*globals(), *__all__])
