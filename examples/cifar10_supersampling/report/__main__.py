"""``python -m examples.cifar10_supersampling.report``: a grid's rows as a report."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from ...comparison.extras import imported


def report(results: Path, output: Path = Path("report"), baseline: str | None = None) -> None:
    """Compare the methods of a grid: report.md, report.html and their figures.

    Args:
        results: the grid's folder of results, or a CSV file of the same rows, which has no
            learning curves and no images.
        output: directory that the report is written to.
        baseline: the method that others are compared with, besides "none"; default: each setting's
            best gradient clipper.
    """
    for package in ("pandas", "scipy", "jinja2"):
        imported(package, "report")
    from .pages import write_report
    from .rows import read_rows

    write_report(read_rows(results), output, baseline, results.name)
    print(f"Written to {output}: report.html, report.md and their figures")


if __name__ == "__main__":
    auto_cli(report, prog="python -m examples.cifar10_supersampling.report")
