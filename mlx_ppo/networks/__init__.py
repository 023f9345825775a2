"""Models: folders, tokenizers, one shared trunk with adapters, heads, and the four roles on it."""
