"""LightningCLI of this example, which starts every training, and its configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..comparison.command_line import SeededCLI
from .datamodule import PartialScans
from .module import PartialSTEM

CONFIGS = Path(__file__).parent / "configs"


class CommandLine(SeededCLI):
    """LightningCLI for the generator, the discriminators and the scans."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(PartialSTEM, PartialScans, **arguments)
