"""Images in the terminal: recognized in what is pasted, and shown small."""

import shlex
from pathlib import Path
from typing import Any, List, NamedTuple, Optional
from urllib.parse import unquote

from PIL import Image

from llama.vision.fetch import load

EXTENSIONS = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp")
COLUMNS, ROWS = 40, 12


class Picture(NamedTuple):
    """An image of the message to come: what the dialog says of it, and how it looks."""

    source: str
    shown: Image.Image


def picture(source: str) -> Picture:
    """Raises FileNotFoundError and ValueError: what `load` raises."""
    image = load(source)
    named = source if ":" in source[:8] else str(Path(source).resolve())
    shown = image.copy()
    shown.thumbnail((COLUMNS, 2 * ROWS))
    return Picture(named, shown)


def pasted(line: str) -> Optional[str]:
    """The image that a line is: a data URI or an address of one, or a path as terminals paste it
    when a file is dropped on them, quoted or with backslashes."""
    if line[:11].lower() == "data:image/":
        return line
    try:
        words = shlex.split(line.removeprefix("file://"))
    except ValueError:  # a quote that isn't closed
        return None
    if line.startswith("file://"):  # from file managers, with %20 for spaces
        words = [*map(unquote, words)]
    if len(words) != 1 or not words[0].lower().endswith(EXTENSIONS):
        return None
    path = Path(words[0]).expanduser()
    return words[0] if ":" in words[0][:8] else str(path) if path.is_file() else None


def blocks(image: Image.Image) -> Any:
    """An image for `rich`: each character is two pixels, one above the other."""
    from rich.style import Style
    from rich.text import Text

    image = image.convert("RGB")
    lines: List[Text] = []
    for y in range(0, image.height - image.height % 2 or 1, 2):
        line = Text()
        for x in range(image.width):
            above, below = (
                "#{:02x}{:02x}{:02x}".format(*image.getpixel((x, min(row, image.height - 1))))  # type: ignore[misc]
                for row in (y, y + 1)
            )
            line.append("▀", Style(color=above, bgcolor=below))
        lines.append(line)
    return Text("\n").join(lines)
