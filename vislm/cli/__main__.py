"""``python -m vislm.cli``."""

from vislm.cli import main

main()
