"""The report: its sections, and their output as Markdown and HTML."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ...comparison.settings import Setting, in_order
from ...comparison.tables import Cell, Table, markdown, overview_table
from ..command_line import CONFIGS
from ..results import HISTORY, IMAGES
from . import drawings
from .settings import MEASURES, settings_of
from .tables import also_measured_table, comparison_table, paper_tables

INTRODUCTION = (
    "A network learns to restore photographs of 32 by 32 pixels whose resolution was halved: the "
    "experiment of the paper that introduced adaptive learning rate clipping (ALRC), "
    "arXiv:1906.09060. A single huge loss can wreck such a training. The methods compared here are "
    "to prevent that; the trainings of a setting differ in nothing but the method and the seed."
)

GUIDE = {
    "Training loss": "each training's mean loss of clean images over its last steps, before "
    "anything is clipped. In the paper's experiments, squared, quartic and unstable, losses over "
    "50 enter as their square root, as its authors had it.",
    "Test error": "the loss's own kind of error on the test images, without outliers; of the "
    "weights as they were after the last step.",
    "Intervals": "95 % of Student's t over seeds. Of one seed there is none, and no verdict.",
    "Differences": "trainings of one seed start from the same weights and see the same batches, so "
    "methods are compared seed by seed. The difference is the mean of the logarithms' differences, "
    "told in percent: −10 % is nine tenths of the baseline.",
    "Best gradient clipper": "the clipper of the lowest mean, chosen by these very figures. Luck "
    "helps the one that is chosen, so comparisons with it are strict.",
    "Verdicts": "“lower” and “higher”: chance is ruled out at 5 %, after Holm's correction of the "
    "p values for all comparisons of a column. “Inside the noise”: the interval contains 0. "
    "“Inside the noise of n comparisons”: the interval alone does not, but of so many comparisons "
    "one may come out like that by chance. Neither says that two methods are equal; the interval "
    "says how far apart they may be.",
    "Lost": "so many trainings ended with weights that are not numbers. Such a method has no "
    "mean, since one over the others would flatter it.",
    "Bold": "the lowest mean, and those methods whose difference from it is inside the noise.",
}


@dataclass(frozen=True)
class Picture:
    """A figure in a file.

    Attributes:
        kind: "methods", "curves" or "images".
        path: path of the PNG.
        caption: what it shows.
    """

    kind: str
    path: Path
    caption: str

    @property
    def data_uri(self) -> str:
        """The file's content as a data URI, for a page without other files."""
        return "data:image/png;base64," + b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Section:
    """The section of one setting.

    Attributes:
        title: title of the setting.
        name: the title in the form of a link's target.
        facts: further facts of the setting.
        tables: tables that compare methods.
        more: a table of the other measures.
        pictures: figures.
        notes: what is missing.
    """

    title: str
    name: str
    facts: str
    tables: Sequence[Table]
    more: Table
    pictures: Sequence[Picture] = field(default=())
    notes: Sequence[str] = field(default=())


def write_report(rows: pd.DataFrame, output: Path, baseline: str | None, source: str) -> None:
    """Write report.md, report.html and their figures.

    Args:
        rows: see `rows.read_rows`.
        output: directory, made if it is not there.
        baseline: the method to compare with, or None for each setting's best gradient clipper.
        source: what the rows were read from.

    Raises:
        ValueError: no row has the baseline's method.
    """
    methods = sorted(rows["method"].unique())
    if baseline is not None and baseline not in methods:
        raise ValueError(f"baseline must be one of the methods, {methods}, got {baseline!r}")
    output.mkdir(parents=True, exist_ok=True)
    settings = settings_of(rows)
    page = {
        "title": "CIFAR-10 supersampling: what keeps a training stable",
        "introduction": INTRODUCTION,
        "methods": _methods(rows),
        "facts": _facts(rows, settings, source),
        "guide": GUIDE,
        "overviews": _overviews(settings, baseline),
        "paper": paper_tables(settings),
        "sections": [_section(each, output, baseline) for each in settings],
    }
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["markdown"] = markdown
    templates.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    for name in ("report.md", "report.html"):
        text = templates.get_template(f"{name}.jinja").render(page)
        (output / name).write_text(text, encoding="utf-8")


