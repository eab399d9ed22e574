"""``python -m examples.cifar10_supersampling``: LightningCLI's subcommands, and ``compare``."""

from __future__ import annotations

import sys

from jsonargparse import auto_cli
from pytorch_lightning.cli import LightningCLI

from .compare import compare
from .datamodule import CIFAR10Supersampling
from .module import Supersampling

PROGRAM = "python -m examples.cifar10_supersampling"


def main() -> None:
    """Run `compare` if that is the first argument, or else LightningCLI."""
    if sys.argv[1:2] == ["compare"]:
        auto_cli(compare, args=sys.argv[2:], as_positional=False, prog=f"{PROGRAM} compare")
        return
    LightningCLI(
        Supersampling,
        CIFAR10Supersampling,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": PROGRAM,
            "description": "CIFAR-10 supersampling. Besides the subcommands below there is "
            "'compare': the same training unprotected, with gradient clipping, with ALRC and with "
            "both, side by side; see 'compare --help'.",
        },
    )


if __name__ == "__main__":
    main()
