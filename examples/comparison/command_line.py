"""The command line of an example with a LightningModule of its own: LightningCLI, and compare."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI


class SeededCLI(LightningCLI):
    """LightningCLI of a module and its data, with one seed for both, on one device by default.

    On several devices a batch of one would be a batch of several, and parameters that a loss does
    not use would be an error.

    Args:
        module: the class of the module.
        data: the class of its data, which takes a ``seed``.
        trainer_defaults: defaults of the Trainer's arguments.
        **arguments: further arguments of LightningCLI.
    """

    def __init__(
        self,
        module: type[LightningModule],
        data: type[LightningDataModule],
        trainer_defaults: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(
            module,
            data,
            trainer_defaults={"devices": 1} | (trainer_defaults or {}),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            **arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Use the seed of the weights for the data, too."""
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)


def main(
    program: str, description: str, cli: Callable[..., object], compare: Callable[..., None]
) -> None:
    """Run `compare` if that is the first argument, otherwise LightningCLI.

    Args:
        program: the command that starts the example.
        description: description in LightningCLI's help.
        cli: makes a LightningCLI and runs it.
        compare: function whose arguments become the command line.
    """
    if sys.argv[1:2] == ["compare"]:
        auto_cli(compare, args=sys.argv[2:], as_positional=False, prog=f"{program} compare")
        return
    cli(parser_kwargs={"prog": program, "description": description})
