"""``python -m vislm``."""

from vislm.cli import main

main()
