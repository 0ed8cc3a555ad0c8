"""What chat formats need of a tokenizer."""

from typing import Dict, List, Optional, Protocol

from llama.text.vocabulary.base import Names, Vocabulary


class Encoder(Protocol):
    """The part of `llama.tokenizer.Tokenizer` by which dialogs become token ids."""

    special_tokens: Dict[str, int]
    bos_id: Optional[int]
    eos_id: int
    chat_template: Optional[str]
    vocabulary: Vocabulary

    def encode(
        self, s: str, *, bos: bool, eos: bool, allowed_special: Names = frozenset()
    ) -> List[int]:
        """Token ids of a text; names of special tokens in it stay text unless they are allowed."""
