"""Print the torch and torchvision releases to install together on this machine.

A torchvision that was built for another torch fails to import, so both are pinned as a pair that was tested. torch has
no CUDA wheels for 64-bit Arm in the newest pair's resolution here, so Arm gets an older CPU pair.
"""

import platform

PAIRS = {"x86_64": ("2.14.1", "0.29.1"), "AMD64": ("2.14.1", "0.29.1")}
DEFAULT = ("2.9.1", "0.24.1")

torch, torchvision = PAIRS.get(platform.machine(), DEFAULT)
print(f"torch=={torch} torchvision=={torchvision}")
