"""Worked examples of lightning-alrc, each run with ``python -m examples.<name>``."""
