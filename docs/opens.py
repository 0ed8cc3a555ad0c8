"""The tables of what opens, by the readers' own registries: `python docs/opens.py` writes them into
docs/checkpoints.md, and tests/checkpoint/test_opens.py compares.
"""

import sys
from pathlib import Path
from typing import Iterable, List

import gguf

from llama.backends import quantized
from llama.checkpoint.config import HEADS
from llama.checkpoint.schemes import SCHEMES
from llama.families.registry import FAMILIES

PAGE = Path(__file__).with_name("checkpoints.md")
BEGIN, END = "<!-- what opens: python docs/opens.py -->\n\n", "<!-- end of what opens -->"


def tables() -> str:
    """Markdown: networks, heads, and quantizations."""
    networks = [
        [family.name, _code(sorted(family.architectures)), _code(sorted(family.gguf)) or "no"]
        for family in FAMILIES
    ]
    heads = [[_code([name]), _code([f"llama.training.{reader}"])] for name, reader in HEADS.items()]
    schemes = [[_code([name]), _about(scheme)] for name, scheme in SCHEMES.items()]
    kept = [kind for kind in quantized.ALL if kind in gguf.GGMLQuantizationType.__members__]
    schemes.append(["in GGUF", f"computed as stored: {_code(sorted(kept))}; others dequantized"])
    return "\n\n".join(
        [
            _table(["network", "`architectures` in config.json", "architecture in GGUF"], networks),
            _table(["with another head", "read by"], heads),
            _table(["`quant_method`", "what it is"], schemes),
        ]
    )


def _about(scheme: object) -> str:
    """The first sentence of the module that reads a scheme, up to its details."""
    text = sys.modules[scheme.__module__].__doc__ or ""
    return text.strip().partition("\n")[0].partition(":")[0].rstrip(".")


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: List[str], rows: List[List[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(page: str) -> str:
    """The page with the tables of now."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + tables() + "\n\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
