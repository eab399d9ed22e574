"""``Drawing``: draws a fit's charts, once for each package whose figures a dashboard shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from lightning_alrc._spikes.record import Spike
from lightning_alrc._telemetry.dashboards import Dashboard

__all__ = ["Drawing"]


class Drawing:
    """Draws a Plotly figure for dashboards that can show one, and a Matplotlib figure for others.

    If Plotly is not installed, Matplotlib draws all figures. If Matplotlib is not installed,
    dashboards that cannot show a Plotly figure get no figure.

    Args:
        is_on: whether anything is drawn.
    """

    def __init__(self, is_on: bool) -> None:
        self._packages = [name for name in ("plotly", "matplotlib") if is_on and find_spec(name)]

    def can_draw_for(self, dashboard: Dashboard) -> bool:
        """Whether a dashboard gets figures."""
        return self._package_of(dashboard) is not None

    def _package_of(self, dashboard: Dashboard) -> str | None:
        return next((name for name in self._packages if name in dashboard.figures), None)

    def figures(
        self,
        dashboards: Iterable[Dashboard],
        rows: list[dict[str, float]],
        spikes: list[Spike],
        count: int,
    ) -> Iterator[tuple[Any, list[Dashboard]]]:
        """Each figure, and the dashboards that are to show it.

        Args:
            dashboards: all dashboards.
            rows: the rows to draw, from :meth:`ChartRows.rows`.
            spikes: the worst clips.
            count: number of losses in the training.
        """
        by_package: dict[str, list[Dashboard]] = {}
        for dashboard in dashboards:
            package = self._package_of(dashboard)
            if package is not None:
                by_package.setdefault(package, []).append(dashboard)
        for package, group in by_package.items():
            yield _figure(package, rows, spikes, count), group


def _figure(package: str, rows: list[dict[str, float]], spikes: list[Spike], count: int) -> Any:
    # Imported only here, because each package takes seconds to import.
    if package == "plotly":
        from lightning_alrc._telemetry.interactive import interactive_charts

        return interactive_charts(rows, spikes, count)
    from lightning_alrc.plotting import draw_charts

    return draw_charts(rows, *([spikes] if spikes else []), count=count)
