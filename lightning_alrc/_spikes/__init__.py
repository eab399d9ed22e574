"""The record of spikes: which samples were clipped, and the batches they were in.

``recording`` ties it to a Trainer, ``record`` finds the worst clips, ``ids`` their samples, and
``record_file`` writes them into the folder that ``places`` chooses. ``batches`` keeps batches, each
by a ``snapshot``, and ``replaying`` runs one again.

Imports ``_moments``, ``_trainer`` and Lightning. Nothing here clips.
"""
