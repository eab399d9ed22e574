"""The moments of one loss: their state, the sums that move them, and how losses are clipped.

Imports torch and :mod:`lightning_alrc.functional` only. Nothing here knows of Lightning.
"""
