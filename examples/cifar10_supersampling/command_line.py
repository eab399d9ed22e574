"""LightningCLI of this example, which starts every training, and its configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..comparison.command_line import SeededCLI
from .datamodule import CIFAR10Supersampling
from .module import Supersampling

CONFIGS = Path(__file__).parent / "configs"
EXPERIMENTS = ("squared", "quartic", "unstable", "outliers")
METHODS_FOLDER = CONFIGS / "methods"
METHODS = tuple(sorted(path.stem for path in METHODS_FOLDER.glob("*.yaml")))


class CommandLine(SeededCLI):
    """LightningCLI for the paper's network and data."""

    def __init__(self, **arguments: Any) -> None:
        use_full_float32()
        super().__init__(Supersampling, CIFAR10Supersampling, **arguments)

    def instantiate_classes(self) -> None:
        """Make the Trainer, the module and the data, and move the module to the Trainer's device.

        Lightning moves the module later, but makes the average of its weights on the device that
        the module is on before. Then each step would copy all weights from a GPU to the CPU.
        """
        super().instantiate_classes()
        self.model.to(self.trainer.strategy.root_device)


def use_full_float32() -> None:
    """Convolve in float32 on a GPU, where PyTorch's default is TF32.

    So a training alone is as exact as stacked ones. These are matrix products, which PyTorch
    computes in float32 by default.
    """
    torch.backends.cudnn.allow_tf32 = False


def experiment_config(experiment: str) -> Path:
    """The configuration of an experiment.

    Raises:
        ValueError: there is no such experiment.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"experiments must be some of {list(EXPERIMENTS)}, got {experiment!r}")
    return CONFIGS / f"{experiment}.yaml"


def method_configs(method: str) -> list[Path]:
    """The configurations of a method, to be appended to an experiment's in this order.

    Args:
        method: a name, like "alrc2", or several joined by "+", like "alrc2+norm". A name that ends
            in ".yaml" is the path of your own configuration.

    Raises:
        ValueError: there is no such method.
    """
    configs = []
    for name in method.split("+"):
        path = Path(name) if name.endswith(".yaml") else METHODS_FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(
                f"methods must be some of {list(METHODS)}, several joined by '+', or paths of "
                f"configurations ending in .yaml; got {method!r}"
            )
        configs.append(path)
    return configs


def from_anywhere(method: str) -> str:
    """The method with absolute paths, which are valid in any working directory."""
    return _with_paths(method, lambda path: str(path.resolve()))


def method_name(method: str) -> str:
    """The method's name; a configuration's path is replaced by the name of its file."""
    return _with_paths(method, lambda path: path.stem)


def _with_paths(method: str, replacement: Callable[[Path], str]) -> str:
    """The method, with each path of a configuration replaced by ``replacement(path)``."""
    return "+".join(
        replacement(Path(name)) if name.endswith(".yaml") else name for name in method.split("+")
    )


def arguments_of(options: dict[str, Any]) -> list[str]:
    """Options as arguments of a command line."""
    return [f"--{name}={'null' if value is None else value}" for name, value in options.items()]
