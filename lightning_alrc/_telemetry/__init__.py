"""What a training's loggers and its user are told: rows, charts, events; and logs read back.

``Telemetry`` takes the rows and hands them on. Nothing here clips.
May import ``functional``, ``alrc``, ``environment``, ``plotting``, ``_moments``, ``_trainer`` and
``_spikes``.
"""
