"""Warnings of modules that are used without a Trainer, too."""

from __future__ import annotations

__all__ = ["rank_zero_warn"]


def rank_zero_warn(message: str) -> None:
    """Warn as Lightning does, on the first rank only.

    Lightning is imported at the first warning, because the import is slow. So logs are read back
    without it.
    """
    from lightning_alrc._trainer import namespaces

    namespaces.rank_zero_warn(message, stacklevel=5)  # the caller's line, not this one