def _overviews(settings: Sequence[Setting], baseline: str | None) -> list[Table]:
    """Tables of all settings. Without a best gradient clipper, the baseline is "none"."""
    tables = []
    for measure in MEASURES:
        if baseline is not None or any(each.best_clipper(measure) for each in settings):
            tables.append(overview_table(settings, measure, baseline))
        elif any("none" in each.values(measure) for each in settings):
            tables.append(overview_table(settings, measure, "none"))
    return tables


def _facts(rows: pd.DataFrame, settings: Sequence[Setting], source: str) -> Table:
    """What was run, in a table of two columns."""
    hours = rows["seconds"].sum() / 3600
    facts = {
        "source": source,
        "trainings": f"{len(rows):,}, {hours:,.1f} hours together",
        "settings": f"{len(settings)}",
        "methods": ", ".join(in_order(rows["method"])),
        "seeds": _several(rows["seed"]),
        "steps": _several(rows["steps"]),
        "width": _several(rows["width"]),
        "precision": _several(rows["precision"]),
        "images": _several(rows["data"]),
        "ALRC's start": _several(rows["alrc_start"]).replace("_", " "),
    }
    return Table(
        "What was run",
        ["", ""],
        [[Cell(name.replace("_", " ")), Cell(value)] for name, value in facts.items()],
    )


def _methods(rows: pd.DataFrame) -> Table:
    """A table of the methods, from the first comment of each configuration."""
    names = in_order(name for method in rows["method"] for name in method.split("+"))
    told = []
    for name in names:
        path = next(CONFIGS.glob(f"*/{name}.yaml"), None)
        lines = ["# Not one of the grid's own."] if path is None else path.read_text().splitlines()
        comment = takewhile(lambda line: line.startswith("#"), lines)
        told.append([Cell(name), Cell(" ".join(line.removeprefix("# ") for line in comment))])
    return Table("The methods", ["", ""], told, ["Names joined by “+” are used together."])


def _several(column: pd.Series) -> str:
    """All values of a column, in order."""
    return ", ".join(
        f"{value:,g}" if isinstance(value, (int, float)) else str(value)
        for value in sorted(column.unique().tolist())
    )


def _section(setting: Setting, output: Path, baseline: str | None) -> Section:
    """Make the section of one setting, and save its figures."""
    seeds = setting.seeds
    drawn = {
        "methods": (
            drawings.points(setting),
            "Each training a point; diamonds are means, bars their 95 % intervals.",
        ),
        "curves": (
            drawings.curves(setting),
            "Learning curves: median of the seeds, shaded from the lowest to the highest; × is "
            "where a training lost its weights.",
        ),
        "images": (
            drawings.images(setting),
            "Test images, restored by the networks of one seed; the lowest test error on top.",
        ),
    }
    pictures, notes = [], []
    for kind, (figure, caption) in drawn.items():
        if figure is None:
            file = {"curves": HISTORY, "images": IMAGES}[kind]
            notes.append(f"No {kind}: there is no {file} beside these rows.")
            continue
        path = output / f"{setting.name}-{kind}.png"
        path.write_bytes(drawings.png(figure))
        pictures.append(Picture(kind, path, caption))
    return Section(
        setting.title,
        setting.name,
        f"Experiment “{setting['experiment']}”: {setting['steps']:,} steps, of which the last "
        f"{setting['last_steps']:,} make the training loss; width {setting['width']:g}, "
        f"precision {setting['precision']}, images: {setting['data']}; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}.",
        [comparison_table(setting, measure, baseline) for measure in MEASURES],
        also_measured_table(setting),
        pictures,
        notes,
    )
