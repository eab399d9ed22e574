"""Adaptive learning rate clipping with unchanged modules of other packages."""
