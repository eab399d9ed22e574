"""Shows what ALRC would have done to a run, from the run's logged losses.

``python -m lightning_alrc.preview lightning_logs/version_0 --loss train_loss``

It reads the log of a training with or without ALRC: any CSV file, or the files of CSVLogger,
TensorBoard, W&B or MLflow. Extras of the package are needed for

- TensorBoard's files: ``pip install 'lightning-alrc[preview]'``
- W&B's files: ``pip install 'lightning-alrc[wandb]'``, with wandb 0.31 or newer
- the figure: ``pip install 'lightning-alrc[plot]'``
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_alrc._moments.bounds import bounds
from lightning_alrc._moments.sums import Sums
from lightning_alrc._telemetry.reading import Clip, LoggedLoss
from lightning_alrc._telemetry.reading_runs import Logged, read_run
from lightning_alrc.alrc import ALRC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Preview", "Summary", "main", "preview_log"]

FIGURE = "alrc_preview.png"
"""Name of the figure's file, if the user gives none."""

TABLE = (1.0, 2.0, 3.0, 4.0)
"""The values of ``num_stddev`` in the table."""

WORST = 5
"""Number of clips that are listed one by one."""

PARTS = 10
"""Number of equal parts of the log in which clips are counted."""

NO_LOSS = re.compile(r"(?i)(^|[^a-z])(val|valid|validation|test)([^a-z]|$)|_epoch$|loss_clipped$")
"""Matches names with "loss" in them that are used only if the user asks for them."""

NO_NAMES = {"step", "epoch", "wall time"}
"""Columns that are never losses, in lower case. Errors do not offer them."""

DEFAULTS = {"num_stddev": 3.0, "decay": 0.999}
"""The settings that are options of the command line, with :class:`ALRC`'s defaults."""

Column = NDArray[np.float64]


class Summary(NamedTuple):
    """What ALRC would have done with one ``num_stddev``.

    Steps and scales are NaN if nothing is clipped.
    """

    num_stddev: float
    """a loss more than this many standard deviations above the mean is clipped"""
    clipped: int
    """number of clipped losses"""
    fraction: float
    """clipped losses as a fraction of all losses"""
    first_step: float
    """step of the first clip"""
    last_step: float
    """step of the last clip"""
    mean_scale: float
    """mean factor on the gradients of the clipped losses"""
    least_scale: float
    """smallest factor on the gradients of the clipped losses"""


