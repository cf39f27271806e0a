"""Acting inside the language model: dropping tokens, editing attention rows, scaling heads."""
