"""Tables of text, and their output as Markdown or on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import rich.table
from rich import box

from .differences import Difference, differences, mean_interval
from .settings import GRADIENT_CLIPPERS, Setting, in_order, may_be_chance


class Cell(NamedTuple):
    """A table's cell.

    Attributes:
        text: text of the cell.
        bold: whether the text is bold, which marks the best.
        tone: "lower", "higher", "noise" or "", for pages with colours.
    """

    text: str
    bold: bool = False
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be read by itself.

    Attributes:
        title: text above the table.
        columns: headings.
        rows: rows with one cell for each column; the first cell is the row's heading.
        notes: text below the table, which explains the figures.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default=())


def number(value: float, like: float | None = None) -> str:
    """A number with about four digits, or with as many decimals as the number ``like``."""
    size = abs(value if like is None else like)
    if not 1e-3 <= size < 1e5:
        return f"{value:.3g}"
    decimals = max(0, 3 - max(0, int(np.floor(np.log10(size)))))
    return f"{value:,.{decimals}f}"


def spread(mean: float, width: float, like: float | None = None) -> str:
    """A mean, and its half width if the half width is known; see `number`."""
    like = mean if like is None else like
    return number(mean, like) + ("" if np.isnan(width) else f" ± {number(width, like)}")


def lost(count: int, of: int) -> str:
    """How many trainings lost their weights."""
    return f"lost {count} of {of}"


def change(difference: Difference) -> str:
    """A difference in percent, with its interval; as a factor if the factor is three or more."""
    if difference.seeds == 0:
        return ""
    ends = (difference.low, difference.high)
    if difference.ratio >= 3:
        text, (low, high) = f"× {difference.ratio:.3g}", (f"{end:.3g}" for end in ends)
    else:
        low, high = (signed(end) for end in ends)
        text = f"{signed(difference.ratio)} %"
    return text if np.isnan(difference.low) else f"{text} ({low} to {high})"


def signed(ratio: float) -> str:
    """A ratio's difference from 1 in percent, without the percent sign."""
    text = f"{100 * (ratio - 1):+,.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def verdict(difference: Difference) -> Cell:
    """A difference in words, and its p value after Holm's correction."""
    if np.isnan(difference.p) or difference.verdict == "identical":
        return Cell(difference.verdict, tone="noise")
    p = difference.p_corrected
    words = "p < 0.001" if p < 0.001 else f"p {p:.2g}"
    tone = difference.verdict if difference.is_significant else "noise"
    return Cell(f"{difference.verdict}, {words}", tone=tone)


def comparison_table(setting: Setting, measure: str, baseline: str | None) -> Table:
    """Compare the methods of a setting with a baseline and with no protection.

    Args:
        setting: the trainings.
        measure: a key of the setting's measures.
        baseline: a method, or None for the best gradient clipper.
    """
    values = setting.values(measure)
    missing = setting.lost(measure)
    best = setting.best_clipper(measure)
    chosen = best if baseline is None else baseline
    baselines = list(dict.fromkeys([chosen, "none"]))
    name = setting.measures[measure]
    notes = [_note_on_seeds(setting, name)]
    if baseline is None and best is not None:
        notes.append(f"{best}: of the gradient clippers, the one of the lowest mean.")
    elif baseline is None:
        notes.append("There is no gradient clipper to compare with that kept its weights.")

    compared = {}
    for each in baselines:
        if each in values:
            compared[each] = differences(values, each)
        elif each in missing:
            notes.append(f"No comparison with {each}: it {lost(*missing[each])}.")
        elif each is not None:
            notes.append(f"No comparison with {each}: it was not run in this setting.")

    lowest = setting.lowest(measure)
    rows = []
    for method in values:
        own = values[method].dropna()
        fewer = "" if len(own) == len(setting.seeds) else f", {_seeds(len(own))}"
        row = [Cell(method), Cell(spread(*mean_interval(own)) + fewer, method in lowest)]
        for by_method in compared.values():
            row += _difference_cells(by_method.get(method), len(own))
        rows.append(row)
    for method, counts in missing.items():
        row = [Cell(method), Cell(lost(*counts))]
        rows.append(row + [Cell(""), Cell(lost(*counts), tone="higher")] * len(compared))
    headings = [heading for each in compared for heading in (f"against {each}", "verdict")]
    return Table(name.capitalize(), ["", name, *headings], rows, notes)


def _note_on_seeds(setting: Setting, measured: str) -> str:
    """The note that explains the figures of a comparison."""
    if len(setting.seeds) == 1:
        return (
            f"{measured.capitalize()} of one seed, which cannot tell a difference from chance: "
            "there is no interval, no verdict, and none is marked as the best."
        )
    return (
        f"{measured.capitalize()}: mean of {len(setting.seeds)} seeds ± half of its 95 % interval; "
        "bold: the lowest, and what is inside its noise. Differences: paired by seed, with 95 % "
        "interval; p after Holm, for the comparisons of a column."
    )


