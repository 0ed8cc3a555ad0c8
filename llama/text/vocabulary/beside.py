"""What Hugging Face's files beside a tokenizer say: names, ends, the chat template."""

from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Mapping, Optional

from llama.text.files import read_object


class Beside:
    """tokenizer_config.json, generation_config.json, config.json and chat_template.jinja.

    Attributes:
        stop: the ids at which generation ends, as configured.
        added: the tokens added to a vocabulary, by name, as tokenizer_config.json has them.
        user_defined: of these, those that text may contain.
        chat_template: the template, or None.
    """

    def __init__(self, path: Optional[Path]):
        self._path = path
        self.config = self._read("tokenizer_config.json")
        eos = self._read("generation_config.json").get("eos_token_id")
        eos = self._read("config.json").get("eos_token_id") if eos is None else eos
        self.stop: List[int] = [
            i for i in (eos if isinstance(eos, list) else [eos]) if i is not None
        ]
        added = self.config.get("added_tokens_decoder") or {}
        try:
            self.added: Dict[str, int] = {t["content"]: int(i) for i, t in added.items()}
            self.user_defined: FrozenSet[str] = frozenset(
                token["content"] for token in added.values() if not token.get("special")
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"added_tokens_decoder in tokenizer_config.json by {path} isn't usable: {error!r}"
            ) from None
        self.chat_template: Optional[str] = self._template()

    def _read(self, name: str) -> Dict[str, Any]:
        file = self._path and self._path.with_name(name)
        return read_object(file) if file and file.exists() else {}

    def _template(self) -> Optional[str]:
        file = self._path and self._path.with_name("chat_template.jinja")
        if file and file.exists():
            return file.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return template

    def named(self, key: str, ids: Mapping[str, int]) -> Optional[int]:
        """The id of bos_token, eos_token or pad_token, if it is configured."""
        token = self.config.get(key)
        return ids.get(str(token["content"] if isinstance(token, dict) else token))

    def add_bos(self, bos_id: Optional[int], default: bool) -> bool:
        """Whether a text to complete begins with bos."""
        configured = self.config.get("add_bos_token")
        return bos_id is not None and (default if configured is None else bool(configured))
