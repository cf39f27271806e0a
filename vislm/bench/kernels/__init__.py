"""``vislm bench kernels``: local attention of ours beside its peers, in one process, taking turns."""
