"""``replay``: computes the losses of a saved batch again."""

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
    """Compute again the losses of a batch that ``ALRCCallback(save_batches=True)`` saved.

    >>> path = "lightning_logs/version_0/alrc_batches/epoch=0-batch=812-step=812-rank=0.pt"
    >>> replay(path, net)  # doctest: +SKIP
    {'loss': tensor([ 0.3,  0.2,  0.4, 91.2])}

    The module's ``training_step`` runs once, or twice with ``after_step=True``, in a Trainer, on a
    copy of the module. These are restored before ``training_step`` runs:

    - the batch, its index, the epoch and the global step,
    - the global generators of PyTorch, the device, NumPy and Python,
    - which submodules are in ``eval()``,
    - the learning rates,
    - the Trainer's ``precision``, ``gradient_clip_val`` and ``gradient_clip_algorithm``.

    The weights are the module's current weights. With the weights of a checkpoint from before the
    step, the losses are exactly those of the training. The returned losses are not clipped. An
    optimizer steps only with ``after_step=True``, or if a ``training_step`` with manual
    optimization calls the optimizer. Such a step changes only the copy. A warning says what cannot
    be replayed: a loss that is computed after an optimizer has stepped, the generator of another
    type of device, or the learning rates if the optimizers have other groups of parameters.

    The batch is the one that ``training_step`` got. The module's ``on_train_batch_start`` runs, but
    does not change the batch again. Callbacks that you give to ``replay`` may change it.

    The file cannot run code: it is read by ``torch.load(weights_only=True)``. A batch is saved as
    tensors and plain data. Other objects are rebuilt only if you declare their classes safe, as for
    checkpoints. Batches of PyTorch Geometric need no declaration:

    >>> with torch.serialization.safe_globals([MyBatch]):  # doctest: +SKIP
    ...     replay(path, net)

    Args:
        path: path of the batch's file. :attr:`Spike.batch_file` is the name of the file.
        module: a LightningModule.
        datamodule: a LightningDataModule that the module uses as ``self.trainer.datamodule``. Its
            ``prepare_data`` and ``setup`` run. Its loaders and transfer hooks do not run: the batch
            was saved after they had run. ``None``, the default, if the module uses none.
        after_step: take one optimizer step on the batch, and return the losses after the step, with
            the same random numbers. The optimizers are new, with the saved learning rates. In the
            step the losses are clipped at the saved threshold. If the losses fall, the data are
            unusual. If they rise, the step was too large. ``False``, the default, takes no step.
        trainer_arguments: arguments of the Trainer, such as ``precision="bf16-mixed"``. They
            replace the saved ones. If you give ``plugins``, the saved ``precision`` is not used. By
            default, the Trainer logs and saves nothing, and shows neither progress nor summary. It
            never has an :class:`ALRCCallback`.

    Returns:
        By name, the losses before clipping, detached, in their shape and dtype. The loss that
        ``training_step`` returns is named ``"loss"``. Several losses of one name are flattened and
        concatenated.

    Raises:
        OSError: if there is no such file, or the file cannot be read.
        RuntimeError: if no loss was computed, for example because ``training_step`` returned
            ``None``. The error says why.
        TypeError: if ``path`` is not a path, ``module`` is not a LightningModule, ``datamodule`` is
            not a LightningDataModule, or ``trainer_arguments`` has one that no replay allows, such
            as ``max_epochs``.
        ValueError: if the file is not a saved batch, or has objects of classes that are not
            declared safe.
    """
    from lightning_alrc._spikes.replaying import replayed  # needs Lightning

    return replayed(path, module, datamodule, after_step, trainer_arguments)
