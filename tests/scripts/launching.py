"""Runs scripts in their own processes, with a timeout, and leaves no process behind.

A forked process starts at once, because the server that forks it has imported Lightning.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # a run takes 15 to 40 seconds, and 400 on a busy machine

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["pytorch_lightning"])


def forked(main: Callable[..., None], *arguments: Any) -> Any:
    """Start a function of a script of this folder in its own process."""
    process = FORKING.Process(target=_run, args=(main, *arguments))
    process.start()
    return process


def _run(main: Callable[..., None], *arguments: Any) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main(*arguments)


def execute(program: str) -> None:
    """Run a program that must succeed. Its process has imported Lightning, but not this package."""
    join(forked(exec, program, {}))


def join(*processes: Any) -> None:
    """Wait for processes that must succeed. What they print is part of the test's output."""
    for process in processes:
        process.join(TIMEOUT)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert statuses == [0] * len(processes)


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
