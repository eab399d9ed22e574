import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from torchvision.io import decode_image

from examples.cifar10_supersampling.expansion import expand
from examples.cifar10_supersampling.report import drawings, published
from examples.cifar10_supersampling.report.__main__ import report as report_command
from examples.cifar10_supersampling.report.pages import write_report
from examples.cifar10_supersampling.report.rows import COLUMNS, read_rows
from examples.cifar10_supersampling.report.settings import settings_of
from examples.cifar10_supersampling.report.tables import (
    also_measured_table,
    comparison_table,
    paper_tables,
)
from examples.cifar10_supersampling.training import train
from examples.comparison.files import write_table
from examples.comparison.tables import markdown, overview_table
from tests.examples.comparison import made_up
from tests.examples.comparison.made_up import texts

REPOSITORY = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def row(method="none", seed=0, train_loss=1.0, **changes):
    """The content of a training's result.json."""
    measured = {
        "train_loss": train_loss,
        "test_error": train_loss,
        "test_mse": 0.5,
        "test_psnr": 20.0,
        "test_ssim": 0.75,
        "test_input_error": 2.5,
        "clipped": 40 if method.startswith("alrc") else None,
        "steps_survived": 60 if train_loss is None else 100,
        "seconds": 36.0,
    }
    setting = {
        "experiment": "quartic",
        "loss": "quartic",
        "batch_size": 1,
        "optimizer": "adam",
        "learning_rate": 1 / 1280,
        "outlier_kind": None,
        "outlier_fraction": 0.0,
        "width": 0.25,
        "steps": 100,
        "last_steps": 40,
        "precision": "32-true",
        "data": "photographs",
        "alrc_start": "first_losses",
    }
    given = {"method": method, "seed": seed} | setting | measured | changes
    return {column: given.get(column) for column in COLUMNS}


losses_of = partial(made_up.losses_of, row=row)
five_seeds = partial(made_up.five_seeds, row=row)


def saved(rows, folder, arrays=False):
    """Write the files of a grid with these rows. Returns its folder."""
    generator = np.random.default_rng(0)
    for number, each in enumerate(rows):
        run = folder / f"run-{number}"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(each))
        if arrays:
            loss = generator.lognormal(size=each["steps"]).astype(np.float32)
            loss[each["steps_survived"] :] = np.nan
            np.savez(run / "history.npz", loss=loss, threshold=np.full(each["steps"], np.inf))
            images = generator.random((3, 8, 3, 32, 32), dtype=np.float32)
            names = ("input", "output", "truth")
            np.savez(run / "images.npz", **dict(zip(names, images, strict=True)))
    return folder


def setting_of(rows, tmp_path):
    (setting,) = settings_of(read_rows(saved(rows, tmp_path / "results")))
    return setting


# The tables.


def test_the_papers_table_equals_a_table_made_by_hand(tmp_path):
    rows = [
        *losses_of("none", [0.5, 0.6, 0.7]),
        *losses_of("alrc2", [0.4, 0.4, 0.4]),
        *losses_of("none", [1.5, None, 1.5], batch_size=4),
        *losses_of("alrc2", [1.0, 2.0, 3.0], loss="squared", experiment="squared"),
        *losses_of("none", [None, 8.0], experiment="unstable", learning_rate=0.002),
        *losses_of("none", [8.0, 9.0], experiment="unstable", optimizer="sgd"),
        # The paper has no such trainings.
        *losses_of("none", [9.0], outlier_kind="noise", outlier_fraction=0.05),
        *losses_of("none", [9.0], experiment="outliers"),
    ]
    settings = settings_of(read_rows(saved(rows, tmp_path)))
    table, unstable = paper_tables(settings)
    assert table.columns == ["", "quartic, batch 1", "quartic, batch 4", "squared, batch 1"]
    assert texts(table) == {
        "none": ["60.0 ± 10.0", "lost 1 of 3", ""],
        "alrc2": ["40.0 ± 0.0", "", "200.0 ± 100.0"],
    }
    assert "last 40 training losses × 100" in table.notes[0]
    assert unstable.title == "Unstable learning rates, 100 steps, width 0.25, 32-true"
    assert unstable.columns[1:] == [
        "quartic, batch 1, adam 0.002",
        "quartic, batch 1, sgd 0.000781",
    ]
    assert texts(unstable) == {"none": ["lost 1 of 2", "850.0 ± 70.7"]}


