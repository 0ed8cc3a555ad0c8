"""Vocabularies: Meta's, Hugging Face's, SentencePiece's and GGUF's tokenizer files."""

from llama.text.vocabulary.base import Vocabulary
from llama.text.vocabulary.reading import read

__all__ = ["Vocabulary", "read"]
