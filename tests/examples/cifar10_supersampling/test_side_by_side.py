import re

import pytest

from examples.cifar10_supersampling.side_by_side import side_by_side


@pytest.mark.usefixtures("few_images")
@pytest.mark.filterwarnings("ignore")
def test_stacked_and_single_trainings_are_timed(capsys):
    side_by_side(runs=2, steps=50, width=0.05, accelerator="cpu")
    told = " ".join(capsys.readouterr().out.split())
    found = re.search(r"one under a Trainer ([\d.]+), 2 at once ([\d.]+)\..* ([\d.]+) times", told)
    alone, together, ratio = (float(each) for each in found.groups())
    assert ratio == pytest.approx(2 * alone / together, abs=0.1)


@pytest.mark.parametrize(("runs", "steps"), [(2, 10), (1, 50)])
def test_too_few_runs_or_steps_are_refused(runs, steps):
    message = f"runs and steps must be at least 2 and 50, got {runs} and {steps}"
    with pytest.raises(ValueError, match=message):
        side_by_side(runs=runs, steps=steps)
