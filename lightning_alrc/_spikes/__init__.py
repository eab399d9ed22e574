"""The record of spikes: which samples were clipped, and in which batches.

- ``recording`` connects the record to a Trainer. ``record`` keeps the worst clips.
- ``ids`` finds the ids of samples. ``judging`` decides whether a spike is a divergence.
- ``places`` chooses the folder. ``record_file`` writes the record there.
- ``snapshot`` copies a batch. ``batches`` saves the copy with the states of ``generators``.
  ``replaying`` repeats the training step of the batch.
- ``ledger`` keeps every sample's ``history``. ``ledger_file`` writes the ledger.
- ``atomic_files`` writes files that are never half-written.

May import ``functional``, ``_moments``, ``_trainer`` and Lightning. Nothing here clips the losses
of a training. ``replaying`` clips the losses of a replay.
"""