def test_papers_table_counts_each_training_once(tmp_path):
    rows = [
        each
        for experiment in ("squared", "quartic")
        for each in losses_of("none", [0.5, 0.6, 0.7], experiment=experiment, loss="quartic")
    ]
    (table,) = paper_tables(settings_of(read_rows(saved(rows, tmp_path))))
    assert texts(table) == {"none": ["60.0 ± 10.0"]}


def test_the_table_of_other_measures_leaves_out_a_figure_that_a_lost_training_lacks(tmp_path):
    rows = [*losses_of("norm", [1.0, 2.0]), *losses_of("none", [None, 1.0])]
    rows[2]["test_psnr"] = None
    found = also_measured_table(setting_of(rows, tmp_path))
    psnr = found.columns.index("PSNR") - 1
    assert texts(found)["none"][psnr] == ""
    assert texts(found)["norm"][psnr].startswith("20")


def test_without_a_clipper_the_table_says_that_there_is_no_baseline(tmp_path):
    rows = [*losses_of("none", [1.0, 1.1]), *losses_of("alrc2", [0.5, 0.6])]
    setting = setting_of(rows, tmp_path)
    table = comparison_table(setting, "train_loss", None)
    assert table.columns == ["", "training loss", "against none", "verdict"]
    assert any(note.startswith("There is no gradient clipper") for note in table.notes)
    write_report(setting.rows, tmp_path / "report", None, "results")
    text = (tmp_path / "report/report.md").read_text()
    assert "Training loss against the baseline" in text
    assert "none 1.050" in text


def test_without_clipper_and_unprotected_training_the_report_has_no_overview(tmp_path):
    setting = setting_of(losses_of("alrc2", [0.5, 0.6]), tmp_path)
    write_report(setting.rows, tmp_path / "report", None, "results")
    assert "against the baseline" not in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize("start", ["first_losses", "authors"])
def test_the_report_says_how_alrc_started(tmp_path, start):
    rows = [row("alrc2", seed=0, alrc_start=start)]
    write_report(read_rows(saved(rows, tmp_path)), tmp_path / "report", None, "results")
    text = (tmp_path / "report/report.md").read_text()
    assert f"ALRC's start | {start.replace('_', ' ')}" in text
    assert "started from" not in text


def test_the_error_names_missing_packages_and_their_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"'pandas' is not installed.*\[report\]"):
        report_command(tmp_path)


def test_the_overview_has_a_row_for_each_setting(tmp_path):
    rows = five_seeds() + five_seeds(experiment="outliers", batch_size=8, outlier_kind="noise")
    rows += losses_of("alrc2", [1.0], loss="squared", experiment="squared")
    rows += losses_of("none", [None], loss="squared", experiment="squared")
    settings = settings_of(read_rows(saved(rows, tmp_path)))
    table = overview_table(settings, "train_loss", None)
    assert table.columns == ["", "best gradient clipper", "none", "alrc2", "alrc2+norm"]
    assert texts(table)["Squared, batch 1, adam 0.000781"] == ["", "lost 1 of 1", "", ""]
    assert len(table.rows) == 3
    assert table.rows[0][1].text.startswith("norm ")
    assert table.rows[0][3].bold
    against_alrc = overview_table(settings, "train_loss", "alrc2")
    assert against_alrc.columns == ["", "baseline", "none", "norm", "zclip", "alrc2+norm"]


def test_outliers_without_a_kind_count_as_no_outliers(tmp_path):
    rows = [row(seed=0, outlier_fraction=0.0), row(seed=1, outlier_fraction=0.05)]
    assert len(settings_of(read_rows(saved(rows, tmp_path)))) == 1


