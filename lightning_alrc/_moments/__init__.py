"""The moments of one loss: their state, the sums that update them, and how losses are clipped.

- ``paths`` chooses the module that clips: ``cpu``, ``accelerator`` (with ``kernels``) or
  ``tensors``.
- ``state``: the moments and counts.
- ``rules``: the settings.
- ``bounds``: the threshold and the other bounds of a call.
- ``sums``: the sums over the losses of a call.
- ``call``: the arguments that every path takes.
- ``arguments``: the checks of what users pass.
- ``distributed``: losses that are a ``DTensor``, objects of all ranks, and the all-reduce. In a
  Trainer, ``_trainer.exchange`` starts the all-reduce.

Imports torch and :mod:`lightning_alrc.functional` only. Nothing here knows Lightning.
"""
