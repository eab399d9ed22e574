"""The record of spikes: which samples were clipped, and the batches they were in.

- ``recording`` connects the record to a Trainer. ``record`` keeps the worst clips.
- ``ids`` finds the ids of samples. ``judging`` decides whether a spike is a divergence.
- ``places`` chooses the folder. ``record_file`` writes the record there.
- ``snapshot`` copies a batch, ``batches`` saves it with the state of ``generators``, and
  ``replaying`` runs it again.
- ``ledger`` keeps every sample's ``history``, and ``ledger_file`` writes it.

Imports ``_moments``, ``_trainer`` and Lightning. Nothing here clips.
"""
