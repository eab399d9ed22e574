"""All uses of Lightning's private names, in one place.

Each name exists in pytorch-lightning 2.4.0 to 2.6.6.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = [
    "accumulates",
    "batch_has_ended",
    "callbacks_being_checked",
    "is_compiled",
    "is_empty",
    "is_running",
    "is_searching",
    "logs_now",
    "metrics_of_callbacks",
    "skips_backward",
    "steps",
    "takes_batches_itself",
    "trainer_is_calling",
]


def steps(trainer: Any) -> int:
    """Number of optimizer steps so far, as Lightning's logging counts them."""
    count: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return count


def logs_now(trainer: Any) -> bool:
    """Whether Lightning logs at the current step."""
    return bool(trainer._logger_connector.should_update_logs)


def metrics_of_callbacks(trainer: Any) -> dict[str, Any]:
    """The dict behind ``trainer.callback_metrics``.

    The property itself computes metrics of the module. This may fail, or come too early: Lightning
    keeps the value, and a later update of the metric is lost.
    """
    metrics: dict[str, Any] = trainer._logger_connector._callback_metrics
    return metrics


def accumulates(trainer: Any) -> bool:
    """Whether gradients are accumulated, and the optimizer does not step on the current batch."""
    return bool(trainer.fit_loop._should_accumulate())


def plateau_scheduler_reads(trainer: Any, prefix: str) -> bool:
    """Whether a ReduceLROnPlateau reads a metric with this prefix after the current batch."""
    number = trainer.fit_loop.epoch_loop.batch_idx + 1
    return any(
        config.reduce_on_plateau
        and config.interval == "step"
        and number % config.frequency == 0
        and str(config.monitor).startswith(prefix)
        for config in trainer.lr_scheduler_configs
    ) and not accumulates(trainer)


def batch_has_ended(trainer: Any) -> bool:
    """Whether a run that is resumed from here continues with the next batch.

    That run repeats the batch unless both ``training_step`` and the optimizer's step have run.
    """
    total = trainer.fit_loop.epoch_loop.batch_progress.total
    return bool(total.processed == total.ready)


def takes_batches_itself(trainer: Any) -> bool:
    """Whether ``training_step`` is given an iterator instead of a batch."""
    return type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher"


def skips_backward(trainer: Any) -> bool:
    """Whether the current epoch has no backward pass.

    StochasticWeightAveraging adds such an epoch to update BatchNorm's statistics.
    """
    return bool(trainer.fit_loop._skip_backward)


def is_compiled(module: Any) -> bool:
    """Whether the Trainer was given a module compiled by ``torch.compile``."""
    return getattr(module, "_compiler_ctx", None) is not None


def is_empty(closure: Any) -> bool:
    """Whether a closure is Lightning's placeholder for no closure."""
    return getattr(closure, "__name__", "") == "do_nothing_closure"


def is_running(trainer: Any) -> bool:
    """Whether a Trainer is fitting, validating, testing or predicting."""
    return bool(trainer.state.status == "running")


def is_searching(trainer: Any) -> bool:
    """Whether a search for a learning rate or a batch size is restoring its own checkpoint."""
    name = Path(trainer.ckpt_path or "").name
    return name.startswith((".lr_find_", ".scale_batch_size_"))


def callbacks_being_checked() -> list[Any] | None:
    """The callbacks whose ``state_key`` a new Trainer reads, to check that no two keys are equal.

    Only a callback's ``state_key`` may call this function. ``None`` if something other than this
    check reads the key.
    """
    frame = sys._getframe(2)
    is_check = frame.f_code.co_name == "_validate_callbacks_list"
    return list(frame.f_locals.get("callbacks", [])) if is_check else None


def trainer_is_calling() -> bool:
    """Whether a Trainer's training loop is among the callers of this function."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").endswith(".loops.training_epoch_loop"):
            return True
        frame = frame.f_back
    return False
