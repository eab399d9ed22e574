"""``python -m examples.cifar10_supersampling``: LightningCLI's subcommands, and ``compare``."""

from __future__ import annotations

import sys

from jsonargparse import auto_cli

from .command_line import CommandLine
from .compare import compare

PROGRAM = "python -m examples.cifar10_supersampling"


def main() -> None:
    """Run `compare` if that is the first argument, or else LightningCLI."""
    if sys.argv[1:2] == ["compare"]:
        auto_cli(compare, args=sys.argv[2:], as_positional=False, prog=f"{PROGRAM} compare")
        return
    CommandLine(
        parser_kwargs={
            "prog": PROGRAM,
            "description": "CIFAR-10 supersampling. Besides the subcommands below there is "
            "'compare': the same training unprotected, with gradient clipping, with ALRC and with "
            "both, side by side; see 'compare --help'. The paper's whole grid is run by "
            f"'{PROGRAM}.grid'.",
        },
    )


if __name__ == "__main__":
    main()
