"""Rows, charts and events for the loggers and the user of a training. Logs are read back here too.

``ALRC.take_row`` makes a row. ``Telemetry`` calls it and distributes the rows. Nothing here clips.
Modules here may import ``functional``, ``alrc``, ``environment``, ``plotting``, ``_moments``,
``_trainer`` and ``_spikes``.
"""
