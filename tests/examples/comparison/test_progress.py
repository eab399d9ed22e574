import io
from typing import NamedTuple

import pytest
from rich.console import Console

from examples.comparison import progress


class Made(NamedTuple):
    name: str
    steps: int = 10
    work: int = 10


@pytest.mark.parametrize("width", [80, 120])
def test_a_line_has_the_end_of_a_long_name_and_all_times(monkeypatch, width):
    """The lines of a training and of the total fit a terminal of 80 columns."""
    names = ["outliers-quartic-batch8-adam0.00078125-hot_pixels0.05-alrc2+norm-seed0", "short"]
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    runs = [Made(name) for name in names]
    ended = list(progress.show(runs, iter([(0, 5), (1, 5), (0, None), (1, None)])))
    assert [run.name for run, _ in ended] == names
    lines = written.getvalue().splitlines()
    line = next(line for line in lines if "…" in line and "50%" in line)
    assert "0.05-alrc2+norm-seed0" in line
    assert "━" in line
    assert line.count(":") == 4  # both times, hours to seconds
    assert any("2 of 2 trainings" in line and "100%" in line for line in lines)
