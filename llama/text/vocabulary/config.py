"""What Hugging Face's files beside a tokenizer say: names, ends, the chat template."""

from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Mapping, Optional

from llama.text.files import read_object, read_text
from llama.text.vocabulary.base import MAX_WORDS

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"  # as transformers writes it


class TokenizerConfig:
    """tokenizer_config.json, generation_config.json, config.json and chat_template.jinja.

    Attributes:
        stop: the ids at which generation ends, as configured.
        added: the tokens added to a vocabulary, by name, as tokenizer_config.json has them.
        user_defined: of these, those that text may contain.
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
        added = self.config.get("added_tokens_decoder") or {}
        good = isinstance(added, dict) and all(
            i.isdecimal() and int(i) < MAX_WORDS and _content(token) is not None
            for i, token in added.items()
        )
        if not good:
            raise self._wrong("added_tokens_decoder", added, 'tokens {"content": a text} by id')
        self.added: Dict[str, int] = {t["content"]: int(i) for i, t in added.items()}
        self.user_defined: FrozenSet[str] = frozenset(
            token["content"] for token in added.values() if not token.get("special")
        )
        self.prefix_once = self._prefix_once()
        self.chat_template = self._template()

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
        plain, with_tools = found.get("default"), found.get("tool_use")
        if not all(one is None or isinstance(one, str) for one in (plain, with_tools)):
            raise self._wrong("chat_template", given, "a template, nor a list of them by name")
        if plain is None or with_tools is None:
            return plain
        # One template that chooses as transformers does. The signs keep white space as it is.
        plain, with_tools = plain.removesuffix("\n"), with_tools.removesuffix("\n")
        return f"{{% if tools +%}}{with_tools}{{%+ else +%}}{plain}{{%+ endif %}}"

    def named(self, key: str, ids: Mapping[str, int]) -> Optional[int]:
        """The id of bos_token, eos_token or pad_token, if it is configured."""
        token = self.config.get(key)
        name = token if isinstance(token, str) or token is None else _content(token)
        if name is None and token is not None:
            raise self._wrong(key, token, 'a token\'s name, nor {"content": its name}')
        return None if name is None else ids.get(name)

    def add_bos(self, bos_id: Optional[int], default: bool) -> bool:
        """Whether a text to complete begins with bos."""
        configured = self._flag("add_bos_token")
        return bos_id is not None and (default if configured is None else configured)

    def _flag(self, key: str) -> Optional[bool]:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value


def _content(token: Any) -> Optional[str]:
    """The text of a token that is described by an object; None for what isn't one."""
    content = token.get("content") if isinstance(token, dict) else None
    return content if isinstance(content, str) else None
