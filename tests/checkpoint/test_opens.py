"""The tables of what opens, in docs/checkpoints.md, are those of the readers' registries."""

import importlib.util

from conftest import ROOT

from llama.checkpoint.schemes import SCHEMES
from llama.families.registry import FAMILIES


def test_the_tables_in_the_docs_are_of_now():
    """After a family or a scheme: python docs/opens.py."""
    spec = importlib.util.spec_from_file_location("opens", ROOT / "docs" / "opens.py")
    opens = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(opens)
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    assert page == opens.written(page), "run python docs/opens.py"
    between = page.split(opens.BEGIN)[1].split(opens.END)[0]
    names = {name for family in FAMILIES for name in (*family.architectures, *family.gguf)}
    assert all(f"`{name}`" in between for name in names | {*SCHEMES})
