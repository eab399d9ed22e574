"""``python -m examples.cifar10_supersampling``: LightningCLI's subcommands, and ``compare``."""

from __future__ import annotations

from ..comparison import command_line
from .command_line import CommandLine
from .compare import compare

PROGRAM = "python -m examples.cifar10_supersampling"


def main() -> None:
    """Run `compare` if that is the first argument, otherwise LightningCLI."""
    description = (
        "CIFAR-10 supersampling. Besides the subcommands below there is 'compare': the same "
        "training unprotected, with gradient clipping, with ALRC and with both, side by side; see "
        f"'compare --help'. The paper's whole grid is run by '{PROGRAM}.grid'."
    )
    command_line.main(PROGRAM, description, CommandLine, compare)


if __name__ == "__main__":
    main()
