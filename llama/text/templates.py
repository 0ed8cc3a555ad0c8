"""Dialogs to token ids by a checkpoint's chat template (Jinja2)."""

import datetime
import json
import re
import secrets
from typing import Any, Callable, Dict, List, Mapping, Optional, Set

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama.text.chat import (
    PLAIN,
    ROLES,
    ChatFormat,
    Dialog,
    Format,
    PromptOptions,
    content_of,
    tool_calls,
)
from llama.text.encoder import IMAGE, Encoder, image_id
from llama.text.generic_tools import has_calls, tools_as_text
from llama.text.llama2 import Llama2Format
from llama.text.llama4 import Llama4Format
from llama.text.llama31 import Llama31Format
from llama.text.messages import image_sources, parts_of
from llama.text.tools import BUILTINS, Tools, plain_json, split_tools
from llama.text.vocabulary.base import strip_around


def chat_format(tokenizer: Encoder, scaled_rope: bool = False) -> Optional[Format]:
    """A checkpoint's chat format: its template, otherwise that of its model family, or None.

    Args:
        scaled_rope: `ModelArgs.use_scaled_rope`, which distinguishes Llama 3.1 and later from
            Llama 3: their tokenizer files are the same.
    """
    if tokenizer.chat_template:
        return TemplateFormat(tokenizer, tokenizer.chat_template)
    if "<|start_header_id|>" in tokenizer.special_tokens:
        return Llama31Format(tokenizer) if scaled_rope else ChatFormat(tokenizer)
    if "<|header_start|>" in tokenizer.special_tokens:
        return Llama4Format(tokenizer)
    if tokenizer.vocabulary.kind == "spm":
        return Llama2Format(tokenizer)
    return None


