"""The moments of one loss: their state, the sums that update them, and how losses are clipped.

``paths`` chooses the module that clips: ``cpu``, ``accelerator`` (with ``kernels``) or ``tensors``.
``bounds`` has the threshold, ``sums`` what is summed in a call, ``state`` the moments and counts,
``rules`` the settings, ``arguments`` the checks of what users pass. ``distributed`` has the
all-reduce. In a Trainer, ``_trainer.exchange`` starts the all-reduce.

Imports torch and :mod:`lightning_alrc.functional` only. Nothing here knows Lightning.
"""