@dataclass(frozen=True, eq=False)
class Preview:
    """What ALRC would have done to one loss of a run.

    Attributes:
        name: name of the loss in the log.
        settings: settings of ALRC.
        steps: step of each logged loss, in the order of the log, [losses].
        losses: the losses as logged, [losses].
        thresholds: threshold for each loss; infinite during ALRC's burn-in, [losses].
        losses_clipped: the losses after clipping, [losses].
        scales: factor on each gradient; 1 if the loss is not clipped, [losses].
        had_alrc: whether the log has values of ALRC. If so, the run was trained with ALRC.
    """

    name: str
    settings: Mapping[str, Any]
    steps: Column
    losses: Column
    thresholds: Column
    losses_clipped: Column
    scales: Column
    had_alrc: bool = False

    @property
    def clipped(self) -> NDArray[np.bool_]:
        """Whether each loss would have been clipped, [losses]."""
        return self.scales < 1

    @property
    def every(self) -> float:
        """Usual number of steps from one logged loss to the next."""
        steps = np.unique(self.steps)
        return float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0

    @property
    def summary(self) -> Summary:
        """How many losses would have been clipped, when, and by which factors."""
        steps, scales = self.steps[self.clipped], self.scales[self.clipped]
        found = (math.nan,) * 4
        if len(steps):
            found = steps[0], steps[-1], scales.mean(), scales.min()
        count = len(self.losses)
        first, last, mean, least = map(float, found)
        fraction = len(steps) / count if count else 0.0
        return Summary(self.settings["num_stddev"], len(steps), fraction, first, last, mean, least)

    def with_num_stddev(self, num_stddev: float) -> Preview:
        """The same losses under another ``num_stddev``.

        Args:
            num_stddev: as for :class:`ALRC`. All other settings stay.

        Returns:
            A new preview.
        """
        settings = {**self.settings, "num_stddev": num_stddev}
        return _previewed(self.name, Logged(self.steps, self.losses), settings, self.had_alrc)

    def table(self) -> list[Summary]:
        """Summaries for ``num_stddev`` 1, 2, 3 and 4, and for the value in the settings."""
        own = self.settings["num_stddev"]
        numbers = sorted({*TABLE, own})
        return [(self if n == own else self.with_num_stddev(n)).summary for n in numbers]

    @property
    def caveats(self) -> list[str]:
        """What the log cannot show."""
        default = DEFAULTS["decay"]
        decay = self.settings.get("decay", default)
        repeated = len(self.steps) - len(np.unique(self.steps))
        every = self.every
        infinite = int(np.isinf(self.losses).sum())
        unclipped = int(np.isinf(self.thresholds).sum())
        found = [
            "The run was trained with ALRC, as its log shows. Without ALRC, or with another "
            "num_stddev, its losses would differ from the first clip on."
            if self.had_alrc
            else "These are the losses of the run as it was. Under ALRC they would differ from the "
            "first clip on.",
            "If these are means of batches, ALRC of each sample's loss would clip other losses.",
        ]
        if self.settings["num_stddev"] < math.inf and len(self.losses) < 10 * unclipped:
            found.append(
                f"The log has {len(self.losses):,} losses, and ALRC never clips the first "
                f"{unclipped:,}. To log more, train with Trainer(log_every_n_steps=1)."
            )
        if every > 1:
            found.append(
                f"Logged every {every:g} steps: the losses between are unknown, or averaged, which "
                f"hides spikes. The decay of {decay:g} here (--decay) matches a decay of "
                f"{decay ** (1 / every):.6g} in the training. For {default:g} in the training, use "
                f"{default**every:.3g}."
            )
        if self.name.endswith("_epoch"):
            found.append(
                "The loss's name says that it is a mean over epochs. ALRC clips losses of steps."
            )
        if repeated:
            found.append(
                f"{repeated:,} losses share their step with another loss: the training was "
                "resumed, the step starts again in each epoch, or they are of validation. All were "
                "used, in the order of the log."
            )
        if infinite:
            found.append(
                f"{infinite:,} losses are infinite: ALRC neither clips them nor adds them to the "
                "moments."
            )
        if (self.losses < 0).any():
            found.append(
                "Some losses are negative: where the mean is negative, factors are measured from "
                "the mean."
            )
        return found

    def figure(self, title: str | None = None) -> Figure:
        """Draw the losses, their mean, the threshold, and the clips.

        Args:
            title: text above the figure; default: none.

        Returns:
            The figure. Save it with ``savefig``. A notebook shows it as the value of a cell.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return _figure([self], title)

    def __str__(self) -> str:
        """The report, as the command line prints it."""
        count, finite = len(self.losses), self.losses[np.isfinite(self.losses)]
        lines = [
            f"{self.name}: {count:,} losses, steps {self.steps[0]:,.0f} to {self.steps[-1]:,.0f}, "
            f"median {np.median(finite):.4g}, largest {finite.max():.4g}"
            if len(finite)
            else f"{self.name}: {count:,} losses, none of them finite",
            "",
            "  num_stddev  clipped  of all  first step   last step  mean factor  least factor",
        ]
        for row in self.table():
            line = f"  {row.num_stddev:>10g}  {row.clipped:>7,}  {row.fraction:>6.2%}"
            if row.clipped:
                line += f"  {row.first_step:>10,.0f}  {row.last_step:>10,.0f}"
                line += f"  {row.mean_scale:>11.3f}  {row.least_scale:>12.3g}"
            lines.append(line)
        at = f"at num_stddev={self.settings['num_stddev']:g}"
        parts = [int(part.sum()) for part in np.array_split(self.clipped, PARTS)]
        lines += ["", f"  Clipped in each tenth of the log, {at}: {' '.join(map(str, parts))}"]
        worst = np.flatnonzero(self.clipped)
        worst = worst[np.argsort(self.scales[worst], kind="stable")][:WORST]
        for index in worst:
            lines.append(
                f"  step {self.steps[index]:,.0f}: loss {self.losses[index]:.4g} to "
                f"{self.losses_clipped[index]:.4g}, gradient times {self.scales[index]:.3g}"
            )
        return "\n".join(lines)


def preview_log(
    source: str | os.PathLike[str] | ArrayLike | Tensor,
    loss: str | None = None,
    num_stddev: float = 3.0,
    *,
    run: str | None = None,
    **settings: Any,
) -> Preview:
    """Run ALRC over the losses that a run has logged.

    >>> losses = [1.0 + 0.1 * (step % 3) for step in range(50)] + [9.0, 1.0]
    >>> preview = preview_log(losses)
    >>> preview.summary.clipped, preview.summary.first_step
    (1, 50.0)
    >>> preview_log("lightning_logs/version_0", "train_loss").figure()  # doctest: +SKIP

    Args:
        source: the losses themselves as a list, array or tensor, [steps], or the path of a log. A
            log is a CSV file, which may be compressed (``.csv.gz``); a CSVLogger's folder; a folder
            with TensorBoard's event files; a W&B run's folder; MLflow's database file or ``mlruns``
            folder.
        loss: name of the loss in the log. Default: the only name with "loss" in it, apart from
            names of validation, test and epoch losses, and of losses after clipping. A loss that
            ALRC logged counts only if there is no other.
        num_stddev: as for :class:`ALRC`.
        run: id of the run, if MLflow has several.
        settings: other settings of :class:`ALRC`, like ``decay``.

    Returns:
        What would have been clipped. ``print`` shows it as a report.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ImportError: if the package that reads the log is not installed.
        TypeError: if a setting is not a number, or there is no such setting.
        ValueError: if the source is something else, has no such loss, or a setting is out of range.
    """
    settings = {"num_stddev": num_stddev, **settings}
    alrc = ALRC(**settings)  # raises for a wrong setting
    settings = {name: getattr(alrc, name) for name in settings}
    if not isinstance(source, (str, os.PathLike)):
        losses = _floats(source)
        if losses.ndim != 1 or np.isnan(losses).any():
            raise ValueError(f"source must be losses, [steps], without NaN, got {source!r:.100}")
        logged = Logged(np.arange(len(losses), dtype=np.float64), losses)
        return _previewed(loss or "loss", logged, settings)
    found, had_alrc = _losses(Path(source), None if loss is None else [loss], run)
    ((name, logged),) = found.items()
    return _previewed(name, logged, settings, had_alrc)


def _floats(losses: Any) -> Column:
    """Losses as an array; NaN if they are no numbers."""
    # NumPy reads neither a tensor of bfloat16 nor one that requires gradients.
    if isinstance(losses, Tensor):
        losses = losses.tolist()
    elif isinstance(losses, Sequence):
        losses = [each.tolist() if isinstance(each, Tensor) else each for each in losses]
    try:
        return np.array(losses, dtype=np.float64)
    except (TypeError, ValueError):
        return np.array([math.nan])


def _losses(
    path: Path, asked: Sequence[str] | None, run: str | None
) -> tuple[dict[str, Logged], bool]:
    """The losses with the names ``asked``, or the only loss of the log if ``asked`` is ``None``.

    Also whether the log has values of ALRC.
    """
    names: list[str] = []

    def wanted(name: str) -> bool:
        names.append(name)  # read_run asks for every name in the log
        if asked is not None:
            return name in asked
        return "loss" in name.lower() and not NO_LOSS.search(name)

    found = read_run(path, wanted, run)
    offered = sorted({name for name in names if name.lower() not in NO_NAMES})
    for name in asked or ():
        if name not in found:
            raise ValueError(f"loss must be one of {offered}, got {name!r}")
    had_alrc = any("alrc/" in name for name in names)
    if asked is None and had_alrc and len(found) > 1:
        own = {name: each for name, each in found.items() if "alrc/" not in name}
        found = own or found
    if asked is None and len(found) != 1:
        raise ValueError(
            f"loss (--loss) must say which of {sorted(found) or offered} is to be clipped, got None"
        )
    return found if asked is None else {name: found[name] for name in asked}, had_alrc


def _previewed(
    name: str, logged: Logged, settings: Mapping[str, Any], had_alrc: bool = False
) -> Preview:
    """Run ALRC over losses."""
    alrc = ALRC(**settings)
    thresholds, losses_clipped, scales = [], [], []
    sums: list[Sums] = []
    alrc.on_sums = sums.append
    for loss in torch.from_numpy(logged.values):
        thresholds.append(float(bounds(alrc._flushed(), alrc._rules.limits).upper))
        losses_clipped.append(float(alrc.clip(loss)))
        scales.append(sums.pop().scale)
    return Preview(
        name,
        settings,
        *logged,
        np.array(thresholds),
        np.array(losses_clipped),
        np.array(scales),
        had_alrc,
    )


def _figure(previews: Sequence[Preview], title: str | None) -> Figure:
    from lightning_alrc.plotting import draw_losses

    losses = {}
    # If the steps start again, for example in a resumed run, a line over them would run backwards.
    is_ordered = all((np.diff(each.steps) >= 0).all() for each in previews)
    for each in previews:
        steps = each.steps if is_ordered else np.arange(len(each.losses), dtype=np.float64)
        clipped = each.clipped
        columns = {
            "loss": each.losses,
            "loss_clipped": each.losses_clipped,
            "threshold": each.thresholds,
            "clipped_total": clipped.cumsum().astype(np.float64),
        }
        clips = zip(steps[clipped], each.losses[clipped], each.losses_clipped[clipped], strict=True)
        losses[each.name] = LoggedLoss(steps, columns, [Clip(*clip) for clip in clips])
    figure = draw_losses(losses, title=title)
    if not is_ordered:
        figure.axes[-1].set_xlabel("losses in the order of the log")
    return figure


def _code(previews: Sequence[Preview]) -> str:
    """The code that trains with the settings of these previews."""
    settings = dict(previews[0].settings)
    lines = []
    if any(each.every > 1 for each in previews) and settings.pop("decay") != DEFAULTS["decay"]:
        lines.append("# with the default decay, because --decay is of the logged losses alone")
    given = {name: value for name, value in settings.items() if value != DEFAULTS[name]}
    written = [f"{name}={_literal(value)}" for name, value in given.items()]
    lines.append(f"trainer = Trainer(callbacks=[ALRCCallback({', '.join(written)})])")
    names = [each.name for each in previews]
    if len(names) > 1:
        lines.append("# and in the training_step of class Net(ALRCMixin, LightningModule):")
        plain = [re.sub(r"\W+", "_", name) for name in names]
        lines += [f'{name} = self.alrc({name}, "{name}")' for name in plain]
    return "\n".join(f"    {line}" for line in lines)


def _literal(value: float) -> str:
    if value == math.inf:
        return 'float("inf")'
    return f"{value:.0f}" if value.is_integer() else repr(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        SystemExit: status 2 if an argument is wrong, status 1 if the package that reads the log is
            missing. The last line on standard error gives the reason.
    """
    parser = argparse.ArgumentParser(
        "python -m lightning_alrc.preview",
        description="Shows which losses of a run ALRC would have clipped, when, and how hard.",
    )
    parser.add_argument(
        "log",
        type=Path,
        help="a CSV file, a CSVLogger's folder, TensorBoard's or a W&B run's folder, MLflow's "
        "database file or mlruns folder",
    )
    parser.add_argument(
        "--loss",
        nargs="+",
        metavar="COLUMN",
        help="names in the log; default: the only one with 'loss' in its name",
    )
    for name, default in DEFAULTS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=default, help="default: %(default)g")
    parser.add_argument("--run", metavar="ID", help="which run, where MLflow has several")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(FIGURE),
        help=f"the figure's file, or a folder, which gets {FIGURE}; without a suffix, it is a PNG; "
        "default: %(default)s",
    )
    chosen = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    settings = {"num_stddev": chosen.num_stddev, "decay": chosen.decay}
    try:
        ALRC(**settings)
        losses, had_alrc = _losses(chosen.log, chosen.loss, chosen.run)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.exit(1, f"error: {error}\n")
    previews = [_previewed(name, logged, settings, had_alrc) for name, logged in losses.items()]
    for preview in previews:
        print(f"{preview}\n")
    print("What the log cannot show:")
    for caveat in dict.fromkeys(caveat for each in previews for caveat in each.caveats):
        print(f"  - {caveat}")
    print(f"\nTo train with these settings:\n{_code(previews)}\n")
    try:
        figure = _figure(previews, None)
    except ImportError as error:
        print(f"No figure: {error}")
        return
    output = chosen.output / FIGURE if chosen.output.is_dir() else chosen.output
    if not output.suffix:
        output = output.with_name(f"{output.name}.png")  # as savefig does
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"Drawn: {output}")


if __name__ == "__main__":
    main()
