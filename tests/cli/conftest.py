"""Every command starts without the traceback switch that an earlier one may have set."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_debug() -> Iterator[None]:
    os.environ.pop("VISLM_DEBUG", None)
    yield
    os.environ.pop("VISLM_DEBUG", None)
