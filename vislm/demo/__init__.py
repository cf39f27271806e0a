"""The whole job in one command: ask, prune, reweight, measure, draw."""

from vislm.demo.run import run_demo

__all__ = ["run_demo"]
