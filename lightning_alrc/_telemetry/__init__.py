"""What loggers are told: rows, charts, warnings and alerts, and what they wrote, read back.

Imports ``_moments``, ``_spikes`` and Lightning. Nothing here clips.
"""
