"""From prompts to tokens: sampling, speculative decoding, prefix caching, scoring."""