class TemplateFormat:
    """Encodes dialogs by a template, rendered in Jinja2's sandbox.

    Text in messages can't become control tokens. If the rendered text were tokenized with special
    tokens enabled, it could, as nothing tells whether `<|im_end|>` is the template's or the user's.
    Instead, before rendering, the names of special tokens in the parsed template are replaced by
    marks that contain a random 128-bit number. After rendering, only the marks become control
    tokens; all text between them, regardless of its origin, is encoded as ordinary text. A message
    can't contain a mark, as the number is secret, and the template receives messages unaltered.

    A template that composes the name of a special token at run time ('<|' + role + '|>') can't be
    distinguished from a user who does, and is refused. To detect this, a copy of the dialog and its
    tools, with the same structure but harmless strings, is rendered with and without marks: both
    must give the same ids. The copy only decides on refusal; the marks alone ensure that strings of
    messages, tools and calls stay text.
    """

    def __init__(self, tokenizer: Encoder, template: str):
        self.tokenizer = tokenizer
        self._nonce = secrets.token_hex(16)
        self._mark = re.compile(f"<{self._nonce}:([0-9]+)>")
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._open = f"<{self._nonce}:open> "  # after the text of a message that is continued
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        self.clock: Callable[[], datetime.datetime] = datetime.datetime.now
        environment.globals["strftime_now"] = lambda f: self.clock().strftime(f)
        try:
            tree = environment.parse(template)
            # The variables that it reads: a template without tools would ignore them silently.
            self._reads = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "load"}
            self._reads_calls = "tool_calls" in template
            self._plain = environment.from_string(template)
            self._written: Set[str] = set()  # names of special tokens
            self._marked = environment.from_string(self._tag(tree))
        except Exception as error:  # parsing a foreign program may raise anything
            raise ValueError(f"the checkpoint's chat template doesn't parse: {error}") from None
        self._names(marked=True)
        text, parts = ({"role": "user", "content": c} for c in (self._nonce, _parts(self._nonce)))
        self._in_parts = False
        self._in_parts = not self._shows(text) and self._shows(parts)
        # Where such a name in text is cut. White space is no turn, and often a token of its own.
        # A pair of tags isn't one either: models write <think>...</think> and <tool_call>.
        tags = {n for n in names if _TAG.fullmatch(n) and n.replace("<", "</") in names}
        tags |= {n.replace("<", "</") for n in tags}
        cut = (self._written & tokenizer.vocabulary.user_defined) - tags
        names = [n for n in cut if n.strip()]
        cuts = [f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names if len(n) > 1]
        self._cut = re.compile("|".join(cuts) or "(?!)")

    def _shows(self, message: Dict[str, Any]) -> bool:
        """Whether the template writes a message. Llama Guard 3's leaves out contents that aren't a
        list of parts, silently."""
        try:
            given = {"messages": [message], "add_generation_prompt": True}
            return self._nonce in self._render(self._plain, given)
        except ValueError:
            return False

    def _tag(self, tree: nodes.Template) -> nodes.Template:
        """Replace special tokens in the template's own text by marks, in place."""

        def visit(node: nodes.Node) -> None:
            if isinstance(node, nodes.TemplateData):
                node.data = self._marks(node.data)
            elif isinstance(node, nodes.Const) and isinstance(node.value, str):
                node.value = self._marks(node.value)
            elif isinstance(node, (nodes.Call, nodes.Filter)):
                if node.node is not None:  # not in arguments: split('</s>') searches for its own
                    visit(node.node)
            elif not isinstance(node, (nodes.Compare, nodes.Test)):
                for child in node.iter_child_nodes():
                    visit(child)

        visit(tree)
        return tree

    def _marks(self, text: str) -> str:
        self._written.update(self._special.findall(text))
        ids = self.tokenizer.special_tokens
        return self._special.sub(lambda found: f"<{self._nonce}:{ids[found[0]]}>", text)

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Tools = None, options: PromptOptions = PLAIN
    ) -> List[int]:
        """The dialog with its tools, followed by the header of the assistant's answer. Tools and
        calls for which the template has no place are written as text, and the tokens of images
        stand in the texts: Llama 3.2 Vision's has none for images beside tools.

        Raises:
            ValueError: the template refuses the dialog, has no place for built-in tools, has no
                variable that is in template_kwargs, leaves out the message to be continued, or
                composes control tokens at run time; or what `PromptOptions.check` raises.
        """
        images = len(image_sources(dialog))
        if not images:
            return self._prompt(dialog, tools, options)
        image, named = image_id(self.tokenizer), self.tokenizer.special_tokens[IMAGE]
        for in_text in ("", f"<{self._nonce}:{named}>"):
            ids = self._prompt(dialog, tools, options, in_text)
            if ids.count(named) == images:
                return [image if i == named else i for i in ids]
        raise ValueError("the checkpoint's chat template has no place for an image")

    def _prompt(
        self, dialog: Dialog, tools: Tools, options: PromptOptions, image: str = ""
    ) -> List[int]:
        """The ids, with those of images by name; image: its mark, if it is to stand in texts."""
        options.check(dialog, takes_kwargs=True)
        kwargs = self._kwargs(options.template_kwargs)
        as_text = tools if "tools" not in self._reads else None
        if as_text or (not self._reads_calls and has_calls(dialog)):
            dialog = tools_as_text(dialog, as_text)
            tools = None if as_text else tools
        if options.continue_final_message:
            content_of(dialog[-1])  # raises for images, which nothing can continue
        messages = _with_ids([_for_template(message, image) for message in dialog])
        given = {"messages": messages, **self._tools(tools)}
        harmless = {key: _harmless(value) for key, value in given.items()}
        given.update(kwargs)
        if self._special.search(json.dumps(kwargs, ensure_ascii=False)):
            kwargs = {key: _harmless(value) for key, value in kwargs.items()}
        harmless.update(kwargs)
        called = [
            call["function"] for m in harmless["messages"] for call in m.get("tool_calls", ())
        ]
        called = [function for function in called if function["name"] not in BUILTINS]
        for function in called:
            function["name"] = self._nonce
        for one in (given, harmless):
            one["add_generation_prompt"] = options.begins_answer
            if options.continue_final_message:
                one["messages"][-1]["content"] += self._open
        try:
            plain = self._render(self._plain, harmless)
        except ValueError as refused:
            if not called:
                raise
            for one in (given, harmless):  # once more, with arguments as OpenAI's API has them
                _write_arguments(one["messages"])
            try:
                plain = self._render(self._plain, harmless)
            except ValueError:
                raise refused from None
        ids = self._encode(self._render(self._marked, given))
        whole = self.tokenizer.encode(plain, bos=False, eos=False, allowed_special="all")
        if self._encode(self._render(self._marked, harmless)) != whole:
            raise ValueError(
                "the checkpoint's chat template puts control tokens together as it runs, which "
                "can't be told from a user who types them; such templates aren't supported"
            )
        if plain.count(self._nonce) < len(called):  # it writes calls beside some contents only
            return self._prompt(tools_as_text(dialog, None), tools, options, image)
        return ids

    def _tools(self, tools: Tools) -> Dict[str, Any]:
        """The template variables for tools; Llama 3.1's has one for built-in tools."""
        schemas, builtins = split_tools(tools or [])
        variables: Dict[str, Any] = {"tools": schemas} if schemas else {}
        if builtins:
            variables["builtin_tools"] = builtins
        for name in variables:
            if name not in self._reads:
                raise ValueError(
                    f"the checkpoint's chat template has no place for {name}: pass a JSON schema "
                    "or a Python function instead"
                )
        return variables

    def _kwargs(self, kwargs: Mapping[str, Any]) -> Dict[str, Any]:
        for name in kwargs:
            if name in _OURS:
                raise ValueError(f"template_kwargs: {name!r} isn't one, as it is set otherwise")
            if name not in self._reads:
                raise ValueError(
                    f"template_kwargs: the checkpoint's chat template has no variable {name!r}"
                )
        return plain_json(dict(kwargs), "template_kwargs")

    def _render(self, template: jinja2.Template, given: Dict[str, Any]) -> str:
        marked = template is self._marked
        variables = {"tools": None, "documents": None, **self._names(marked), **given}
        if self._in_parts:
            variables["messages"] = [
                {**m, "content": _parts(m["content"])} for m in given["messages"]
            ]
        try:
            text = template.render(variables)
        except Exception as error:  # raise_exception, the sandbox's, or a mistake in the template
            raise ValueError(
                f"the checkpoint's chat template refuses this dialog: {error}"
            ) from None
        last = given["messages"][-1]["content"] if given["messages"] else ""
        if not isinstance(last, str) or not last.endswith(self._open):
            return text
        until, *rest = text.split(self._open.rstrip())
        if len(rest) != 1:
            raise ValueError(
                "continue_final_message: the checkpoint's chat template doesn't put the last "
                "message's content into the prompt, or does so twice"
            )
        said = last.removesuffix(self._open)
        strips = bool(said.strip()) and not rest[0].startswith(" ")
        return until.removesuffix(said[len(said.rstrip()) :]) if strips else until

    def _names(self, marked: bool) -> Dict[str, str]:
        """The variables bos_token and eos_token, which transformers passes to templates."""
        by_id = {i: name for name, i in self.tokenizer.special_tokens.items()}
        names = {
            "bos_token": by_id.get(self.tokenizer.bos_id, ""),  # type: ignore[arg-type]
            "eos_token": by_id.get(self.tokenizer.eos_id, ""),
        }
        return {key: self._marks(name) if marked else name for key, name in names.items()}

    def _encode(self, rendered: str) -> List[int]:
        ids: List[int] = []
        parts = self._mark.split(rendered)
        parts = strip_around(parts, map(int, parts[1::2]), self.tokenizer.vocabulary)
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(int(part))
                continue
            for piece in filter(None, self._cut.split(part)):
                ids += self.tokenizer.encode(piece, bos=False, eos=False, begins=not ids)
        return ids


