"""Adaptive learning rate clipping with modules of other packages, none of them edited."""
