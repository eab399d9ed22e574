"""A Weights & Biases workspace that shows the metrics of ``ALRCCallback``.

``python -m lightning_alrc.wandb create-workspace --entity ENTITY --project PROJECT``

The command needs ``pip install 'lightning-alrc[workspace]'``. Importing this module does not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_alrc._telemetry.chart_definitions import CHARTS
from lightning_alrc._telemetry.wandb_dashboard import SPIKES, STEP, prefixed
from lightning_alrc._trainer.named_losses import RETURNED, NamedLosses, metric_name

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

__all__ = ["main", "workspace"]

TITLE = "Adaptive learning rate clipping"


def workspace(
    entity: str,
    project: str,
    losses: Sequence[str] = (RETURNED,),
    name: str = TITLE,
    prefix: str = "",
) -> Workspace:
    """A workspace with one section for each loss, and one for the table of spikes.

    It is saved by its method ``save()``.

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
        TypeError: if ``losses`` is a single string, or ``prefix`` is no string.
        ValueError: if W&B or :class:`ALRCCallback` does not allow a name.
    """
    _check_place("entity", entity)
    _check_place("project", project)
    losses = _checked_losses(losses)
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {prefix!r:.100}")
    try:
        from pydantic import ValidationError
        from wandb_workspaces.workspaces import Workspace, WorkspaceSettings
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a W&B workspace needs {error.name}: pip install 'lightning-alrc[workspace]'"
        ) from error
    try:
        return Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=[*(_section(loss, prefix) for loss in losses), _section_of_spikes()],
            settings=WorkspaceSettings(x_axis=STEP),
        )
    except ValidationError as error:  # all but the title is checked above
        raise ValueError(
            f"name must be without emoji, currency and mathematical signs, got {name!r:.200}"
        ) from error


def _section(loss: str, prefix: str) -> Section:
    from wandb_workspaces.reports.v2 import LinePlot  # type: ignore[attr-defined]
    from wandb_workspaces.workspaces import Section, SectionPanelSettings

    return Section(
        name=TITLE if loss == RETURNED else f"{TITLE}: {loss}",
        is_open=True,
        panel_settings=SectionPanelSettings(x_axis=STEP),
        panels=[
            LinePlot(
                title=chart.title,
                x=STEP,
                y=[prefixed(prefix, metric_name(loss, metric)) for metric in chart.metrics],
                title_x="training step",
                title_y=chart.unit,
                log_y=chart.log_scale,
            )
            for chart in CHARTS
        ],
    )


def _section_of_spikes() -> Section:
    from wandb_workspaces.reports.v2 import WeavePanelSummaryTable  # type: ignore[attr-defined]
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings

    return Section(
        name=f"{TITLE}: which samples spiked",
        is_open=True,
        layout_settings=SectionLayoutSettings(columns=1, rows=1),  # a table is wide
        panels=[WeavePanelSummaryTable(table_name=SPIKES)],
    )


def _check_place(argument: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[^/\\#?%:\n]{1,128}", value.strip()):
        raise ValueError(
            rf"{argument} must be a name of 1 to 128 characters, none of them one of / \ # ? % :, "
            f"got {value!r:.200}"
        )


def _checked_losses(losses: Sequence[str]) -> list[str]:
    """Each loss once, in the order given."""
    if isinstance(losses, str):
        raise TypeError(f"losses must be a sequence of names, got the string {losses!r:.200}")
    if not losses:
        raise ValueError("losses must name one loss at least, got none")
    return list(NamedLosses({}, {name: {} for name in losses}))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        SystemExit: with status 2 if an argument is wrong, and with status 1 if the extra is missing
            or the view could not be saved. The last line on standard error says why.
    """
    parser = argparse.ArgumentParser("python -m lightning_alrc.wandb")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "create-workspace",
        help="save a view of ALRC's metrics in a project",
        description="Saves a view of ALRC's metrics in a project on W&B, and prints its URL. "
        "Each call makes a new view.",
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
    command.add_argument(
        "--dry-run", action="store_true", help="print the view's JSON and contact nobody"
    )
    chosen = parser.parse_args(arguments)
    try:
        losses = chosen.loss or (RETURNED,)
        view: Any = workspace(chosen.entity, chosen.project, losses, chosen.name, chosen.prefix)
    except ValueError as error:
        command.error(str(error))
    except ModuleNotFoundError as error:
        command.exit(1, f"error: {error}\n")
    if chosen.dry_run:
        print(json.dumps(view._spec, indent=2))
        return
    os.environ.setdefault("WANDB_SILENT", "true")  # nothing but the URL is to be printed
    try:
        view.save()
        url = view.url
    except Exception as error:  # the client's errors have no base class of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        command.exit(1, f"error: W&B did not save the view: {reason}\n")
    print(url)


if __name__ == "__main__":
    main()
