"""Vocabularies: Meta's, Hugging Face's, SentencePiece's and GGUF's tokenizer files."""
