"""Few-shot prompts: examples of a task, and a last line to complete."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

from llama.text.files import objects, string

TEMPLATE = "{input} => {output}"


@dataclass(frozen=True)
class FewShot:
    """Builds few-shot prompts.

    Args:
        shots: the examples, pairs of input and output.
        template: of each example, with {input} and {output}, in this order.
        instruction: put above the examples, with an empty line between.

    Raises:
        ValueError: a template without these placeholders; an output that contains `stop`.
    """

    shots: List[Tuple[str, str]]
    template: str = TEMPLATE
    instruction: Optional[str] = None

    def __post_init__(self) -> None:
        counts = [self.template.count(place) for place in ("{input}", "{output}")]
        if counts != [1, 1] or self.template.index("{input}") > self.template.index("{output}"):
            raise ValueError(
                f"template {self.template!r} needs {{input}} and then {{output}}, once each: "
                f"{TEMPLATE!r} for example"
            )
        for shown, answer in self.shots:
            if self.stop in answer:
                raise ValueError(
                    f"the output of the shot {shown!r} contains {self.stop!r}, where answers end: "
                    "give a template with another text after {output}"
                )

    @property
    def _parts(self) -> Tuple[str, str, str]:
        """The template's text before, between and after the placeholders."""
        before, rest = self.template.split("{input}")
        return (before, *rest.split("{output}"))  # type: ignore[return-value]

    @property
    def stop(self) -> str:
        """The stop string of an answer: the text after each example's output."""
        return self._parts[2] or "\n"

    def without_separator(self, query: str) -> str:
        """The query without a trailing separator of the template: "cheese =>" is "cheese"."""
        return query.rstrip().removesuffix(self._parts[1].strip())

    def prompt(self, query: str) -> str:
        """The text up to where the answer begins.

        It doesn't end with a space, because tokens of words begin with theirs.
        """
        before, between, after = self._parts
        written = [before + shown + between + answer + after for shown, answer in self.shots]
        head = [self.instruction, ""] if self.instruction else []
        return "\n".join([*head, *written, before + query.strip() + between]).rstrip(" \t")


def read_shots(shots: str) -> List[Tuple[str, str]]:
    """The examples of a JSONL file, or of 'a => b; c => d'."""
    if "=>" in shots:
        return [_shot(text) for text in re.split(r"(?<!\\);", shots) if text.strip()]
    path = Path(shots)
    if not path.is_file():
        raise FileNotFoundError(
            f"shots {shots!r}: neither 'input => output; input => output' nor a file that is there"
        )
    found = []
    for number, value in objects(path):
        pair = tuple(string(path, number, value, key) for key in ("input", "output"))
        found.append((pair[0], pair[1]))
    return found


def _shot(text: str) -> Tuple[str, str]:
    given = re.split(r"(?<!\\)=>", text, maxsplit=1)
    plain = [side.replace("\\;", ";").replace("\\=>", "=>").strip() for side in given]
    if len(plain) != 2 or not all(plain):
        raise ValueError(
            f"shot {text.strip()!r} isn't 'input => output'; a ; within is written \\;"
        )
    return plain[0], plain[1]
