"""The time of an import in a new process, after torch and Lightning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import lightning_alrc
from tests.benchmarks.timing import Times, in_order

PROCESSES = 4
ROOT = Path(__file__).parents[2]
FLOOR = "floor: as many empty modules"
MODULES = {
    FLOOR: "empty_modules",
    "ALRC": "lightning_alrc",
    "peer: ZClip": "zclip",
    "peer: AutoClip": "autoclip.torch",
    "peer: timm's utils": "timm.utils",
}
CODE = """
import json, sys, time
import torch, pytorch_lightning
times = {}
for way, module in json.loads(sys.argv[1]):
    start = time.thread_time()
    __import__(module)
    times[way] = time.thread_time() - start
print(json.dumps(times))
"""


def write_empty_modules(folder: Path) -> None:
    """A package with an empty module for each public module of lightning_alrc."""
    package = folder / MODULES[FLOOR]
    package.mkdir()
    names = [path.stem for path in Path(lightning_alrc.__file__).parent.glob("[!_]*.py")]
    for name in names:
        (package / f"{name}.py").touch()
    imports = "".join(f"import {MODULES[FLOOR]}.{name}\n" for name in names)
    (package / "__init__.py").write_text(imports)


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> Times:
    folder = tmp_path_factory.mktemp("floor")
    write_empty_modules(folder)
    ways = [way for way, module in MODULES.items() if way == FLOOR or find_spec(module)]
    times: Times = {way: [] for way in ways}
    for index in range(PROCESSES + 1):
        modules = [(way, MODULES[way]) for way in in_order(ways, index)]
        process = subprocess.run(
            [sys.executable, "-c", CODE, json.dumps(modules)],
            env=os.environ
            | {
                "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
                "PYTHONDONTWRITEBYTECODE": "",  # an installed package has bytecode, too
                "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        if index:  # the first process writes the bytecode
            for way, seconds in json.loads(process.stdout).items():
                times[way].append(seconds)
    return times


@pytest.mark.parametrize("way", MODULES)
def test_an_import(booked: Callable[..., None], times: Times, way: str) -> None:
    booked("an import", way, times)
