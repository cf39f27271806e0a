"""Damage as it happens to files, and as people do it on purpose."""

from __future__ import annotations

import random

_EXTREMES = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\xff\xfe\xff\xff")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the data with one to eight changes of one kind: bytes, bits, gaps, insertions, extreme numbers, a cut."""
    if not data:
        return rng.randbytes(4)
    damaged, kind = bytearray(data), rng.randrange(6)
    if kind == 5:
        return bytes(damaged[: rng.randrange(len(damaged))])
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(max(1, len(damaged)))
        if kind == 0:
            damaged[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            damaged[place : place + 1] = bytes([(damaged[place] if damaged else 0) ^ 1 << rng.randrange(8)])
        elif kind == 2:
            del damaged[place : place + rng.randint(1, 16)]
        elif kind == 3:
            damaged[place:place] = rng.randbytes(rng.randint(1, 16))
        else:
            place = min(place, rng.choice((60, len(damaged))))  # headers are where numbers do most harm
            damaged[place : place + 4] = rng.choice(_EXTREMES)
    return bytes(damaged)
