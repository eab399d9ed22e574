"""``replay``: the losses of a batch that spiked, computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["replay"]


def replay(
    path: str | Path,
    module: Any,
    *,
    datamodule: Any = None,
    after_step: bool = False,
    **trainer_arguments: Any,
) -> dict[str, Tensor]:
    """Compute the losses of a batch again that ``ALRCCallback(save_batches=True)`` kept.

    >>> path = "lightning_logs/version_0/alrc_batches/epoch=0-batch=812-step=812-rank=0.pt"
    >>> replay(path, net)  # doctest: +SKIP
    {'loss': tensor([ 0.3,  0.2,  0.4, 91.2])}

    The module's ``training_step`` runs once, in a Trainer, on a copy of the module. These are as
    they were then:

    - the batch, its index, the epoch and the global step,
    - the global generators of PyTorch, of the device, of NumPy and of Python,
    - which parts of the module are in ``eval()``,
    - the learning rates.

    The weights are those that the module has. With those of a checkpoint from before that step the
    losses are the very same. Nothing is clipped. No optimizer steps, except for ``after_step``, and
    those that a manually optimized step itself calls, on the copy. A warning tells of what cannot
    be replayed: a loss that a step computes after one of its optimizers has stepped, or the
    generator of a device on another kind of device.

    The file can run no code. It is read by ``torch.load(weights_only=True)``. A batch is kept as
    tensors and plain data. Objects in it are rebuilt only if you trust their classes, which you say
    as you do for checkpoints; batches of PyTorch Geometric need no such line:

    >>> with torch.serialization.safe_globals([MyBatch]):  # doctest: +SKIP
    ...     replay(path, net)

    Args:
        path: of the batch; :attr:`Spike.batch_file` names it.
        module: a LightningModule.
        datamodule: a LightningDataModule that the module needs, as ``self.trainer.datamodule``. Its
            ``prepare_data`` and ``setup`` are run. Its loaders and its transfer hooks are not: the
            batch was kept after them. ``None``, the default, for none.
        after_step: return the losses that the batch has after a step on it, with the same random
            numbers. The copy's optimizers start anew, at the learning rates of then, and the losses
            are clipped as they were then. Losses that fall tell of odd data; losses that rise, of a
            step that is too long. ``False``, the default, takes no step.
        trainer_arguments: for its Trainer, as ``precision="bf16-mixed"``. It logs, saves and
            prints nothing unless told, and has no other :class:`ALRCCallback`.

    Returns:
        By name, the losses before clipping, detached, of the shape and dtype they had; the one that
        ``training_step`` returns is named ``"loss"``. Where several had one name, they are
        flattened and joined.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        RuntimeError: if no loss was computed; says why, as where ``training_step`` returned
            ``None``.
        TypeError: if ``module`` is not a LightningModule, ``datamodule`` not a LightningDataModule,
            or ``trainer_arguments`` say how long it trains.
        ValueError: if the file is not one of those, or has objects of classes that are not allowed.
    """
    from lightning_alrc._spikes.replaying import replayed  # needs Lightning

    return replayed(path, module, datamodule, after_step, trainer_arguments)
