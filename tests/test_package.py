"""The package that a user installs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import lightning_alrc
from lightning_alrc.environment import VARIABLE

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lightning_alrc").rglob("*.py"))
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_utilities"}


@pytest.fixture(scope="session")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    version = lightning_alrc.__version__
    assert tops == {"lightning_alrc", f"lightning_alrc-{version}.dist-info"}
    expected = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    found = {name for name in wheel.namelist() if name.startswith("lightning_alrc/")}
    assert found == expected | {"lightning_alrc/py.typed"}


def test_the_wheel_needs_torch_and_pytorch_lightning_alone(metadata: Message) -> None:
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert {re.split(r"[^\w.-]", each)[0] for each in needed} == {"torch", "pytorch-lightning"}


def test_the_wheel_says_what_it_is(metadata: Message) -> None:
    assert metadata["Name"] == "lightning-alrc"
    assert metadata["Version"] == lightning_alrc.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) >= {
        "wandb",
        "plot",
        "examples",
        "test",
        "dev",
    }


def test_the_public_names() -> None:
    assert {"ALRC", "ALRCCallback", "ALRCMixin", "functional", "replay"} <= set(
        lightning_alrc.__all__
    )
    for name in lightning_alrc.__all__:
        assert getattr(lightning_alrc, name) is not None


def imported_at_once(path: Path) -> set[str]:
    """Modules that a file imports when it is itself imported."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lightning_alrc":
            found |= {f"lightning_alrc.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            found.add(node.module or "")
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "lightning_alrc").as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_importing_needs_no_optional_library(path: Path) -> None:
    allowed = {"torch", *LIGHTNING, "lightning_alrc", *sys.stdlib_module_names}
    if path.stem in (
        "plotting",
        "preview",
        "reading",
        "reading_csv",
        "reading_runs",
    ):  # imported only on demand
        allowed |= {"matplotlib", "numpy"}
    if path.stem == "interactive":
        allowed |= {"numpy", "plotly"}
    if path.stem == "kernels":
        allowed |= {"triton"}
    assert {module.partition(".")[0] for module in imported_at_once(path)} <= allowed


MAY_IMPORT = {
    "_moments": {"functional", "_moments"},
    "_trainer": {"functional", "alrc", "_moments", "_trainer"},
    "_spikes": {"functional", "_moments", "_trainer", "_spikes"},
    "_telemetry": {
        "functional",
        "alrc",
        "environment",
        "plotting",
        "_moments",
        "_trainer",
        "_spikes",
        "_telemetry",
    },
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_part_of_the_package_imports_only_what_it_may(path: Path) -> None:
    part = path.relative_to(ROOT / "lightning_alrc").parts[0]
    imported = {
        module.split(".")[1]
        for module in imported_at_once(path)
        if module.startswith("lightning_alrc.")
    }
    assert imported <= MAY_IMPORT.get(part, imported)


def test_what_needs_no_trainer_imports_no_lightning() -> None:
    """The layer, the variable, the preview of a log, and the commands for W&B."""
    script = (
        "import lightning_alrc.alrc, lightning_alrc.replay, sys; "
        "from lightning_alrc import environment, preview, wandb; "
        "assert environment.callbacks() == []; "
        "loaded = {name.partition('.')[0] for name in sys.modules}; "
        f"assert not loaded & {LIGHTNING}, loaded; "
        "assert 'lightning_alrc.callback' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={VARIABLE: "0"}, check=True)
