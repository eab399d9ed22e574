import pytest
import pytorch_lightning as pl
import torch

from examples.comparison.clippers import StepSkipping, ZClipping
from examples.comparison.methods import (
    alrc_of,
    check_method,
    clipped_by,
    huber_delta,
    protection,
    trainer,
    worst_ids,
)
from lightning_alrc import ALRCCallback


def test_methods_become_arguments_of_the_trainer():
    assert protection("none") == {"callbacks": []}
    assert protection("huber0.5") == {"callbacks": []}
    assert protection("norm") == {"callbacks": [], "gradient_clip_val": 1.0}
    (skip,) = protection("skip")["callbacks"]
    assert isinstance(skip, StepSkipping)
    both = protection("alrc1.5-token+norm", record=7)
    (alrc,) = both["callbacks"]
    assert isinstance(alrc, ALRCCallback)
    assert alrc.losses.settings["num_stddev"] == 1.5
    assert both["gradient_clip_val"] == 1.0


def test_the_delta_is_the_number_of_the_huber_loss():
    assert huber_delta("alrc2+huber0.5") == 0.5
    assert huber_delta("huber1+norm") == 1.0
    assert huber_delta("alrc2+norm") is None


@pytest.mark.parametrize("method", ["alrc2+norm", "huber0.25+norm", "alrc1.5-token", "none"])
def test_a_setting_has_its_own_methods_with_any_number_and_the_general_ones(method):
    check_method(method, "made up", ["none", "huber1", "alrc3-token+norm"])


def test_a_method_of_another_package_is_a_callback():
    pytest.importorskip("zclip")
    alrc, zclip = protection("alrc2+zclip")["callbacks"]
    assert isinstance(alrc, ALRCCallback)
    assert isinstance(zclip, ZClipping)


@pytest.mark.parametrize(
    "method", ["", "alrc", "alrc-token", "clip", "norm+", "alrc2 norm", "huber"]
)
def test_the_error_names_an_unknown_method(method):
    with pytest.raises(ValueError, match="methods must be none, norm, zclip"):
        protection(method)


class Line(pl.LightningModule):
    """A line through the origin, fitted at x = 1; each sample's loss is clipped by itself."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return (self.slope - batch["y"]).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-9)


def test_clips_are_counted_and_named():
    ids = ["a", "b", "c", "d"]
    batches = [{"y": torch.full((4,), 1 + 0.1 * (step % 3)), "id": ids} for step in range(40)]
    batches[20]["y"] = torch.tensor([1.0, 100.0, 1.0, 50.0])
    told = []
    training = trainer("alrc3", 30, record=2, report=told.append)
    training.fit(Line(), torch.utils.data.DataLoader(batches, batch_size=None))
    assert told == [1]
    assert training.global_step == 30
    assert clipped_by(training) >= 2
    assert worst_ids(training) == ["b", "d"]
    assert alrc_of(training).losses["loss"].num_stddev == 3.0


def test_without_alrc_there_is_nothing_to_count():
    training = trainer("norm", 1)
    assert clipped_by(training) is None
    assert worst_ids(training) == []
