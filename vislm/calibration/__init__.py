"""Finding out beforehand what head methods need to know of a model: ``vislm calibrate-heads``.

Sink dimensions for VAR, head lists for AD-HH and ACT, head factors for ZeroTuning; each is a file that names its model.
"""