def _for_template(message: Any, image: str) -> Dict[str, Any]:
    """A message as transformers passes it to templates, with tool calls in OpenAI's format; images
    are parts, or, where there is a mark of them, that in one text."""
    plain = {key: message[key] for key in ("role", "name", "tool_call_id") if key in message}
    parts = parts_of(message)
    if image or not image_sources([message]):
        plain["content"] = "".join(part if isinstance(part, str) else image for part in parts)
    else:
        plain["content"] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in parts
        ]
    calls = tool_calls(message)
    if calls:
        plain["tool_calls"] = [
            {
                **({"id": call["id"]} if "id" in call else {}),
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in calls
        ]
    return plain


def _parts(content: Any) -> List[Any]:
    """A content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _with_ids(messages: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The messages, in which calls and their results have ids, as Mistral's templates ask: those
    that have none get nine letters and digits, by their position."""
    count = 0
    waiting: List[str] = []
    for message in messages:
        if "tool_calls" in message:
            waiting = []
        for call in message.get("tool_calls", ()):
            count += 1
            waiting.append(call.setdefault("id", f"call{count:05d}"))
        if message["role"] in ("tool", "ipython") and waiting:
            message.setdefault("tool_call_id", waiting[0])
            waiting = [i for i in waiting if i != message["tool_call_id"]]
    return messages


def _write_arguments(messages: List[Dict[str, Any]]) -> None:
    """Turn the arguments of calls into JSON texts, in place."""
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        function = call["function"]
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)


# No tags of text are <s>, the beginning of a sequence, and those that say who speaks.
_TAG = re.compile(rf"<(?!({'|'.join(ROLES)})>)\w{{2,}}>")

# Variables that aren't anyone's to set.
_OURS = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")

# Names that templates look up and compare with, kept so that the copy takes the same branches.
_KEYS = {
    "role", "content", "tool_calls", "tool_call_id", "id", "type", "function", "name", "arguments",
    "description", "parameters", "properties", "required", "items", "enum", "nullable", "anyOf",
    "additionalProperties", "default", "return", "text",
}  # fmt: skip
_VALUES = {
    "function", "string", "integer", "number", "boolean", "array", "object", "null", "text",
    "image", *BUILTINS,
}  # fmt: skip


def _harmless(value: Any, key: str = "") -> Any:
    """A copy of a value, with the same structure but without its strings."""
    if isinstance(value, dict):
        return {
            (name if name in _KEYS else f"x{i}"): _harmless(one, name)
            for i, (name, one) in enumerate(value.items())
        }
    if isinstance(value, list):
        return [_harmless(one, key) for one in value]
    if not isinstance(value, str):
        return value
    if key == "role":
        return value if value in ROLES else "user"
    if key in ("id", "tool_call_id"):  # Mistral's templates check the length
        return "x" * len(value)
    return value if value in _VALUES else "x" * bool(value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """transformers' filter, in place of Jinja2's, which escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Generation(Extension):
    """transformers' {% generation %} block, which only marks the answers, for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> List[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
