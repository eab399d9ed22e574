from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples.cifar10_supersampling import results
from examples.cifar10_supersampling.command_line import CONFIGS
from examples.cifar10_supersampling.published import PublishedALRC
from examples.cifar10_supersampling.training import train

VARIANTS = ("logarithms2", "quantile0.5")

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loss_clipping_clips_a_training(name, make_run, tmp_path):
    changes = {"steps": 40, "every_image": True}
    run = make_run(method=str(CONFIGS / "variants" / f"{name}.yaml"), **changes)
    plain = make_run(**changes)
    for each in (run, plain):
        train(each, tmp_path)
    result, unprotected = (results.load(tmp_path / each.name) for each in (run, plain))
    losses, threshold = result.history["image_loss"], result.history["threshold"]
    above = losses > threshold[:, None]
    assert result.row["clipped"] == above.sum() > 0
    # The first clip is the first step whose gradient differs.
    first = int(above.any(axis=1).argmax())
    theirs = unprotected.history["image_loss"]
    np.testing.assert_array_equal(losses[: first + 1], theirs[: first + 1])
    assert (losses[first + 1 :] != theirs[first + 1 :]).any()


def test_a_device_without_float64_is_refused():
    module = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(ValueError, match="accelerator: these trainings need float64"):
        PublishedALRC().on_train_start(None, module)
