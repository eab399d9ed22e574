"""Several ranks: the all-reduce of sums, objects of all ranks, and losses that are a ``DTensor``.

In a Trainer, :class:`~lightning_alrc._trainer.exchange.Exchange` starts the all-reduce, once a step
for all losses. Outside of a Trainer, ``ALRC.clip_and_learn`` starts it, once a call.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "PendingSums",
    "as_dtensor_like",
    "full",
    "gathered",
    "is_active",
    "is_dtensor",
    "wait_for_gloo",
]

T = TypeVar("T")

IS_AVAILABLE = dist.is_available()  # False if PyTorch was built without torch.distributed


def is_active() -> bool:
    """Whether there are other ranks to share moments with.

    ``False`` inside a compiled function: an asynchronous collective would break its graph.
    """
    return (
        IS_AVAILABLE
        and dist.is_initialized()
        and not torch.compiler.is_compiling()
        and dist.get_world_size() > 1
    )


def gathered(own: T) -> list[T]:
    """What each rank gave, in the order of the ranks. Every rank must call this function."""
    of_ranks = [own] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    return of_ranks


def is_dtensor(loss: Tensor) -> bool:
    """Whether a loss is a ``DTensor``, as under tensor parallelism.

    The check is by attribute: PyTorch built without ``torch.distributed`` has no such class.
    """
    return type(loss) is not Tensor and hasattr(loss, "full_tensor")


def full(loss: Any) -> Tensor:
    """The full tensor of a ``DTensor``. Any other loss is returned as it is."""
    tensor: Tensor = loss.full_tensor() if is_dtensor(loss) else loss
    return tensor


def as_dtensor_like(given: Any, loss: Tensor) -> Tensor:
    """Make ``loss`` a replicated ``DTensor`` on the device mesh of ``given``.

    ``loss`` must be equal on all ranks of this mesh.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = given.device_mesh
    return DTensor.from_local(loss, mesh, [Replicate()] * mesh.ndim, run_check=False)


def wait_for_gloo() -> None:
    """Give gloo's threads time to release the tensors of finished collectives.

    Releasing a tensor needs the interpreter. A thread that releases a tensor after the interpreter
    has ended aborts the process: "terminate called without an active exception".
    """
    time.sleep(0.01)


class PendingSums:
    """An all-reduce that may not have finished yet. Reading the sums waits for the all-reduce.

    Creating the object starts the all-reduce. Every rank must create one.

    Args:
        rows: this rank's sums, [rows, 11]. The all-reduce replaces them by the sums over all ranks.
            The shape must be the same on every rank.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._work: dist.Work | None = dist.all_reduce(rows, async_op=True)
        self._deadline: float | None = None

    def __getitem__(self, index: int) -> Tensor:
        """One row, summed over the ranks.

        Waits for the all-reduce. With an accelerator the device waits, otherwise the host.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._rows[index]

    def finishes(self, within: float) -> bool:
        """Whether the all-reduce has finished, or finishes in time.

        Args:
            within: seconds to wait at most, counted from the first call of this method.

        Returns:
            ``False`` also if another rank is lost: no error is raised then.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + within
        try:
            while self._work is not None and not self._work.is_completed():
                if time.monotonic() > self._deadline:
                    return False
                time.sleep(0.001)
            self[0]
        except RuntimeError:
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        self[0]  # a pending all-reduce can be neither copied nor pickled
        return dict(vars(self))
