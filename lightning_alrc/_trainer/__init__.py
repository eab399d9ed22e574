"""What stands between a Trainer's losses and its optimizers.

Imports ``_moments`` and Lightning. Nothing here knows the mathematics.

One loss, from ``training_step`` to a row and a checkpoint:

1. ``ALRCCallback.setup`` has ``guard.LossGuard`` shadow ``strategy.training_step``.
2. In a step, ``interception.Interception`` takes what the module's ``training_step`` returned.
3. ``LossGuard.clip_unnamed`` finds the loss's ``ALRC`` in ``named_losses.NamedLosses``.
4. ``ALRC.clip`` clips it: ``_moments.bounds`` has the threshold, ``_moments.cpu`` or
   ``_moments.tensors`` the arithmetic. A watcher tells ``_spikes.record`` of clipped losses.
5. ``exchange.Exchange.send`` sums what was learned over the ranks. A single rank learns at once.
6. ``_moments.state.State.learn`` moves the moments and adds to the row.
7. ``nonfinite.Skipping`` or ``Raising`` may refuse the optimizer's step.
8. Where Lightning logs, ``_telemetry.telemetry`` takes the row and logs it.
9. ``ALRCCallback.state_dict`` puts moments, counts and record into the Trainer's checkpoint.
"""
