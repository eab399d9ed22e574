"""Offline W&B runs, read back by wandb's own reader; the fixture ``wandb_logger`` makes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests import nets

WANDB = [sys.executable, "-m", "wandb"]


@dataclass(frozen=True)
class OfflineRun:
    """The content of an offline run's file."""

    folder: Path
    """The run's folder; media are in its ``files/media``."""

    records: list[dict[str, Any]]
    """All records, in the order written; NaN and infinities are strings."""

    config: dict[str, Any]
    summary: dict[str, Any]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The contents of the records of one kind: ``history``, ``metric``, ``alert``..."""
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows; the fields of media are ``<name>._type``, ``<name>.path`` and so on."""
        return [row["item"] for row in self.of("history")]

    def files_of(self, artifact_type: str) -> dict[str, Path]:
        """The files of the last logged artifact of a type, by their paths in the artifact."""
        (*_, last) = (each for each in self.of("artifact") if each["type"] == artifact_type)
        root = self.folder.parent.parent
        return {file["path"]: root / file["local_path"] for file in last["manifest"]["contents"]}

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The last definition of each metric, by name or pattern."""
        return {each.get("name") or each["glob_name"]: each for each in self.of("metric")}


@contextmanager
def loggers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes offline WandbLoggers of a namespace, all under ``folder``.

    ``monkeypatch`` isolates wandb from the user's settings for as long.
    """
    wandb = pytest.importorskip("wandb")
    import_at_once()
    wandb.teardown()  # wandb reads the environment once, when it sets itself up
    isolate(monkeypatch, folder / "wandb")

    def make(namespace: str = "pytorch_lightning", **arguments: Any) -> Any:
        settings = wandb.Settings(x_disable_stats=True, console="off")
        return nets.NAMESPACES[namespace].loggers.WandbLogger(
            **({"offline": True, "save_dir": folder, "settings": settings} | arguments)
        )

    yield make
    wandb.finish()  # a run that a failing test left would make later tests fail
    wandb.teardown()


@cache
def import_at_once() -> None:
    """Import what wandb imports at its first run, without the descriptions of pydantic's fields.

    Before Python 3.13, pydantic reads each description from a source file. For each class it
    searches all modules of the process, which takes most of the time. Nothing reads them.
    """
    with pytest.MonkeyPatch.context() as patch, suppress(ImportError):
        name = "pydantic._internal._fields.extract_docstrings_from_cls"
        patch.setattr(name, lambda *_, **__: {}, raising=False)
        import wandb.apis.public
        import wandb.sdk.launch  # noqa: F401


def finished(logger: Any) -> OfflineRun:
    """Finish the run of a WandbLogger, and read it."""
    import wandb

    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    return read(folder)


def read(folder: Path) -> OfflineRun:
    """An offline run from its folder. Skips the test if this wandb has no reader."""
    import wandb

    if Version(wandb.__version__) < Version("0.31"):
        pytest.skip("wandb reads its offline runs from 0.31 on")
    records = [json.loads(line) for line in _inspected(folder).split("\n") if line]
    whole = json.loads(_inspected(folder, "-summary"))
    return OfflineRun(folder, records, whole["config"], whole["summary"])


def _inspected(folder: Path, *arguments: str) -> str:
    """What ``wandb leet inspect`` prints. Runs wandb's binary, so no second Python has to start."""
    from wandb.util import get_core_path

    (file,) = folder.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "-no-observability", "-json", *arguments]
    command += ["-run-file", str(file), str(folder.parent)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make wandb write offline and only under ``folder``, whatever the user's settings are."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for kind in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        place = folder / kind.lower()
        place.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(f"WANDB_{kind}", str(place))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
