"""``vislm bench gpu-audit``: compile every Triton kernel for cards that are not there, hold it against their limits."""
