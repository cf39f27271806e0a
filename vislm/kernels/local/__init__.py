"""Attention on a grid, tile by tile: a box of queries, the box of keys that it can see, one batched product.

``axis`` cuts one axis into tiles, ``plan`` combines the axes and chooses the tile sizes, ``tiles`` computes the logits
of a few tiles, ``function`` is the forward and backward pass, ``measure`` the statistics.
"""
