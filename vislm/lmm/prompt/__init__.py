"""Pruning between tower and language model: the visual tokens in the prompt, their layout and positions."""
