"""Benchmarks: ours and the alternative in one process, medians and ratios."""
