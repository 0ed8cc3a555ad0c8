"""What chat formats need of a tokenizer."""

from typing import Dict, List, Optional, Protocol

from llama.text.vocabulary.base import Names, Vocabulary

IMAGE = "<|image|>"


class Encoder(Protocol):
    """The part of `llama.tokenizer.Tokenizer` by which dialogs become token ids."""

    special_tokens: Dict[str, int]
    bos_id: Optional[int]
    eos_id: int
    chat_template: Optional[str]
    vocabulary: Vocabulary

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Names = frozenset(),
        begins: bool = True,
    ) -> List[int]:
        """Token ids of a text; names of special tokens in it stay text unless they are allowed."""


def image_id(tokenizer: Encoder) -> int:
    """The id that stands for an image: the first after those of the embedding's ordinary rows.

    Hugging Face's vocabularies have it there, and perhaps tokens after it that were added later.
    Meta's has the name 245 ids earlier, where models never see it: its `ChatFormat` writes the id
    beyond the vocabulary instead.

    Raises:
        ValueError: a vocabulary without it.
    """
    if IMAGE not in tokenizer.special_tokens:
        raise ValueError(f"this model's vocabulary has no {IMAGE}: it can't be given images")
    named, n_words = tokenizer.special_tokens[IMAGE], tokenizer.vocabulary.n_words
    begin = tokenizer.special_tokens.get("<|begin_of_text|>", named)  # the first of Llama 3's 256
    return named if named in (begin + 256, n_words - 1) else n_words
