"""Weights & Biases views of what ``ALRCCallback`` logs, and a sweep over its ``num_stddev``.

``python -m lightning_alrc.wandb create-workspace --entity ENTITY --project PROJECT``

``python -m lightning_alrc.wandb create-report --entity ENTITY --project PROJECT``

``python -m lightning_alrc.wandb sweep-config --metric val_loss -- python train.py > sweep.yaml``

The first two commands need the extra ``workspace``: ``pip install 'lightning-alrc[workspace]'``.
The import of this module works without the extra.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_alrc._telemetry.chart_definitions import CHARTS
from lightning_alrc._telemetry.sweeps import NUM_STDDEVS, sweep
from lightning_alrc._telemetry.wandb_dashboard import SPIKES, STEP, prefixed
from lightning_alrc._trainer.named_losses import RETURNED, NamedLosses, metric_name

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import LinePlot, Report  # type: ignore[attr-defined]
    from wandb_workspaces.workspaces import Section, Workspace

__all__ = ["main", "report", "sweep", "workspace"]

TITLE = "Adaptive learning rate clipping"
SPIKED = "which samples spiked"

INTRODUCTION = (
    "A loss that lies more than a number of standard deviations above its running mean is "
    "clipped: it is scaled down to that threshold, and its gradient by the same factor. Each line "
    "is one run."
)


def workspace(
    entity: str,
    project: str,
    losses: Iterable[str] = (RETURNED,),
    name: str = TITLE,
    prefix: str = "",
) -> Workspace:
    """A workspace with one section for each loss, and one for the table of spikes.

    Call its method ``save()`` to save it.

    >>> workspace("me", "digits", ["generator", "critic"]).save()  # doctest: +SKIP

    Args:
        entity: the user or team on W&B that owns the project.
        project: the project's name.
        losses: names of losses, as given to :meth:`ALRCMixin.alrc`. ``"loss"``, the default, is the
            one that ``training_step`` returns.
        name: the view's title. W&B takes no emoji, currency or mathematical signs in it.
        prefix: the ``prefix`` of the project's WandbLoggers; default: none.

    Raises:
        ModuleNotFoundError: if wandb-workspaces is not installed.
        TypeError: if ``losses`` is no sequence, or a single string, or ``prefix`` is no string.
        ValueError: if W&B or :class:`ALRCCallback` does not allow a name.
    """
    losses = _checked(entity, project, losses, prefix)
    with _needs_workspaces():
        from pydantic import ValidationError
        from wandb_workspaces.workspaces import Workspace, WorkspaceSettings
    try:
        return Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=[*(_section(loss, prefix) for loss in losses), _section_of_spikes()],
            settings=WorkspaceSettings(x_axis=STEP),
        )
    except ValidationError as error:  # all arguments except the title are checked above
        raise ValueError(
            f"name must be without emoji, currency and mathematical signs, got {name!r:.200}"
        ) from error


def report(
    entity: str,
    project: str,
    losses: Iterable[str] = (RETURNED,),
    name: str = TITLE,
    prefix: str = "",
) -> Report:
    """A report on all runs of a project: the charts of each loss, the spikes, and the settings.

    Call its method ``save()`` to save it. The project must exist by then.

    >>> report("me", "digits", ["generator", "critic"]).save()  # doctest: +SKIP

    Args:
        entity: the user or team on W&B that owns the project.
        project: the project's name.
        losses: as for :func:`workspace`.
        name: the report's title, of up to 128 characters.
        prefix: as for :func:`workspace`.

    Raises:
        ModuleNotFoundError: if wandb-workspaces is not installed.
        TypeError: if ``losses`` is no sequence, or a single string, or ``prefix`` is no string.
        ValueError: if W&B or :class:`ALRCCallback` does not allow a name.
    """
    losses = _checked(entity, project, losses, prefix)
    if not isinstance(name, str) or not 1 <= len(name.strip()) <= 128:
        raise ValueError(f"name must be a title of 1 to 128 characters, got {name!r:.200}")
    with _needs_workspaces():
        from wandb_workspaces.reports.v2 import (  # type: ignore[attr-defined]
            H2,
            P,
            PanelGrid,
            Report,
            RunComparer,
            Runset,
            WeavePanelSummaryTable,
        )
    blocks: list[Any] = [P(INTRODUCTION)]
    contents = [
        *((_heading(loss), _line_plots(loss, prefix)) for loss in losses),
        (SPIKED.capitalize(), [WeavePanelSummaryTable(table_name=SPIKES)]),
        ("Settings in which the runs differ", [RunComparer(diff_only=True)]),
    ]
    for heading, panels in contents:
        runs = Runset(entity=entity, project=project)
        blocks += [H2(heading), PanelGrid(runsets=[runs], panels=panels)]
    return Report(entity=entity, project=project, title=name, blocks=blocks)


@contextmanager
def _needs_workspaces() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a W&B view needs {error.name}: pip install 'lightning-alrc[workspace]'"
        ) from error


def _heading(loss: str) -> str:
    return TITLE if loss == RETURNED else f"{TITLE}: {loss}"


def _line_plots(loss: str, prefix: str) -> list[LinePlot]:
    """A line plot for each chart of a loss."""
    from wandb_workspaces.reports.v2 import LinePlot  # type: ignore[attr-defined]

    return [
        LinePlot(
            title=chart.title,
            x=STEP,
            y=[prefixed(prefix, metric_name(loss, metric)) for metric in chart.metrics],
            title_x="training step",
            title_y=chart.unit,
            log_y=chart.log_scale,
        )
        for chart in CHARTS
    ]


def _section(loss: str, prefix: str) -> Section:
    from wandb_workspaces.workspaces import Section, SectionPanelSettings

    return Section(
        name=_heading(loss),
        is_open=True,
        panel_settings=SectionPanelSettings(x_axis=STEP),
        panels=_line_plots(loss, prefix),
    )


def _section_of_spikes() -> Section:
    from wandb_workspaces.reports.v2 import WeavePanelSummaryTable  # type: ignore[attr-defined]
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings

    return Section(
        name=f"{TITLE}: {SPIKED}",
        is_open=True,
        layout_settings=SectionLayoutSettings(columns=1, rows=1),  # a table is wide
        panels=[WeavePanelSummaryTable(table_name=SPIKES)],
    )


def _checked(entity: Any, project: Any, losses: Iterable[str], prefix: Any) -> list[str]:
    """Check the arguments that all views have, and return the names of the losses."""
    _check_name("entity", entity)
    _check_name("project", project)
    losses = _checked_losses(losses)
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {prefix!r:.100}")
    return losses


def _check_name(argument: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[^/\\#?%:\n]{1,128}", value.strip()):
        raise ValueError(
            rf"{argument} must be a name of 1 to 128 characters, without / \ # ? % : "
            f"and line breaks, got {value!r:.200}"
        )


def _checked_losses(losses: Iterable[str]) -> list[str]:
    """Each loss once, in the order given."""
    if isinstance(losses, str):
        raise TypeError(f"losses must be a sequence of names, got the string {losses!r:.200}")
    try:
        names = list(losses)
    except TypeError:
        raise TypeError(f"losses must be a sequence of names, got {losses!r:.200}") from None
    if not names:
        raise ValueError("losses must name one loss at least, got none")
    return list(NamedLosses({}, {name: {} for name in names}))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        SystemExit: with status 2 if an argument is wrong, and with status 1 if the extra is missing
            or the view could not be saved. The last line on standard error says why.
    """
    parser = argparse.ArgumentParser("python -m lightning_alrc.wandb")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # A report has no --dry-run: its JSON needs the project's number, which only the server knows.
    workspace_command = _add_view(commands, "workspace", "view", workspace)
    workspace_command.add_argument(
        "--dry-run", action="store_true", help="print the view's JSON and contact nobody"
    )
    _add_view(commands, "report", "report", report)
    _add_sweep(commands)
    chosen = parser.parse_args(arguments)
    chosen.run(chosen)


