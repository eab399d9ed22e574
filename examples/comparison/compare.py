"""The comparison of an example that is a single file: its trainings and the tables of results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from jsonargparse import auto_cli
from rich.console import Console

from . import files
from .extras import folder_of
from .methods import check_method
from .progress import Report
from .running import check_each_once, check_positive, run_all
from .settings import Setting
from .tables import Table, also_measured_table, comparison_table, markdown, printed

Measure = Callable[..., Mapping[str, float | None]]
"""``measure(setting, method, seed, steps, folder, report)`` trains and returns a row: what was
measured, and how many losses were clipped. It calls ``report`` regularly with the number of steps
done. It may write files into the folder."""


@dataclass(frozen=True)
class Training:
    """Everything that determines one training.

    Attributes:
        setting: what is trained.
        method: what protects it.
        seed: seed of the weights and the batches.
        steps: number of training steps.
    """

    setting: str
    method: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Name of the training's folder, unique in the output."""
        return f"{self.setting}-{self.method}-seed{self.seed}"

    @property
    def work(self) -> int:
        """Expected duration, in steps."""
        return self.steps


def train(
    measure: Measure,
    options: Mapping[str, Any],
    run: Training,
    output: Path,
    report: Report | None = None,
) -> None:
    """Train and save a row: what the training is, what it measured, and its seconds.

    If another process runs this training, this process waits for its end. A finished training is
    left unchanged.
    """
    folder = output / run.name
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the folder, because Lightning's loggers warn of a folder that is not empty.
    with FileLock(output / f".{run.name}{files.LOCK}"):
        if files.is_finished(folder):
            return
        start = time.perf_counter()
        measured = measure(run.setting, run.method, run.seed, run.steps, folder, report=report)
        seconds = {"seconds": round(time.perf_counter() - start, 1)}
        files.write_json(folder / files.RESULT, {**vars(run), **options, **measured, **seconds})


@dataclass(frozen=True)
class Comparison:
    """What an example compares.

    Attributes:
        name: name of the example's module.
        measure: trains, and returns the row of a training.
        settings: the methods that are compared in each setting, by the setting's name.
        measures: columns that methods are compared by, and their names; lower is better. The first
            is None if the weights of a training became NaN or infinite. Each of the others is None
            in all trainings of a setting in which it is not measured.
        steps: number of training steps.
        afterwards: called with the output's folder after the trainings; makes one more table, or
            returns None. Without it there is no such table.
        options: what else determines the trainings, numbers and strings, equal for all trainings of
            an output. It is saved in the rows; ``measure`` has what it needs of it.
        also: further columns to show for each method, and their names.
        needs: packages that must be installed, and the extra that has each.
    """

    name: str
    measure: Measure
    settings: Mapping[str, Sequence[str]]
    measures: Mapping[str, str]
    steps: int
    afterwards: Callable[[Path], Table | None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)

    def main(self) -> None:
        """Run `compare` by its command line."""

        def compare(
            seeds: int = 5,
            steps: int = self.steps,
            settings: Sequence[str] | None = None,
            methods: Sequence[str] | None = None,
            workers: int | None = None,
            output: Path = Path("comparison") / self.name,
        ) -> None:
            """Train unprotected and protected in several ways, and compare.

            All trainings of one seed start from the same weights and see the same batches. Prints
            tables and writes them to report.md, beside results.csv and a folder for each training.
            Finished trainings are not run again.

            Args:
                seeds: number of seeds, from 0 up.
                steps: number of training steps.
                settings: settings, like [a,b]; default: all.
                methods: methods, like [none,alrc2+norm]; default: the setting's own.
                workers: trainings at a time, each on one core; default: one per core.
                output: directory of the results.
            """
            self.compare(seeds, steps, settings, methods, workers, output)

        program = f"python -m examples.{self.name}"
        auto_cli({"compare": compare}, as_positional=False, prog=program)

    def compare(
        self,
        seeds: int,
        steps: int,
        settings: Sequence[str] | None,
        methods: Sequence[str] | None,
        workers: int | None,
        output: Path,
    ) -> None:
        """Train what is not finished, print the tables and write them; see `main`.

        Raises:
            ValueError: an argument is wrong, or the output holds trainings with another number of
                steps or other options.
            ModuleNotFoundError: a package is not installed.
            RuntimeError: trainings have failed; the others were run.
        """
        for package, extra in self.needs.items():
            folder_of(package, extra)
        check_positive(seeds=seeds, steps=steps, workers=workers)
        check_each_once(settings=settings, methods=methods)
        for name in settings or ():
            if name not in self.settings:
                raise ValueError(f"settings must be some of {list(self.settings)}, got {name!r}")
        runs = [
            Training(setting, method, seed, steps)
            for seed in range(seeds)
            for setting in settings or self.settings
            for method in methods or self.settings[setting]
        ]
        for run in runs:
            check_method(run.method, run.setting, self.settings[run.setting])
            self._check_same(run, output)
        run_all(partial(train, self.measure, self.options), runs, output, workers)
        self.tell(
            [json.loads((output / run.name / files.RESULT).read_text()) for run in runs], output
        )

    def _check_same(self, run: Training, output: Path) -> None:
        if files.is_finished(output / run.name):
            row = json.loads((output / run.name / files.RESULT).read_text())
            for name, ours in {"steps": run.steps, **self.options}.items():
                # Rows of earlier releases may lack an option.
                if row.get(name, ours) != ours:
                    raise ValueError(
                        f"output: {output / run.name} was made with {name} {row[name]!r}, now it "
                        f"is {ours!r}; give another output, or remove that folder"
                    )

    def tell(self, rows: Sequence[Mapping[str, object]], output: Path) -> None:
        """Print the tables of rows, and write them to report.md."""
        tables = [
            table for each in self.settings_of(pd.DataFrame(rows)) for table in self.tables(each)
        ]
        more = None if self.afterwards is None else self.afterwards(output)
        if more is not None:
            tables.append(more)
        text = "\n".join(markdown(table, 2) for table in tables)
        files.write_whole(output / "report.md", text.encode())
        console = Console()
        console.width = max(160, console.width)
        for table in tables:
            console.print(printed(table), crop=False)
        console.print(f"Written to {output}: report.md, results.csv", soft_wrap=True)

    def settings_of(self, rows: pd.DataFrame) -> list[Setting]:
        """The settings of the rows, in the example's order."""
        numbers = [*self.measures, *self.also, "clipped", "seconds"]
        rows = rows.assign(**{name: rows[name].astype(float) for name in numbers})
        first, *others = self.measures
        settings = []
        for name in self.settings:
            group = rows[rows["setting"] == name]
            measured = [first, *(each for each in others if group[each].notna().any())]
            measures = {each: self.measures[each] for each in measured}
            if len(group):
                settings.append(Setting(name, group, measures))
        return settings

    def tables(self, setting: Setting) -> list[Table]:
        """A setting's tables: one for each measure, and one of the other columns."""
        also = {**self.also, "clipped": "losses clipped", "seconds": "seconds"}
        tables = [
            *(comparison_table(setting, measure, None) for measure in setting.measures),
            also_measured_table(setting, also, also),
        ]
        return [replace(table, title=f"{setting.title}: {table.title.lower()}") for table in tables]
