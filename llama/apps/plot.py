"""`llama plot`: the losses of a fine-tuning run as a picture."""

from pathlib import Path

NEEDED = "pip install 'llama-reference[train]'"  # matplotlib


def plot(run_dir: str) -> None:
    """Draw loss.png in the directory of a fine-tuning run, finished or not, from its log.jsonl.

    Args:
        run_dir: the --out of llama finetune.

    Raises:
        FileNotFoundError: no log.jsonl there.
        ValueError: an empty log, or matplotlib isn't installed.
    """
    from llama.backends.build import say

    if not draw(Path(run_dir)):
        raise ValueError(f"llama plot needs matplotlib: {NEEDED}")
    say(f"written: {Path(run_dir) / 'loss.png'}")


def draw(folder: Path) -> bool:
    """Draw loss.png, and whether there is matplotlib to draw it."""
    from llama.training.run import read_log

    log = folder / "log.jsonl"
    if not log.exists():
        raise FileNotFoundError(f"no log.jsonl in {folder}: it isn't the --out of llama finetune")
    lines = read_log(log)
    if not lines:
        raise ValueError(f"{log} is empty: no step was taken yet")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for key, label, style in (("loss", "learned", "-"), ("held_out_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    return True