def _add_view(commands: Any, kind: str, what: str, make: Callable[..., Any]) -> Any:
    """Add the command that creates a workspace or a report, and return it."""
    command = commands.add_parser(
        f"create-{kind}",
        help=f"save a {what} of ALRC's metrics in a project",
        description=f"Saves a {what} of ALRC's metrics in a project on W&B, and prints its URL. "
        f"Each call makes a new {what}.",
    )
    command.add_argument("--entity", required=True, help="the project's user or team")
    command.add_argument("--project", required=True)
    command.add_argument(
        "--loss",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"names of the losses to show; default: {RETURNED!r}, the one that training_step "
        "returns",
    )
    command.add_argument("--name", default=TITLE, metavar="TITLE", help="default: %(default)s")
    command.add_argument(
        "--prefix", default="", help="the prefix of the project's WandbLoggers, if they have one"
    )
    command.set_defaults(run=lambda chosen: _create(command, what, make, chosen), dry_run=False)
    return command


def _create(command: Any, what: str, make: Callable[..., Any], chosen: Any) -> None:
    """Save a workspace or a report, and print its URL."""
    try:
        losses = chosen.loss or (RETURNED,)
        view = make(chosen.entity, chosen.project, losses, chosen.name, chosen.prefix)
    except ValueError as error:
        command.error(str(error))
    except ModuleNotFoundError as error:
        command.exit(1, f"error: {error}\n")
    if chosen.dry_run:
        print(json.dumps(view._spec, indent=2))
        return
    os.environ.setdefault("WANDB_SILENT", "true")  # only the URL is printed
    try:
        view.save()
        url = view.url
    except Exception as error:  # the client's errors have no base class of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        command.exit(1, f"error: W&B did not save the {what}: {reason}\n")
    print(url)


def _add_sweep(commands: Any) -> None:
    """Add the command that prints the configuration of a sweep."""
    command = commands.add_parser(
        "sweep-config",
        help="print the configuration of a sweep over num_stddev",
        description="Prints the configuration of a W&B sweep over num_stddev, for `wandb sweep`. "
        "The program needs no change: each run gets its num_stddev by the environment variable "
        "LIGHTNING_ALRC. It must log through a WandbLogger, and have no ALRCCallback of its own "
        "unless --option is given.",
    )
    command.add_argument(
        "--metric", required=True, help="what the runs are compared by, such as val_loss"
    )
    command.add_argument(
        "--goal", choices=("minimize", "maximize"), default="minimize", help="default: %(default)s"
    )
    command.add_argument(
        "--values",
        type=float,
        nargs="+",
        default=NUM_STDDEVS,
        metavar="NUM_STDDEV",
        help="default: " + " ".join(map(str, NUM_STDDEVS)),
    )
    command.add_argument(
        "--option",
        help="the option by which the program itself takes num_stddev, without leading dashes",
    )
    command.add_argument(
        "command",
        nargs="+",
        help="what starts the program, after --, as in -- python train.py --epochs 9",
    )
    command.set_defaults(run=lambda chosen: _print_sweep(command, chosen))


def _print_sweep(command: Any, chosen: Any) -> None:
    import yaml  # type: ignore[import-untyped]

    try:
        config = sweep(chosen.command, chosen.metric, chosen.goal, chosen.values, chosen.option)
    except ValueError as error:
        command.error(str(error))
    print(yaml.safe_dump(config, sort_keys=False), end="")


if __name__ == "__main__":
    main()
