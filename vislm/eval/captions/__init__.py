"""Benchmarks of captions: hallucinated objects, n-gram metrics."""
