"""``python -m examples.partial_stem``: LightningCLI's subcommands, and ``compare``."""

from __future__ import annotations

from ..comparison import command_line
from .command_line import CommandLine
from .compare import compare

PROGRAM = "python -m examples.partial_stem"


def main() -> None:
    """Run `compare` if that is the first argument, otherwise LightningCLI."""
    description = (
        "Completion of partial scans of electron micrographs. Besides the subcommands below there "
        "is 'compare': the same training unprotected, with gradient clipping, with ALRC of each "
        "of its four losses and with both, side by side; see 'compare --help'."
    )
    command_line.main(PROGRAM, description, CommandLine, compare)


if __name__ == "__main__":
    main()
