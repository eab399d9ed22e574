"""``replay``: the losses of a batch that spiked, computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["replay"]


def replay(path: str | Path, module: Any, **trainer_arguments: Any) -> dict[str, Tensor]:
    """Compute the losses of a batch again that ``ALRCCallback(save_batches=True)`` kept.

    >>> replay("checkpoints/alrc_batches/epoch=0-batch=812-rank=0.pt", net)  # doctest: +SKIP
    {'loss': tensor([ 0.3,  0.2,  0.4, 91.2])}

    The module's ``training_step`` runs once, in a Trainer, on a copy of the module: with the batch,
    its index, the epoch, the global step, and PyTorch's generators as they were. The weights are
    those that the module has: for the very same losses, those of a checkpoint of that step.
    Nothing is clipped, and no optimizer of yours steps but for those that a manually optimized
    step itself calls, on the copy.

    The file is read as ``torch.load(weights_only=True)`` reads one, so that it can run no code: of
    tensors, numbers, strings, and dicts, lists and tuples of them. Where a batch has objects of
    other classes, say which of them you trust:

    >>> with torch.serialization.safe_globals([Graph]):  # doctest: +SKIP
    ...     replay(path, net)

    Args:
        path: of the batch; :attr:`Spike.batch_file` names it.
        module: a LightningModule.
        trainer_arguments: for its Trainer, as ``precision="bf16-mixed"``. It logs, saves and
            prints nothing unless told, and has no other :class:`ALRCCallback`.

    Returns:
        By name, the losses before clipping, detached, of the shape and dtype they had; the one that
        ``training_step`` returns is named ``"loss"``. Where several had one name, they are
        flattened and joined.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        TypeError: if ``module`` is not a LightningModule, or ``trainer_arguments`` say how long it
            trains.
        ValueError: if the file is not one of those, or has objects of classes that are not allowed.
    """
    from lightning_alrc._spikes.replaying import replayed  # needs Lightning

    return replayed(path, module, trainer_arguments)
