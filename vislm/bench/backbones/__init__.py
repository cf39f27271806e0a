"""``vislm bench backbones``: our backbones beside timm's of equal size, in one process, taking turns."""
