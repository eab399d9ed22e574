"""Runs scripts in their own processes, with a timeout, and leaves no process behind."""

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
TIMEOUT = 600  # a run takes 15 to 40 seconds, and 400 on a busy machine


def started(script: Any, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a script of this folder in its own process group, with its output captured."""
    return subprocess.Popen(
        [sys.executable, script.__file__, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and output of a process. Fails the test if it hangs."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{process.args} hangs: {output[-5000:]}")
    return process.returncode, output


def launch(script: Any, *arguments: object, **environment: str) -> str:
    """The output of a script that must succeed."""
    status, output = finished(started(script, *arguments, **environment))
    assert status == 0, output
    return output


def reports(folder: Path, scenario: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank wrote."""
    paths = [folder / f"{scenario}-{rank}.json" for rank in range(ranks)]
    return [json.loads(path.read_text()) for path in paths]
