"""Running golden fixtures: inputs and outputs of the authors' own code, compared with what this package computes.

A fixture is a safetensors file (``param.*``, ``in.*``, ``out.*``, metadata) or a JSON file with a ``meta`` object. Its
``method`` names the module in ``vislm.golden.checks`` that knows how to run it; adding a method's check is one file.
"""

from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, read_fixture
from vislm.golden.verify import Verdict, verify_folder

__all__ = ["Comparison", "Fixture", "Skipped", "Unhandled", "Verdict", "read_fixture", "verify_folder"]