def _difference_cells(difference: Difference | None, seeds: int) -> list[Cell]:
    """A difference and its verdict; None marks the baseline itself."""
    if difference is None:
        return [Cell("baseline"), Cell("")]
    fewer = "" if difference.seeds in (0, seeds) else f", {_seeds(difference.seeds)}"
    return [Cell(change(difference) + fewer), verdict(difference)]


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def overview_table(settings: Sequence[Setting], measure: str, baseline: str | None) -> Table:
    """All settings in one table, one row each: each method against the baseline.

    Args:
        settings: settings that all have the measure.
        measure: a key of the settings' measures.
        baseline: a method, or None for the best gradient clipper of each setting.
    """
    rows = {}
    for setting in settings:
        chosen = setting.best_clipper(measure) if baseline is None else baseline
        values = setting.values(measure)
        row = {method: Cell(lost(*counts)) for method, counts in setting.lost(measure).items()}
        reference = Cell("")
        if chosen in values:
            mean = mean_interval(values[chosen].dropna())
            reference = Cell(f"{chosen} {number(mean.mean)}")
            compared = differences(values, chosen)
            row |= {method: _overview_cell(each) for method, each in compared.items()}
        elif chosen in row:
            reference = Cell(f"{chosen} {row[chosen].text}")
        rows[setting.title] = (reference, row)
    left_out = GRADIENT_CLIPPERS if baseline is None else (baseline,)
    methods = [
        method
        for method in in_order(method for each in settings for method in each.methods)
        if method not in left_out
    ]
    reference_name = "best gradient clipper" if baseline is None else "baseline"
    return Table(
        f"{settings[0].measures[measure].capitalize()} against the {reference_name}",
        ["", reference_name, *methods],
        [
            [Cell(title), reference, *(row.get(method, Cell("")) for method in methods)]
            for title, (reference, row) in rows.items()
        ],
        [
            "Difference in percent, paired by seed; bold: lower. “noise”: the difference may be "
            "chance, by its interval or for the number of comparisons."
        ],
    )


def _overview_cell(difference: Difference) -> Cell:
    """A difference, marked if it may be chance."""
    text = change(replace(difference, low=np.nan, high=np.nan))
    if difference.is_significant:
        return Cell(text, difference.verdict == "lower", difference.verdict)
    word = "noise" if may_be_chance(difference) else difference.verdict
    return Cell(f"{text}, {word}" if text else word, tone="noise")


def also_measured_table(
    setting: Setting, measured: Mapping[str, str], counts: Collection[str]
) -> Table:
    """Other columns of a setting's rows: means over seeds, with intervals if there are several.

    Args:
        setting: the trainings.
        measured: columns, and their names in the table.
        counts: columns that are shown without an interval.
    """
    columns = [column for column in measured if setting.rows[column].notna().any()]
    by_method = setting.rows.groupby("method")
    first = next(iter(setting.measures))
    rows = []
    for method in [*setting.values(first), *setting.lost(first)]:
        own = by_method.get_group(method)
        row = [Cell(method)]
        for column in columns:
            values = own[column]
            if column in counts:
                row.append(Cell("" if values.isna().all() else f"{values.mean():,.0f}"))
            elif method in setting.lost(column):
                row.append(Cell(""))
            else:
                row.append(Cell(spread(*mean_interval(values))))
        rows.append(row)
    headings = ["", *(measured[column] for column in columns)]
    width = " ± half of their 95 % interval" if len(setting.seeds) > 1 else ""
    return Table("Also measured", headings, rows, [f"Means over seeds{width}."])


def of_frame(title: str, rows: pd.DataFrame, note: str) -> Table:
    """A table of a DataFrame; the index is the first column."""
    columns = [name.replace("_", " ") for name in rows.columns]
    cells = [
        [
            Cell(str(index)),
            *(Cell(f"{value:g}" if isinstance(value, float) else str(value)) for value in values),
        ]
        for index, *values in rows.itertuples()
    ]
    return Table(title, ["", *columns], cells, [note])


def markdown(table: Table, level: int) -> str:
    """A table as Markdown, under a heading of level ``level``."""
    lines = [
        f"{'#' * level} {table.title}",
        "",
        f"| {' | '.join(table.columns)} |",
        f"|{'---|' * len(table.columns)}",
        *(
            "|" + "".join(f" **{c.text}** |" if c.bold else f" {c.text} |" for c in row)
            for row in table.rows
        ),
        "",
        *table.notes,
    ]
    return "\n".join(lines) + "\n"


def printed(table: Table) -> rich.table.Table:
    """A table for the terminal."""
    shown = rich.table.Table(
        title=table.title,
        caption="\n".join(table.notes),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for column in table.columns:
        shown.add_column(column, no_wrap=True)
    for row in table.rows:
        shown.add_row(*(f"[bold]{cell.text}[/]" if cell.bold else cell.text for cell in row))
    return shown
