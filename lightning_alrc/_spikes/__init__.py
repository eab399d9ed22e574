"""The record of spikes: which samples were clipped, and the batches they were in.

Imports ``_moments`` and Lightning. Nothing here clips.
"""
