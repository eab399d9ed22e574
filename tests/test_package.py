"""What a user installs."""

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

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from this checkout."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="session")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    version = lightning_alrc.__version__
    assert tops == {"lightning_alrc", f"lightning_alrc-{version}.dist-info"}
    expected = {f"lightning_alrc/{path.name}" for path in (ROOT / "lightning_alrc").glob("*.py")}
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


def modules_imported_at_once(path: Path) -> set[str]:
    """Top-level packages that a file imports when it is itself imported."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "lightning_alrc").glob("*.py")), ids=lambda path: path.stem
)
def test_importing_needs_no_optional_library(path: Path) -> None:
    of_lightning = {"pytorch_lightning", "lightning_utilities"}
    allowed = {"torch", *of_lightning, "lightning_alrc", *sys.stdlib_module_names}
    if path.stem == "plotting":  # imported only when it is asked for
        allowed |= {"matplotlib", "numpy"}
    assert modules_imported_at_once(path) <= allowed
