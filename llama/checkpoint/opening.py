"""Opens a checkpoint: the format is detected from the files that are there."""

from pathlib import Path

from llama.checkpoint.gguf import GGUFCheckpoint
from llama.checkpoint.huggingface import HFCheckpoint
from llama.checkpoint.listing import HF_WEIGHTS
from llama.checkpoint.meta import MetaCheckpoint
from llama.checkpoint.source import Checkpoint

FILES = (".safetensors", ".pth", ".bin")  # of directories


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
    ggufs = sorted(path.glob("*.gguf"))
    has_config = (path / "config.json").exists()
    # Beside Hugging Face's files, Mistral's have a params.json, and GGUF files a config.json.
    if (path / "params.json").exists() and (any(path.glob("*.pth")) or not has_config):
        return MetaCheckpoint(path)
    if has_config and (not ggufs or any(any(path.glob(f"{name}*")) for name in HF_WEIGHTS)):
        return HFCheckpoint(path)
    if path.is_file() and (path.suffix in FILES or path.name in ("params.json", "config.json")):
        raise ValueError(f"{path} is a file of a checkpoint: name its directory, {path.parent}")
    if path.is_file():
        return GGUFCheckpoint(path)
    if len(ggufs) == 1:
        return GGUFCheckpoint(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise ValueError(f"{path} holds several checkpoints, name one of them: {names}")
    raise ValueError(
        f"{path} holds no checkpoint: expected params.json with consolidated.*.pth, config.json "
        "with *.safetensors, or a .gguf file"
    )
