"""Plots of a run of benchmarks.peers: the speed of each side, and the machine's limit."""

from pathlib import Path
from typing import Any, Dict

COLOURS = {"llama": "#2a6f97", "transformers": "#e09f3e", "llama.cpp": "#9e9e9e"}


def draw(results: Dict[str, Any], out: Path) -> None:
    """One PNG per group of cases, with a bar for each side and a mark at its limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for group in ("first", "decode", "batch"):
        cases = {n: c for n, c in results["generation"].items() if c["group"] == group}
        if not cases:
            continue
        known = dict.fromkeys(name for case in cases.values() for name in case["sides"])
        labels = list(known)[::-1]
        nothing = {"tok_s": 0.0, "limit": 1.0}  # some sides skip some cases
        figure, axes = pyplot.subplots(
            1, len(cases), figsize=(2 + 3 * len(cases), 4), squeeze=False, sharey=True
        )
        for axis, (name, case) in zip(axes[0], cases.items(), strict=True):
            sides = [case["sides"].get(label, nothing) for label in labels]
            colours = [COLOURS[label.split()[0]] for label in labels]
            axis.barh(labels, [side["tok_s"] for side in sides], color=colours)
            limits = {
                label: s["tok_s"] / s["limit"] for label, s in zip(labels, sides, strict=True)
            }
            marks = {label: limit for label, limit in limits.items() if limit}
            axis.scatter(marks.values(), marks.keys(), marker="|", s=120, color="black")
            axis.set_title(name)
            axis.set_xlabel("tokens / s")
            axis.spines[["top", "right"]].set_visible(False)
        about = f"{results['processor']}, {results['threads']} threads; | the machine's limit"
        figure.suptitle(about)
        figure.tight_layout()
        figure.savefig(out / f"{group}.png", dpi=80)
        pyplot.close(figure)
