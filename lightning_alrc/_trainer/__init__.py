"""What stands between a Trainer's losses and its optimizers.

Imports ``_moments`` and Lightning. Nothing here knows the mathematics.
"""
