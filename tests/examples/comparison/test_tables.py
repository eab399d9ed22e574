import pytest
from rich.console import Console

from examples.comparison import tables
from examples.comparison.differences import Difference
from tests.examples.comparison.made_up import bold, five_seeds, losses_of, row, setting_of, texts


def test_a_tiny_p_value_is_shown_as_a_bound():
    found = Difference(5, 0.5, 0.4, 0.6, 1e-9, 1e-8)
    assert tables.verdict(found).text == "lower, p < 0.001"


def test_methods_are_compared_with_the_best_clipper_and_with_none():
    table = tables.comparison_table(setting_of(five_seeds()), "train_loss", None)
    assert table.columns == [
        "",
        "training loss",
        "against norm",
        "verdict",
        "against none",
        "verdict",
    ]
    rows = texts(table)
    assert list(rows) == ["alrc2+norm", "alrc2", "norm", "zclip", "none"]
    assert rows["norm"][1:3] == ["baseline", ""]
    assert rows["none"][3:] == ["baseline", ""]
    assert rows["alrc2"][2].startswith("lower, p ")
    assert rows["none"][1].startswith("× 4.0")
    assert rows["none"][2].startswith("higher, p ")
    assert bold(table) == {"alrc2+norm"}


def test_the_figures_of_a_comparison_are_those_computed_by_hand():
    rows = [*losses_of("norm", [1.0, 2.0, 3.0]), *losses_of("alrc2", [0.5, 1.0, 2.0])]
    setting = setting_of(rows)
    rows = texts(tables.comparison_table(setting, "test_error", None))
    # The standard errors are 0.5774 and 0.4410. The 0.975 quantile of t with 2 degrees of freedom
    # is 4.3027.
    assert rows["norm"][0] == "2.000 ± 2.484"
    assert rows["alrc2"][0] == "1.167 ± 1.897"
    # Logarithms differ by -0.6931 twice and by -0.4055 once. Their mean is -0.5973, its standard
    # error 0.0959, and t -6.23.
    assert rows["alrc2"][1] == "−45.0 % (−63.6 to −16.9)"
    assert rows["alrc2"][2] == "lower, p 0.025"


def test_a_difference_that_may_be_chance_is_named_so_and_is_bold_like_the_best():
    rows = [*losses_of("norm", [1.0, 1.1, 0.9, 1.0]), *losses_of("alrc2", [0.9, 1.2, 0.8, 1.1])]
    setting = setting_of(rows)
    table = tables.comparison_table(setting, "train_loss", None)
    assert texts(table)["alrc2"][2].startswith("inside the noise, p ")
    assert bold(table) == {"norm", "alrc2"}
    overview = tables.overview_table([setting], "train_loss", None)
    assert overview.rows[0][2].text.endswith(" %, noise")


def test_a_method_that_lost_a_training_has_no_mean():
    rows = [*five_seeds(), *losses_of("value", [0.1, None, 0.1, None, 0.1])]
    # An average of the weights before they were lost may test well.
    rows[-2]["test_error"] = 0.1
    setting = setting_of(rows)
    for measure in setting.measures:
        table = tables.comparison_table(setting, measure, None)
        assert texts(table)["value"] == ["lost 2 of 5", "", "lost 2 of 5", "", "lost 2 of 5"]
        assert setting.best_clipper(measure) == "norm"
        assert "value" not in bold(table)


def test_a_baseline_that_lost_trainings_is_no_baseline():
    rows = [each for each in five_seeds() if each["method"] != "none"]
    rows += losses_of("none", [None, None])
    table = tables.comparison_table(setting_of(rows), "train_loss", None)
    assert table.columns == ["", "training loss", "against norm", "verdict"]
    assert "No comparison with none: it lost 2 of 2." in table.notes


def test_the_table_says_that_a_baseline_was_not_run():
    rows = [each for each in five_seeds() if each["method"] != "none"]
    table = tables.comparison_table(setting_of(rows), "train_loss", "agc")
    assert table.columns == ["", "training loss"]
    assert "No comparison with agc: it was not run in this setting." in table.notes
    assert "No comparison with none: it was not run in this setting." in table.notes


def test_a_table_of_one_seed_has_no_interval_no_verdict_and_no_best():
    rows = [row("none", train_loss=2.0), row("norm", train_loss=1.0), row("alrc2", train_loss=0.9)]
    setting = setting_of(rows)
    table = tables.comparison_table(setting, "train_loss", None)
    assert texts(table)["alrc2"] == [
        "0.900",
        "−10.0 %",
        "one seed: unknown",
        "−55.0 %",
        "one seed: unknown",
    ]
    assert bold(table) == set()
    assert "cannot tell a difference from chance" in table.notes[0]


def test_an_overview_of_one_seed_has_no_verdict():
    rows = [row("norm", train_loss=1.0), row("alrc2", train_loss=0.9)]
    overview = tables.overview_table([setting_of(rows)], "train_loss", None)
    assert overview.rows[0][2].text == "−10.0 %, one seed: unknown"


def test_a_figure_of_fewer_seeds_says_how_many():
    rows = [*losses_of("norm", [1.0, 1.1, 1.2]), *losses_of("alrc2", [0.5, 0.6])]
    rows += [row("zclip", seed=7, train_loss=2.0)]
    rows = texts(tables.comparison_table(setting_of(rows), "train_loss", "norm"))
    assert rows["alrc2"][0].endswith(", 2 seeds")
    assert rows["zclip"] == ["2.000, 1 seed", "", "no seed in common"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.00012, "0.00012"),
        (0.0123, "0.012"),
        (1.2345, "1.234"),
        (12.345, "12.35"),
        (1234.5, "1,234"),
        (123456.0, "1.23e+05"),
        (1e30, "1e+30"),
    ],
)
def test_numbers_have_about_four_digits(value, told):
    assert tables.number(value) == told


def test_the_table_of_other_measures_leaves_out_empty_columns():
    rows = [*losses_of("norm", [1.0, 2.0], other=3.0), *losses_of("alrc2", [0.5, None], other=None)]
    rows = [each | {"never": None} for each in rows]
    table = tables.also_measured_table(setting_of(rows), {"other": "another", "never": "no"}, [])
    assert table.columns == ["", "another"]
    assert texts(table) == {"norm": ["3.000 ± 0.000"], "alrc2": [""]}


def test_markdown_and_terminal_say_the_same():
    table = tables.comparison_table(setting_of(five_seeds()), "train_loss", None)
    text = tables.markdown(table, 3)
    heading, empty, columns, line, *rows = text.splitlines()
    assert (heading, empty) == ("### Training loss", "")
    assert columns == "|  | training loss | against norm | verdict | against none | verdict |"
    assert line == "|---|---|---|---|---|---|"
    cells = [[cell.strip(" *") for cell in row.split("|")[1:-1]] for row in rows[:5]]
    assert cells == [[cell.text for cell in row] for row in table.rows]
    assert "**" in rows[0]
    assert "**" not in rows[1]
    assert "\n".join(table.notes) in text

    console = Console(width=200)
    with console.capture() as capture:
        console.print(tables.printed(table))
    for cells in table.rows:
        for cell in cells:
            assert cell.text in capture.get()