def test_titles_tell_settings_apart(tmp_path):
    rows = [
        row(),
        row(steps=200),
        row(outlier_kind="hot_pixels", outlier_fraction=0.05),
        row(loss="squared"),
    ]
    titles = {setting.title for setting in settings_of(read_rows(saved(rows, tmp_path)))}
    assert titles == {
        "Quartic, batch 1, adam 0.000781, steps 100",
        "Quartic, batch 1, adam 0.000781, steps 200",
        "Quartic, batch 1, adam 0.000781, hot pixels 5 %",
        "Squared, batch 1, adam 0.000781",
    }


# Where rows come from.


def test_a_csv_file_has_the_same_rows_as_the_folder(tmp_path):
    rows = five_seeds() + five_seeds(outlier_kind="noise", outlier_fraction=0.05)
    rows += losses_of("value", [None, 1.0])
    write_table(saved(rows, tmp_path))
    of_folder = read_rows(tmp_path).drop(columns="folder")
    of_file = read_rows(tmp_path / "results.csv")
    assert of_file["folder"].isna().all()
    order = ["method", "seed", "outlier_kind"]
    pd.testing.assert_frame_equal(
        of_file.drop(columns="folder").sort_values(order, ignore_index=True),
        of_folder.sort_values(order, ignore_index=True),
        check_dtype=False,
    )


def test_a_csv_file_has_exactly_the_same_numbers(tmp_path):
    losses = np.random.default_rng(0).lognormal(size=200).tolist()
    write_table(saved(losses_of("none", losses), tmp_path))
    folder, file = (read_rows(path)["train_loss"] for path in (tmp_path, tmp_path / "results.csv"))
    assert sorted(folder) == sorted(file)


def test_an_infinite_loss_counts_as_a_lost_training(tmp_path):
    write_table(saved(losses_of("none", [1.0, 12345.0]), tmp_path))
    path = tmp_path / "results.csv"
    path.write_text(path.read_text().replace("12345.0", "inf"))
    (setting,) = settings_of(read_rows(path))
    assert setting.lost("train_loss") == {"none": (1, 2)}


def test_ones_own_method_may_be_named_null(tmp_path):
    write_table(saved([row("null"), row("None", seed=1)], tmp_path))
    assert set(read_rows(tmp_path / "results.csv")["method"]) == {"null", "None"}


