"""The notebook runs from its first cell to its last, with the results that its text states."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    kernels = tmp_path / "kernels" / "python3"  # this Python, whatever kernels the user has
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()

    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    assert sum("image/png" in each.get("data", {}) for each in outputs) == 2
    printed = "".join(each.get("text", "") for each in outputs)
    unprotected, protected = map(float, re.findall(r"mean error ([\d.]+)", printed))
    assert protected < unprotected / 2
    (named,) = re.findall(r"the eight worst: (.*)", printed)
    (planted,) = re.findall(r"the eight wrong: (.*)", printed)
    assert named == planted
    (replayed, others) = re.search(r"batch: ([\d,]+); median of the others: (.*)", printed).groups()
    assert float(replayed.replace(",", "")) > 1000 * float(others)
    assert list(tmp_path.rglob("alrc_spikes.jsonl"))
