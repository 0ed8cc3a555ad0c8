"""The plots of a run of benchmarks.peers: what each side reaches, and what the machine could."""

from pathlib import Path
from typing import Any, Dict

COLOURS = {"llama": "#2a6f97", "transformers": "#e09f3e", "llama.cpp": "#9e9e9e"}


def draw(results: Dict[str, Any], out: Path) -> None:
    """One PNG for each group of cases: a bar for each side, a line at the limit above it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for group in ("first", "decode", "batch"):
        cases = {n: c for n, c in results["generation"].items() if c["group"] == group}
        if not cases:
            continue
        figure, axes = pyplot.subplots(1, len(cases), figsize=(4.2 * len(cases), 4), squeeze=False)
        for axis, (name, case) in zip(axes[0], cases.items(), strict=True):
            sides = case["sides"]
            labels, rates = list(sides)[::-1], [side["tok_s"] for side in sides.values()][::-1]
            limits = [side["tok_s"] / side["limit"] for side in sides.values()][::-1]
            colours = [COLOURS[label.split()[0]] for label in labels]
            axis.barh(labels, rates, color=colours)
            if group == "decode":
                axis.scatter(limits, labels, marker="|", s=120, color="black", label="limit")
                axis.legend(loc="lower right")
            axis.set_title(name)
            axis.set_xlabel("tokens / s")
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[0][1:]:
            axis.set_yticklabels([])
        figure.suptitle(f"{results['processor']}, {results['threads']} threads")
        figure.tight_layout()
        figure.savefig(out / f"{group}.png", dpi=90)
        pyplot.close(figure)
