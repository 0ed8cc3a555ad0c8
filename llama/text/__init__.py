"""Text and token ids: vocabularies, chat formats, templates, tools."""
