import json
import shutil

import numpy as np
import pytest
from torchvision.io import decode_image

from examples.comparison import files
from examples.partial_stem import compare as comparison
from examples.partial_stem.compare import compare
from examples.partial_stem.measuring import protections

STEPS = 40


def run(folder, output, **changes):
    arguments = {"data": "folder", "root": folder, "pattern": "truth-*", "steps": STEPS}
    arguments |= {"width": 1 / 64, "crop": 32, "workers": 1, "output": output}
    compare(**(arguments | changes))


@pytest.fixture(scope="module")
def written(folder_of_micrographs, tmp_path_factory):
    output = tmp_path_factory.mktemp("comparison")
    run(folder_of_micrographs, output, methods=["none", "alrc1", "norm"])
    return output


def test_each_training_has_a_row(written):
    rows = {row["method"]: row for row in files.read_rows(written)}
    assert set(rows) == {"none", "alrc1", "norm"}
    for row in rows.values():
        assert 0 < row["rms"] < 1000
        assert row["peak"] >= row["mse_outer"] > 0
        assert row["setting"] == "least_squares"
        assert row["pattern"] == "truth-*"
    assert rows["none"]["clipped"] is rows["norm"]["clipped"] is None
    assert rows["alrc1"]["clipped"] > 0
    assert len({row["rms"] for row in rows.values()}) == 3
    assert len({row["rms_errors"] for row in rows.values()}) == 3


def test_tables_and_figures_are_written(written):
    report = (written / "report.md").read_text()
    for title in ("least_squares: test error, %", "least_squares: also measured"):
        assert f"## {title}" in report
    assert "| nearest neighbour |" in report
    for name in ("curves.png", "images.png", "losses.png"):
        assert decode_image(str(written / name)).float().std() > 0


def test_the_same_seed_gives_the_same_results(written, folder_of_micrographs, tmp_path):
    run(folder_of_micrographs, tmp_path, methods=["alrc1"])
    (again,) = files.read_rows(tmp_path)
    (first,) = (row for row in files.read_rows(written) if row["method"] == "alrc1")
    assert again | {"seconds": 0} == first | {"seconds": 0}


def test_another_folder_of_images_is_refused_and_a_copy_is_not(
    written, folder_of_micrographs, tmp_path, monkeypatch
):
    monkeypatch.setattr(comparison, "save_figures", lambda *args: None)
    copy, other, output = (tmp_path / name for name in ("copy", "other", "output"))
    shutil.copytree(folder_of_micrographs, copy)
    shutil.copytree(folder_of_micrographs, other)
    # The file has the same name and size.
    np.save(other / "truth-1.npy", 1 - np.load(other / "truth-1.npy"))
    shutil.copytree(written, output)
    run(copy, output, methods=["none"])
    with pytest.raises(ValueError, match=r"made with images '3 files, .*', now it is '3 files, "):
        run(other, output, methods=["none"])
    # Rows of earlier releases have the root, and do not say which images they are of.
    path = output / "least_squares-none-seed0" / files.RESULT
    row = json.loads(path.read_text())
    del row["images"]
    files.write_json(path, row | {"root": "elsewhere"})
    run(other, output, methods=["none"])


def test_wasserstein_losses_are_compared(folder_of_micrographs, tmp_path):
    run(folder_of_micrographs, tmp_path, methods=["alrc3+norm"], adversarial="wasserstein")
    (row,) = files.read_rows(tmp_path)
    assert row["setting"] == "wasserstein"
    assert row["rms"] is not None


def test_a_method_becomes_arguments_of_the_module():
    assert protections("none")["num_stddev"] == float("inf")
    assert protections("alrc2.5+norm") == {"num_stddev": 2.5, "gradient_clip_val": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["zclip"]}, "methods must be none, norm, alrc and a number, .* got 'zclip'"),
        ({"methods": ["none", "none"]}, r"methods must be .*, each once, got \['none', 'none'\]"),
        ({"pattern": "none-*"}, "root must be a folder with micrographs"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"steps": 2}, "steps must be at least 3, .* got 2"),
        ({"crop": 100}, "crop must be a multiple of 32, got 100"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_trained(
    folder_of_micrographs, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        run(folder_of_micrographs, tmp_path, **changes)
    assert not list(tmp_path.iterdir())
