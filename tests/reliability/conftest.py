"""The trials are modules of this folder; scripts/reliability.py runs the same ones."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