def test_wrong_sources_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_rows(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no <run name>/result\.json"):
        read_rows(tmp_path)
    (tmp_path / "other.csv").write_text("method,seed\nnone,0\n")
    with pytest.raises(ValueError, match=r"lacks \['experiment', 'loss'"):
        read_rows(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(seed=3), row(seed=3)], "one row for each setting, method and seed, got several"),
        ([row(), row(seed=1, precision=None)], r"must have a value for \['precision'\]"),
        ([row(train_loss=-1.0)], r"train_loss must be above 0, got -1\.0"),
    ],
)
def test_wrong_rows_raise(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_rows(saved(rows, tmp_path))


@pytest.mark.parametrize("column", ["test_error", "ema_test_error"])
def test_a_test_error_that_is_not_above_0_raises(column, tmp_path):
    with pytest.raises(ValueError, match=rf"{column} must be above 0, got -1\.0"):
        read_rows(saved([row(**{column: -1.0})], tmp_path))


# The figures.


def test_curves_end_where_weights_were_lost(tmp_path):
    rows = [*losses_of("none", [1.0, None]), *losses_of("norm", [1.0, 1.0])]
    (setting,) = settings_of(read_rows(saved(rows, tmp_path, arrays=True)))
    (axes,) = drawings.curves(setting).axes
    assert axes.get_yscale() == "log"
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert np.isfinite(lines["norm"]).all()
    known = np.isfinite(lines["none"][:, 1])
    assert lines["none"][known, 0].max() < 65
    (cross,) = (line for line in axes.lines if line.get_marker() == "x")
    assert cross.get_xydata().tolist() == [lines["none"][known][-1].tolist()]


def test_curves_are_medians_of_the_seeds(tmp_path):
    folder = saved(losses_of("norm", [1.0, 1.0, 1.0]), tmp_path)
    for number, loss in enumerate((1.0, 2.0, 60.0)):
        np.savez(folder / f"run-{number}/history.npz", loss=np.full(100, loss, np.float32))
    (setting,) = settings_of(read_rows(folder))
    (axes,) = drawings.curves(setting).axes
    (line,) = (each for each in axes.lines if each.get_label() == "norm")
    np.testing.assert_allclose(line.get_ydata(), 2.0)


def test_all_images_come_from_one_seed(tmp_path, monkeypatch):
    folder = saved(losses_of("norm", [1.0, 1.0]), tmp_path, arrays=True)
    (setting,) = settings_of(read_rows(folder))
    shown = []
    monkeypatch.setattr(drawings, "draw_images", shown.append)
    drawings.images(setting)
    with np.load(folder / "run-0" / "images.npz") as expected:
        np.testing.assert_array_equal(shown[0]["norm"], expected["output"])
        np.testing.assert_array_equal(shown[0]["truth"], expected["truth"])


def test_points_are_all_trainings_and_their_means(tmp_path):
    rows = [*losses_of("norm", [1.0, 2.0, 3.0]), *losses_of("none", [None, 1.0])]
    panels = drawings.points(setting_of(rows, tmp_path)).axes
    assert len(panels) == 2
    for axes in panels:
        (drawn,) = (each for each in axes.collections if isinstance(each, PathCollection))
        assert sorted(drawn.get_offsets()[:, 0]) == [1.0, 2.0, 3.0]
        assert [text.get_text() for text in axes.texts] == ["lost 1 of 2"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["norm", "none"]


def test_a_logarithmic_axis_has_enough_ticks(tmp_path):
    rows = [*losses_of("norm", [1.0, 1.1, 1.2]), *losses_of("none", [3.9, 4.0, 4.1])]
    figure = drawings.points(setting_of(rows, tmp_path))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    shown = [
        each.get_text() for each in axes.get_xticklabels() if low <= each.get_position()[0] <= high
    ]
    assert shown == ["1", "2"]
    assert not any(each.get_text() for each in axes.get_xticklabels(minor=True))


# The pages.


class Page(HTMLParser):
    """The references of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.sources, self.links, self.text = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "src":
                self.sources.append(value)
            elif name == "href":
                self.links.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two settings with all kinds of content."""
    folder = tmp_path_factory.mktemp("report")
    rows = five_seeds() + five_seeds(
        experiment="outliers", batch_size=8, outlier_kind="hot_pixels", outlier_fraction=0.05
    )
    rows += losses_of("value", [None, 1.0, 1.0, 1.0, 1.0])
    read = read_rows(saved(rows, folder / "results", arrays=True))
    write_report(read, folder / "report", None, "results")
    return folder / "report"


def test_a_page_refers_to_no_other_file(report):
    html = (report / "report.html").read_text()
    page = Page(html)
    assert len(page.sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(link.startswith("#") and f'id="{link[1:]}"' in html for link in page.links)
    assert "url(" not in html


def test_both_pages_say_the_same(report):
    page = Page((report / "report.html").read_text()).text.replace("\N{NO-BREAK SPACE}", " ")
    lines = (report / "report.md").read_text().splitlines()
    cells = {
        cell.strip(" *")
        for line in lines
        if line.startswith("|") and "---" not in line
        for cell in line.split("|")
    }
    assert "lost 1 of 5" in cells
    assert len(cells) > 60
    assert all(cell in page for cell in cells)


def test_markdown_refers_to_its_figures(report):
    markdown = (report / "report.md").read_text()
    figures = sorted(report.glob("*.png"))
    assert len(figures) == 6
    for path in figures:
        assert f"]({path.name})" in markdown
        picture = decode_image(str(path))
        assert min(picture.shape[1:]) > 100
        assert picture.float().std() > 1


def test_tables_have_a_cell_in_every_column(report):
    widths = []
    for line in (report / "report.md").read_text().splitlines():
        if line.startswith("|"):
            widths.append(line.count("|"))
        elif widths:
            assert len(set(widths)) == 1
            widths = []


def test_without_arrays_the_page_says_which_figures_are_left_out(tmp_path):
    write_report(read_rows(saved(five_seeds(), tmp_path / "results")), tmp_path, None, "results")
    markdown = (tmp_path / "report.md").read_text()
    assert "No curves: there is no history.npz beside these rows." in markdown
    assert "No images: there is no images.npz beside these rows." in markdown
    assert [path.name for path in tmp_path.glob("*.png")] == [
        "quartic-batch-1-adam-0.000781-methods.png"
    ]


def test_an_unknown_baseline_raises(tmp_path):
    rows = read_rows(saved(five_seeds(), tmp_path / "results"))
    with pytest.raises(
        ValueError, match=r"baseline must be one of the methods, \['alrc2', .*'abc'"
    ):
        write_report(rows, tmp_path / "report", "abc", "results")
    assert not (tmp_path / "report").exists()


def test_hours_are_computed_from_seconds(tmp_path):
    rows = read_rows(saved(losses_of("none", [1.0, 2.0], seconds=5400.0), tmp_path / "results"))
    write_report(rows, tmp_path, "none", "results")
    assert "2, 3.0 hours together" in (tmp_path / "report.md").read_text()


MEASURE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.body.innerText = JSON.stringify({
    width: document.documentElement.scrollWidth,
    window: document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight,
    images: images.length,
    shown: images.filter(image => image.complete && image.naturalWidth > 100).length,
  });
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1200, 600])
def test_page_is_shown_by_chromium(report, tmp_path, width):
    def chromium(page, *arguments):
        with tempfile.TemporaryDirectory() as profile:
            command = [
                CHROMIUM,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking"),
                *("--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"),
                *(f"--window-size={width},3000", *arguments, page.as_uri()),
            ]
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    chromium(report / "report.html", f"--screenshot={tmp_path / 'page.png'}")
    picture = decode_image(str(tmp_path / "page.png"))[:3].float()
    assert picture.shape[1:] == (3000, width)
    # Every part of the page has text or drawings, from top to bottom.
    assert all(part.std() > 5 for part in picture.chunk(6, dim=1))

    measured = tmp_path / "measured.html"
    measured.write_text((report / "report.html").read_text() + MEASURE)
    shown = chromium(measured, "--dump-dom").stdout
    found = json.loads(re.search(r"<body>({.*})", shown)[1])
    assert found["images"] == found["shown"] == 6
    assert found["width"] <= found["window"]
    assert found["height"] > 3000


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.usefixtures("few_images")
def test_command_reports_on_trainings_of_the_grid(tmp_path, monkeypatch, capsys):
    runs = expand(
        experiments=["outliers"],
        methods=["norm", "alrc2"],
        seeds=[0, 1],
        steps=10,
        width=0.05,
        precision="32-true",
        average=False,
        data="photographs",
        root=tmp_path,
    )
    for run in runs:
        train(run, tmp_path / "grid")
    write_table(tmp_path / "grid")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "grid", "--baseline", "norm"])
    capsys.readouterr()
    runpy.run_module("examples.cifar10_supersampling.report", run_name="__main__")
    printed = capsys.readouterr()
    assert "Warning" not in printed.err
    assert "Written to report" in printed.out
    of_folder = (tmp_path / "report" / "report.md").read_text()
    assert "mean of 2 seeds" in of_folder
    drawn = {path.stem.split("-")[-1] for path in (tmp_path / "report").glob("*.png")}
    assert drawn == {"methods", "curves", "images"}

    # The rows alone give the same tables.
    write_report(read_rows(tmp_path / "grid/results.csv"), tmp_path / "of_table", "norm", "grid")
    of_table = (tmp_path / "of_table" / "report.md").read_text()
    assert [line for line in of_table.splitlines() if line.startswith("|")] == [
        line for line in of_folder.splitlines() if line.startswith("|")
    ]


def test_the_page_on_the_published_form_has_the_tables_of_the_rows():
    page = (REPOSITORY / "docs" / "what-the-authors-ran.md").read_text()
    tables = published.tables()
    for table in tables:
        lines = [line for line in markdown(table, 3).splitlines() if line.startswith("|")]
        assert "\n".join(lines) in page
    # Every published method was run in every setting of at least the tables without norm clipping.
    for table in tables[::2]:
        rows = [row for row in table.rows if row[0].text.startswith("published")]
        assert len(rows) == 3
        assert all(cell.text and "seeds" not in cell.text for row in rows for cell in row)
