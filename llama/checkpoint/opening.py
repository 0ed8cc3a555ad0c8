"""Opens a checkpoint: the format is detected from the files that are there."""

from pathlib import Path

from llama.checkpoint.gguf import GGUFCheckpoint
from llama.checkpoint.huggingface import HFCheckpoint
from llama.checkpoint.listing import format_of
from llama.checkpoint.meta import MetaCheckpoint
from llama.checkpoint.source import Checkpoint
from llama.text.gguf_header import are_parts

FILES = (".safetensors", ".pth", ".bin")  # of directories


def format_at(path: Path) -> str:
    """What is in a directory, see `listing.format_of`."""
    return format_of(lambda name: (path / name).exists(), [*map(str, path.glob("*.gguf"))])


def open(path: str | Path) -> Checkpoint:
    """Open a directory in Meta's or Hugging Face's format, a .gguf file, or one's directory.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: something there that isn't a checkpoint, or a broken one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: `llama download smollm2` fetches a small one, "
            "`llama download OWNER/REPO` any of Hugging Face's"
        )
    kind, ggufs = format_at(path), sorted(path.glob("*.gguf"))
    if kind == "meta":
        return MetaCheckpoint(path)
    if kind == "hf":
        return HFCheckpoint(path)
    if path.is_file() and (path.suffix in FILES or path.name in ("params.json", "config.json")):
        raise ValueError(f"{path} is a file of a checkpoint: name its directory, {path.parent}")
    if path.is_file():
        return GGUFCheckpoint(path)
    if len(ggufs) == 1 or are_parts([file.name for file in ggufs]):
        return GGUFCheckpoint(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise ValueError(f"{path} holds several checkpoints, name one of them: {names}")
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{path} holds an adapter, not a model: name the model that it was trained for, and "
            f"with it --adapter-dir {path}"
        )
    raise ValueError(
        f"{path} holds no checkpoint: expected params.json with consolidated.*.pth, config.json "
        "with *.safetensors, or a .gguf file"
    )
