"""Programs: the `llama` command."""
