"""The connection to a Trainer: clips losses between ``training_step`` and the optimizer's step.

Imports ``_moments``, ``alrc`` and Lightning. The equations are in ``functional``, not here.

The path of one loss, from ``training_step`` to the logged row and the checkpoint:

1. ``ALRCCallback.setup`` installs ``interception.Interception``, which replaces
   ``strategy.training_step``.
2. In each step ``Interception`` passes the loss that the module's ``training_step`` returned to
   ``guard.LossGuard.clip_unnamed``.
3. ``LossGuard`` finds the loss's ``ALRC`` in ``named_losses.NamedLosses``.
4. ``ALRC.clip`` clips it: ``_moments.bounds`` has the threshold, ``_moments.paths`` chooses the
   module with the arithmetic. ``ALRC.on_clip`` gives clipped losses to ``_spikes.record``.
5. ``exchange.Exchange.send`` starts the all-reduce of the step's sums, if there are several ranks.
6. ``_moments.state.State.learn`` updates the moments, and the sums from which the next logged row
   is made.
7. If a loss was not finite or spiked, ``nonfinite.Skipping`` or ``nonfinite.Raising`` may refuse
   the optimizer's step.
8. When Lightning logs, ``ALRC.take_row`` makes the row, and ``_telemetry.telemetry`` logs it.
9. ``ALRCCallback.state_dict`` puts moments, counts and record into the Trainer's checkpoint.
"""
