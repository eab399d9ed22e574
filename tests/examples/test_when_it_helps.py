from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from examples import when_it_helps as example
from tests.examples.comparison.made_up import losses_of

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "when-it-helps.md"


def task(*rows):
    frame = pd.DataFrame([each for some in rows for each in some])
    return example.Task("made up", "nothing", "each", frame, "train_loss", "alrc2")


FIVE = np.array([1.0, 1.1, 0.9, 1.2, 1.0])
NOISE = np.array([1.0, 1.01, 0.99, 1.0, 1.02])


def test_a_row_by_hand():
    cells = example.row(
        task(
            losses_of("none", 2 * FIVE),
            losses_of("norm", 0.5 * FIVE),
            losses_of("zclip", 0.8 * FIVE * NOISE),
            losses_of("alrc2", FIVE * NOISE),
            losses_of("alrc2+norm", 0.4 * FIVE * NOISE),
        )
    )
    told = [cell.text for cell in cells]
    assert told[:3] == ["made up", "nothing", "each"]
    # The noise's geometric mean is 1.0040.
    assert told[3].startswith("−49.8 % (−50.")
    assert told[4].startswith("norm: +100.8 % (+9")
    assert told[5].startswith("−19.7 % (−20.")
    assert [cell.bold for cell in cells] == [False, False, False, True, False, True]


def test_a_difference_that_may_be_chance_is_not_bold():
    cells = example.row(task(losses_of("none", FIVE), losses_of("alrc2", 0.999 * FIVE * NOISE)))
    assert "to +" in cells[3].text
    assert not any(cell.bold for cell in cells)
    assert [cell.text for cell in cells[4:]] == ["", ""]


@pytest.mark.parametrize("method", ["none", "alrc2"])
def test_a_row_says_how_many_trainings_diverged(method):
    losses = {"none": FIVE, "norm": FIVE, "alrc2": FIVE} | {method: [1.0, None, 1.0, 1.0, None]}
    cells = example.row(task(*(losses_of(name, values) for name, values in losses.items())))
    alrc, none = (2, 0) if method == "alrc2" else (0, 2)
    assert cells[3].text == f"ALRC: {alrc} of 5 diverged; unprotected: {none} of 5 diverged"
    assert not cells[3].bold
    if method == "alrc2":
        assert cells[4].text == "ALRC: 2 of 5 diverged; norm: 0 of 5 diverged"


def test_the_page_has_the_table_of_the_rows():
    lines = example.markdown(example.table(), 2).splitlines()
    table = "\n".join(line for line in lines if line.startswith("|"))
    assert table in PAGE.read_text()


def test_all_kept_measurements_are_in_the_table():
    tasks = [row[0].text for row in example.table().rows]
    for name in ("Flight delays", "Forecasting", "Language model", "Supersampling", "Micrographs"):
        assert any(each.startswith(name) for each in tasks)
    for path in (example.HERE / "measured").glob("*.csv"):
        seeds = 3 if path.stem == "partial_stem" else 5
        by_method = example.kept(path.stem).groupby(["setting", "method"])
        assert (by_method["seed"].nunique() == seeds).all()
