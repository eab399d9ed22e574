"""Scripts in processes of their own: a test waits for none without end and leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # a run takes 15 to 40 seconds, on a machine with ten times the work 400


def started(script: Any, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A script of this folder, with its output captured, at the head of a group of its own."""
    return subprocess.Popen(
        [sys.executable, script.__file__, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and output; a failure if it hangs."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{process.args} hangs: {output[-5000:]}")
    return process.returncode, output


def launch(script: Any, *arguments: object, **environment: str) -> str:
    """The output of a script that ends well."""
    status, output = finished(started(script, *arguments, **environment))
    assert status == 0, output
    return output


def reports(folder: Path, scenario: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank wrote."""
    paths = [folder / f"{scenario}-{rank}.json" for rank in range(ranks)]
    return [json.loads(path.read_text()) for path in paths]
