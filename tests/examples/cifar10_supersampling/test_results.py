import numpy as np
import pytest

from examples.cifar10_supersampling import results
from examples.cifar10_supersampling.results import Result
from examples.comparison import files


def made_up(**changes):
    return Result(
        row={"method": "alrc2", "seed": 0, "train_loss": 1.5, "clipped": None} | changes,
        history={"loss": np.arange(4, dtype=np.float32)},
        images={"input": np.zeros((8, 3, 32, 32), dtype=np.float32)},
    )


def save(output, name, **changes):
    (output / name).mkdir()
    results.save(output / name, made_up(**changes))


def test_loading_returns_the_saved_result(tmp_path):
    assert not files.is_finished(tmp_path / "a")
    save(tmp_path, "a")
    assert files.is_finished(tmp_path / "a")
    loaded = results.load(tmp_path / "a")
    assert loaded.row == made_up().row
    np.testing.assert_array_equal(loaded.history["loss"], made_up().history["loss"])
    assert loaded.images["input"].shape == (8, 3, 32, 32)


def test_the_row_is_written_last(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        results.save(tmp_path / "a", made_up())
    assert not files.is_finished(tmp_path / "a")
