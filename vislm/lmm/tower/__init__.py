"""Pruning and merging inside the vision tower, and what is recorded of it."""
