"""Benchmarks of questions for LMMs, and how their answers are read."""
