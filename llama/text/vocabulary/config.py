"""What Hugging Face's files beside a tokenizer say: names, ends, the chat template."""

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from llama.text.files import read_object, read_text
from llama.text.vocabulary.base import MAX_WORDS

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of added tokens
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"  # as transformers writes it
PROCESSOR_TEMPLATE = "chat_template.json"  # of models that see, as transformers 4 wrote it


class TokenizerConfig:
    """tokenizer_config.json, generation_config.json, config.json, chat_template.jinja, and
    chat_template.json, which transformers takes before the others.

    Attributes:
        stop: the ids at which generation ends, as configured.
        tokens: the tokens added to a vocabulary, by id, as tokenizer_config.json describes them;
            of added_tokens.json, which older files have in its place, only names are known.
        named_tokens: what the keys bos_token, eos_token, pad_token and unk_token name.
        prefix_once: what transformers' LlamaTokenizer makes of it (see `Vocabulary`); None where
            another class leaves that to tokenizer.json.
        chat_template: the template, or None; where there is another one for dialogs with tools,
            both in one.

    Raises:
        ValueError: a value of a type that its key can't have, by file and key.
    """

    def __init__(self, path: Optional[Path]):
        self._path = path
        self.config = self._read("tokenizer_config.json")
        self.stop = self._stop()
        keys = ("bos_token", "eos_token", "pad_token", "unk_token")
        self.named_tokens = {key: name for key in keys if (name := self._name(key)) is not None}
        self.tokens = self._tokens()
        self.prefix_once = self._prefix_once()
        self.chat_template = self._template()

    def _tokens(self) -> Dict[int, Dict[str, Any]]:
        older = self._read("added_tokens.json")
        if not all(type(i) is int and 0 <= i < MAX_WORDS for i in older.values()):
            raise ValueError(
                f"{self._path and self._path.with_name('added_tokens.json')}: "
                f"{older!r:.80} isn't ids by name"
            )
        named = {*self.named_tokens.values()}
        tokens = {
            i: {"content": name, **({"special": True} if name in named else {})}
            for name, i in older.items()
        }
        added = self.config.get("added_tokens_decoder") or {}
        good = isinstance(added, dict) and all(
            i.isdecimal()
            and int(i) < MAX_WORDS
            and _content(token) is not None
            and all(isinstance(token.get(flag, False), bool) for flag in FLAGS)
            for i, token in added.items()
        )
        if not good:
            what = 'tokens {"content": a text} by id, with true or false for each flag'
            raise self._wrong("added_tokens_decoder", added, what)
        return tokens | {int(i): token for i, token in added.items()}

    def strips(self) -> Dict[str, Any]:
        """The tokens that take white space with them: `Vocabulary.lstrip` and `rstrip`."""
        return {
            side: frozenset(i for i, token in self.tokens.items() if token.get(side))
            for side in ("lstrip", "rstrip")
        }

    def _read(self, name: str) -> Dict[str, Any]:
        file = self._path and self._path.with_name(name)
        return read_object(file) if file and file.exists() else {}

    def _wrong(
        self, key: str, value: Any, what: str, name: str = "tokenizer_config.json"
    ) -> ValueError:
        file = self._path and self._path.with_name(name)
        return ValueError(f"{file}: {key}={value!r:.80} isn't {what}")

    def _stop(self) -> List[int]:
        for name in ("generation_config.json", "config.json"):
            eos = self._read(name).get("eos_token_id")
            if eos is not None:
                ids = eos if isinstance(eos, list) else [eos]
                if any(type(i) is not int or i < 0 for i in ids):
                    raise self._wrong("eos_token_id", eos, "an id or a list of ids", name)
                return ids
        return []

    def _prefix_once(self) -> Optional[bool]:
        ours = self.config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        # For other models transformers takes another class than is named.
        if not ours or self._read("config.json").get("model_type", "llama") != "llama":
            return None
        return not self._flag("legacy")

    def _template(self) -> Optional[str]:
        given = self.config.get("chat_template")
        found = {"default": given}
        if isinstance(given, list) and all(isinstance(one, dict) for one in given):
            found = {one.get("name"): one.get("template") for one in given}
        for name, file in (("default", "chat_template.jinja"), ("tool_use", TOOL_TEMPLATE)):
            if self._path and (path := self._path.parent / file).exists():
                found[name] = read_text(path)
        of_processor = self._read(PROCESSOR_TEMPLATE).get("chat_template")
        if not isinstance(of_processor, str | None):
            raise self._wrong("chat_template", of_processor, "a template", PROCESSOR_TEMPLATE)
        found["default"] = of_processor or found.get("default")
        plain, with_tools = found.get("default"), found.get("tool_use")
        if not all(one is None or isinstance(one, str) for one in (plain, with_tools)):
            raise self._wrong("chat_template", given, "a template, nor a list of them by name")
        return _joined(plain, with_tools)

    def named(self, key: str, ids: Mapping[str, int]) -> Optional[int]:
        """The id of bos_token, eos_token or pad_token, if it is configured.

        Raises:
            ValueError: an eos_token that is no token: generation would never end.
        """
        name = self.named_tokens.get(key)
        if name is not None and name not in ids and key == "eos_token":
            raise self._wrong(key, name, "one of the special tokens beside it")
        return None if name is None else ids.get(name)

    def _name(self, key: str) -> Optional[str]:
        token = self.config.get(key)
        name = token if isinstance(token, str) or token is None else _content(token)
        if name is None and token is not None:
            raise self._wrong(key, token, 'a token\'s name, nor {"content": its name}')
        return name

    def add_bos(self, bos_id: Optional[int], default: bool) -> bool:
        """Whether a text to complete begins with bos."""
        configured = self._flag("add_bos_token")
        return bos_id is not None and (default if configured is None else configured)

    def _flag(self, key: str) -> Optional[bool]:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value


def gguf_template(metadata: Mapping[str, Any]) -> Optional[str]:
    """The chat template in a GGUF file, joined with the one that it may have for tools."""
    with_tools = metadata.get("tokenizer.chat_template.tool_use")
    return _joined(metadata.get("tokenizer.chat_template"), with_tools)


def _joined(plain: Optional[str], with_tools: Optional[str]) -> Optional[str]:
    """One template that chooses as transformers does. The signs keep white space as it is."""
    if not isinstance(plain, str) or not isinstance(with_tools, str):
        return plain
    plain, with_tools = plain.removesuffix("\n"), with_tools.removesuffix("\n")
    return f"{{% if tools +%}}{with_tools}{{%+ else +%}}{plain}{{%+ endif %}}"


def _content(token: Any) -> Optional[str]:
    """The text of a token that is described by an object; None for what isn't one."""
    content = token.get("content") if isinstance(token, dict) else None
    return content if isinstance(content, str) else None
