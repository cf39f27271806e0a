"""Print the torch and torchvision releases to install together on this machine.

A torchvision that was built for another torch fails to import, so both are pinned as a pair that is known to work: the
newest one on x86-64, an older CPU build elsewhere.
"""

import platform

PAIRS = {"x86_64": ("2.14.1", "0.29.1"), "AMD64": ("2.14.1", "0.29.1")}
DEFAULT = ("2.9.1", "0.24.1")

torch, torchvision = PAIRS.get(platform.machine(), DEFAULT)
print(f"torch=={torch} torchvision=={torchvision}")
