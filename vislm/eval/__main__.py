"""``python -m vislm.eval ...`` is ``vislm eval ...``: the form that ``accelerate launch -m`` takes."""

from __future__ import annotations

import sys
from importlib import import_module

sys.argv.insert(1, "eval")
import_module("vislm.cli").main()  # by name: the command line stands above this layer
