"""Finding the options of a pruning method that change a model's answers least at a given cost.

``vislm tune-pruning`` is its command line; :func:`tune` does one study.
"""
