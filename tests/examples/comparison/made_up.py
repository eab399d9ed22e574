"""Invented rows of trainings, and the texts of tables."""

import numpy as np
import pandas as pd

from examples.comparison.settings import Setting

MEASURES = {"train_loss": "training loss", "test_error": "test error"}
METHODS = {"none": 4.0, "norm": 1.0, "zclip": 1.1, "alrc2": 0.9, "alrc2+norm": 0.8}


def row(method="none", seed=0, train_loss=1.0, **changes):
    measured = {"train_loss": train_loss, "test_error": train_loss}
    return {"method": method, "seed": seed} | measured | changes


def losses_of(method, losses, row=row, **changes):
    return [row(method, seed, loss, **changes) for seed, loss in enumerate(losses)]


def five_seeds(**changes):
    """Five seeds of a few methods that differ by known factors and a little chance."""
    generator = np.random.default_rng(0)
    common = np.exp(generator.normal(0, 0.2, 5))
    return [
        each
        for method, factor in METHODS.items()
        for each in losses_of(
            method, (factor * common * np.exp(generator.normal(0, 0.01, 5))).tolist(), **changes
        )
    ]


def setting_of(rows):
    return Setting("made up", pd.DataFrame(rows), MEASURES)


def texts(table):
    """A table's rows by their headings."""
    return {cells[0].text: [cell.text for cell in cells[1:]] for cells in table.rows}


def bold(table):
    return {cells[0].text for cells in table.rows if any(cell.bold for cell in cells)}
