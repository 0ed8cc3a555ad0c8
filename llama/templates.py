"""Dialogs to token ids by the Jinja2 template that came with a checkpoint."""

import datetime
import json
import re
import secrets
from typing import TYPE_CHECKING, Any, Dict, List, Optional

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama.chat import ROLES, ChatFormat, Dialog, Format

if TYPE_CHECKING:
    from llama.tokenizer import Tokenizer


def chat_format(tokenizer: "Tokenizer") -> Optional[Format]:
    """The format of a checkpoint's dialogs: its template, else Llama 3's, else None."""
    if tokenizer.chat_template:
        return TemplateFormat(tokenizer, tokenizer.chat_template)
    if "<|start_header_id|>" in tokenizer.special_tokens:
        return ChatFormat(tokenizer)
    return None


class TemplateFormat:
    """Encodes dialogs by a template, rendered in Jinja2's sandbox.

    What a user wrote can't become a control token. Rendering to text and tokenizing that with
    special tokens on would allow it, since the text no longer tells who wrote `<|im_end|>`.
    Instead the names of special tokens are replaced within the parsed template, before anything is
    rendered, by marks that contain a fresh 128-bit random number. After rendering, the marks and
    nothing else become control tokens; all the text between them, whoever wrote it, is encoded as
    ordinary text. No message can contain a mark without guessing the number, and messages go
    through the template unaltered, so that whatever it does to them has its usual effect.

    A template that puts the name of a special token together from pieces while it runs
    ('<|' + role + '|>') can't be told from a user doing so and is refused.
    """

    def __init__(self, tokenizer: "Tokenizer", template: str):
        self.tokenizer = tokenizer
        self._nonce = secrets.token_hex(16)
        self._mark = re.compile(f"<{self._nonce}:([0-9]+)>")
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
        try:
            self._plain = environment.from_string(template)
            self._marked = environment.from_string(self._tag(environment.parse(template)))
        except Exception as error:  # a template is somebody else's program
            raise ValueError(f"the checkpoint's chat template doesn't parse: {error}") from None

    def _tag(self, tree: nodes.Template) -> nodes.Template:
        """Replace special tokens in what the template itself puts out, in place."""

        def visit(node: nodes.Node) -> None:
            if isinstance(node, nodes.TemplateData):
                node.data = self._marks(node.data)
            elif isinstance(node, nodes.Const) and isinstance(node.value, str):
                node.value = self._marks(node.value)
            elif isinstance(node, (nodes.Call, nodes.Filter)):
                if node.node is not None:  # its arguments, as in split('</s>'), are looked for
                    visit(node.node)
            elif not isinstance(node, (nodes.Compare, nodes.Test)):
                for child in node.iter_child_nodes():
                    visit(child)

        visit(tree)
        return tree

    def _marks(self, text: str) -> str:
        ids = self.tokenizer.special_tokens
        return self._special.sub(lambda found: f"<{self._nonce}:{ids[found[0]]}>", text)

    def encode_dialog_prompt(self, dialog: Dialog) -> List[int]:
        """The dialog, and what precedes the assistant's answer.

        Raises:
            ValueError: the template refuses the dialog, or builds control tokens as it runs.
        """
        ids = self._encode(self._render(self._marked, dialog))
        harmless = [
            {"role": message["role"] if message["role"] in ROLES else "user", "content": "x"}
            for message in dialog
        ]
        whole = self.tokenizer.encode(
            self._render(self._plain, harmless), bos=False, eos=False, allowed_special="all"
        )
        if self._encode(self._render(self._marked, harmless)) != whole:
            raise ValueError(
                "the checkpoint's chat template puts control tokens together as it runs, which "
                "can't be told from a user who types them; such templates aren't supported"
            )
        return ids

    def _render(self, template: jinja2.Template, dialog: Any) -> str:
        marked = template is self._marked
        try:
            return template.render(
                messages=[dict(message) for message in dialog],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._names(marked),
            )
        except Exception as error:  # raise_exception, the sandbox's, or a mistake in the template
            raise ValueError(
                f"the checkpoint's chat template refuses this dialog: {error}"
            ) from None

    def _names(self, marked: bool) -> Dict[str, str]:
        """The variables bos_token and eos_token, as transformers gives them to templates."""
        by_id = {i: name for name, i in self.tokenizer.special_tokens.items()}
        names = {
            "bos_token": by_id.get(self.tokenizer.bos_id, ""),  # type: ignore[arg-type]
            "eos_token": by_id.get(self.tokenizer.eos_id, ""),
        }
        return {key: self._marks(name) if marked else name for key, name in names.items()}

    def _encode(self, rendered: str) -> List[int]:
        ids: List[int] = []
        for i, part in enumerate(self._mark.split(rendered)):
            if i % 2:
                ids.append(int(part))
            elif part:
                ids.extend(self.tokenizer.encode(part, bos=False, eos=False))
        return ids


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """transformers' filter in place of Jinja2's own, which would write <, > and & as for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Generation(Extension):
    """transformers' {% generation %} block, which only tells training what the answers are."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> List[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
