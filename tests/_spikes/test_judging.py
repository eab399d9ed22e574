"""The losses before and after a spike decide whether it is a divergence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback
from lightning_alrc._moments.sums import Sums
from lightning_alrc._spikes.judging import (
    DATA,
    DIVERGENCE,
    LEAST_AFTER,
    LEAST_BEFORE,
    WINDOW,
    Judge,
    checked_judging,
)
from lightning_alrc.spikes import read_spikes
from tests.nets import ResumableLoader

Fit = Callable[..., Any]

STEPS = 400


def place(number: int) -> tuple[int, int, int, int]:
    return (number, 0, number, 0)


def judged(levels: list[float], spikes: list[int], at_end: bool = True, **how: Any) -> list[Any]:
    """The kinds of the spikes at some calls, judged after each call or only at the end.

    With ``mixed``, every seventh loss is on the CPU, and the others are on a device.
    """
    judge, found = Judge(), {}
    for number, level in enumerate(levels):
        if number in spikes:
            judge.enter(judge.count, place(number))
        sums = Sums(losses=1.0, loss=level)
        if how.get("on_device") or (how.get("mixed") and number % 7):
            sums = Sums(losses=torch.tensor(1.0), loss=torch.tensor(level))
        judge.observe(sums)
        if how.get("often"):
            found |= judge.take_verdicts()
            judge.trim()
            judge = Judge.load(json.loads(json.dumps(judge.dump()))) if how.get("saved") else judge
    found |= judge.take_verdicts(at_end)
    return [found.get(place(number)) for number in spikes]


def noise(count: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (1.0 + 0.1 * torch.randn(count, generator=generator)).tolist()


WAYS = [{}, {"on_device": True}, {"mixed": True}, {"often": True}, {"often": True, "saved": True}]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_single_spike_comes_from_the_data(how: Any) -> None:
    levels = noise(300)
    levels[150] = 90.0
    assert judged(levels, [150], **how) == [DATA]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("rise", [1.0, 100.0, math.inf])
def test_losses_that_stay_up_are_a_divergence(how: Any, rise: float) -> None:
    levels = [level + (rise if at >= 150 else 0.0) for at, level in enumerate(noise(300))]
    spikes = list(range(150, 180))  # until the threshold has risen
    assert judged(levels, spikes, **how) == [DIVERGENCE] * 30


def test_a_spike_before_a_divergence_still_comes_from_the_data() -> None:
    levels = [level + 5.0 * (at >= 200) for at, level in enumerate(noise(300))]
    levels[120] = levels[170] = 90.0
    found = judged(levels, [120, 170, 200, 201, 230], often=True)
    assert found == [DATA, DATA, DIVERGENCE, DIVERGENCE, DIVERGENCE]


def test_a_divergence_after_another_divergence_is_found() -> None:
    levels = [level + 5.0 * (at >= 100) + 5.0 * (at >= 300) for at, level in enumerate(noise(400))]
    assert judged(levels, [100, 300], often=True) == [DIVERGENCE, DIVERGENCE]


def test_a_spike_just_before_a_divergence_is_not_part_of_it() -> None:
    levels = [level + 5.0 * (at >= 150) for at, level in enumerate(noise(300))]
    assert judged(levels, [132, 150, 151]) == [DATA, DIVERGENCE, DIVERGENCE]


def test_losses_that_recover_are_no_divergence() -> None:
    levels = [level + 5.0 * (150 <= at < 165) for at, level in enumerate(noise(300))]
    assert judged(levels, [150, 151, 160]) == [DATA] * 3


def test_losses_that_fall_for_good_are_no_divergence() -> None:
    levels = [level - 5.0 * (at >= 150) for at, level in enumerate(noise(300))]
    assert judged(levels, list(range(150, 180))) == [DATA] * 30


def test_a_spike_with_too_few_losses_around_it_is_not_judged() -> None:
    assert judged(noise(60), [LEAST_BEFORE - 1]) == [None]
    assert judged(noise(60), [LEAST_BEFORE]) == [DATA]
    assert judged(noise(100 + LEAST_AFTER), [100]) == [None]
    assert judged(noise(101 + LEAST_AFTER), [100]) == [DATA]
    assert judged(noise(101 + LEAST_AFTER), [100], at_end=False) == [None]
    assert judged(noise(101 + WINDOW), [100], at_end=False) == [DATA]


def test_no_early_spike_of_ordinary_losses_is_a_divergence() -> None:
    """Ten calls before a spike would be too few to judge the spike.

    The 0.9 quantile of their losses may be below the median of the losses after the spike.
    """
    for seed in range(300):
        levels = noise(100, seed)
        spikes = [at for at in range(10, 40) if levels[at] > 1.15]
        assert DIVERGENCE not in judged(levels, spikes)


def test_the_number_of_levels_kept_is_bounded() -> None:
    judge = Judge()
    for number in range(10_000):
        if number % 7 == 0:
            judge.enter(judge.count, place(number))
        judge.observe(Sums(losses=1.0, loss=1.0))
        if number % 50 == 0:
            judge.take_verdicts()
            judge.trim()
    assert judge.levels_kept <= 200
    assert len(judge.dump()["levels"]) <= 2 * WINDOW


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"loss": 3},
        {"loss": {"levels": [1], "waiting": [], "ceiling": None}},
        {"loss": {"levels": [], "waiting": [[1, 2]], "ceiling": None}},
        {"loss": {"levels": [], "waiting": [], "ceiling": "high"}},
    ],
)
def test_an_invalid_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="'judging' must map each loss"):
        checked_judging(state)


# ---- planted in a training


class Planted(pl.LightningModule):
    """Has outliers in some batches, or losses that are raised from a step on."""

    def __init__(
        self, outliers: tuple[int, ...] = (), lift: int = STEPS, vector: bool = False
    ) -> None:
        super().__init__()
        self.outliers, self.lift, self.vector = outliers, lift, vector
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, ids = batch["x"], batch["id"]
        losses = 1.0 + 0.1 * (self.layer(x).squeeze(1) - x.sum(1)).square() + 0.05 * x[:, 0]
        is_outlier = torch.tensor([int(each) // 4 in self.outliers for each in ids])
        losses = torch.where(is_outlier, 30.0 * losses, losses)
        losses = losses + 5.0 * (self.trainer.global_step >= self.lift)
        return losses if self.vector else losses.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def batches(steps: int = STEPS) -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * steps, 3, generator=generator)
    rows = [{"x": each, "id": index} for index, each in enumerate(x)]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick_path")
@pytest.mark.parametrize(
    ("quick_path", "vector", "num_stddev"),
    [("host", False, 2), ("host", True, 10), ("device", False, 10), ("device", True, 2)],
    indirect=["quick_path"],
)
def test_planted_outliers_and_divergences(
    fit: Fit, caplog: pytest.LogCaptureFixture, vector: bool, num_stddev: float
) -> None:
    callback = ALRCCallback(num_stddev=num_stddev, sample_ids=lambda batch: batch["id"])
    net = Planted((150, 220), vector=vector)
    with caplog.at_level("INFO"):
        fit(net, callback, batches=batches(280), max_epochs=1)
    kinds = {spike.step: spike.kind for spike in callback.spikes}
    assert kinds[150] == kinds[220] == DATA
    assert DIVERGENCE not in kinds.values()
    told = [each for each in caplog.messages if "a spike comes from the data" in each]
    assert len(told) == 1

    callback = ALRCCallback(num_stddev=num_stddev)
    net = Planted((150,), lift=220, vector=vector)
    with pytest.warns(UserWarning, match=r"losses diverge\. Loss 'loss': .* at step 220"):
        fit(net, callback, batches=batches(280), max_epochs=1)
    kinds = {spike.step: spike.kind for spike in callback.spikes}
    assert kinds[150] == DATA
    assert kinds[220] == DIVERGENCE


def test_the_same_samples_spike_in_each_epoch(fit: Fit) -> None:
    callback = ALRCCallback()
    fit(Planted((60,), vector=True), callback, batches=batches(150), max_epochs=3)
    kinds = {(s.epoch, s.id): s.kind for s in callback.spikes if s.id in range(240, 244)}
    assert kinds == {(epoch, 240 + n): DATA for epoch in range(3) for n in range(4)}


def test_the_record_of_a_resumed_run_has_the_same_kinds(fit: Fit, tmp_path: Any) -> None:
    def run(**arguments: Any) -> Any:
        callback = ALRCCallback()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=85, save_top_k=-1)
        resumable = ResumableLoader()
        resumable.batches = list(batches())
        arguments |= {"batches": resumable, "max_epochs": 1, "enable_checkpointing": True}
        fit(Planted((150, 220), lift=260), callback, saving, **arguments)
        return callback.spikes

    whole = run()
    resumed = run(ckpt_path=tmp_path / "step=170.ckpt")
    assert [each.kind for each in resumed] == [each.kind for each in whole]
    assert {DATA, DIVERGENCE} <= {each.kind for each in whole}


def test_the_kind_and_the_norm_are_in_the_file(fit: Fit, tmp_path: Any) -> None:
    callback = ALRCCallback()
    logger = CSVLogger(tmp_path)
    arguments = {"max_epochs": 1, "gradient_clip_val": 1.0, "logger": logger}
    fit(Planted((150,)), callback, batches=batches(), **arguments)
    (path,) = tmp_path.rglob("alrc_spikes.jsonl")
    assert read_spikes(path) == callback.spikes
    (spike,) = (each for each in callback.spikes if each.step == 150)
    assert spike.kind == DATA
    assert spike.gradient_norm is not None
    assert spike.gradient_norm > 0


def test_a_batch_without_losses_does_not_hide_a_divergence(fit: Fit) -> None:
    from lightning_alrc import ALRCMixin

    class Masked(ALRCMixin, Planted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = super().training_step(batch, batch_idx)
            return self.alrc(losses[:0] if batch_idx % 6 == 5 else losses, "task").sum()

    net = Masked(lift=120, vector=True)
    with pytest.warns(UserWarning, match="losses diverge"):
        fit(net, batches=batches(200), max_epochs=1)
    kinds = {each.step: each.kind for each in net._own_alrc_callback().spikes}
    assert kinds[120] == DIVERGENCE


def test_a_loss_that_is_not_called_in_each_batch(fit: Fit) -> None:
    from lightning_alrc import ALRCMixin

    class Seldom(ALRCMixin, Planted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return self.alrc(loss, "seldom") if batch_idx % 3 == 0 else self.alrc(loss, "often")

    net = Seldom(lift=220)
    with pytest.warns(UserWarning, match="losses diverge"):
        fit(net, batches=batches(), max_epochs=1)
    kinds = {(each.name, each.step): each.kind for each in net._own_alrc_callback().spikes}
    assert kinds["seldom", 222] == kinds["often", 220] == DIVERGENCE
