"""Fits of many Trainers, drawn by Hypothesis, against a plain loop.

``FITS=2000 python -m pytest tests/test_fits.py`` draws 2,000 fits, and 50 further fits on two
ranks.
"""

from __future__ import annotations

import csv
import math
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Checkpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import CSVLogger

from lightning_alrc import ALRCCallback
from tests.nets import callback_of
from tests.plain_loop import (
    Breaks,
    Broken,
    MixinNet,
    Net,
    Outcome,
    PlainLoop,
    Plan,
    callback,
)

FITS = int(os.environ.get("FITS", "60"))

HOOKS = ["on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_train_epoch_end"]
SETTINGS: list[dict[str, float]] = [
    {"num_stddev": 2.0},
    {"num_stddev": 0.5, "decay": 0.9, "mu1_start": 4.0, "mu2_start": 20.0},
    {"num_stddev": 1.0, "decay": 0.8},
    {"num_stddev": 3.0, "decay": 0.9, "num_stddev_below": 1.0},
]


@st.composite
def plans(draw: Any, ranks: int = 1) -> Plan:
    manual = draw(st.booleans())
    epochs, batches = draw(st.integers(1, 3)), draw(st.integers(2, 7))
    names = draw(st.sampled_from([(), (), ("square",), ("square", "absolute")]))
    places = st.tuples(st.integers(0, epochs - 1), st.integers(0, batches - 1))
    # If a launched process raises, Lightning calls no hook that could keep its outcome.
    policies = ["propagate", "propagate", "skip", *(["raise"] if ranks == 1 else [])]
    policy = draw(st.sampled_from(policies))
    poisoned = draw(st.frozensets(places, max_size=0 if policy == "propagate" else 2))
    max_steps, broken = draw(st.sampled_from([-1, -1, -1, 1, 4])), None
    if ranks == 1 and max_steps == -1 and not (policy == "raise" and poisoned):
        epoch, index = draw(places)
        hook = draw(st.sampled_from([None, *HOOKS]))
        if hook == "on_train_epoch_end":
            index = batches - 1
        broken = None if hook is None else (epoch, index, hook)
    return Plan(
        seed=draw(st.integers(0, 2**32 - 1)),
        epochs=epochs,
        batches=batches,
        manual=manual,
        names=names,
        vector=draw(st.booleans()),
        accumulate=1 if manual else draw(st.integers(1, 3)),
        precision=draw(st.sampled_from(["32-true", "32-true", "64-true", "bf16-mixed"])),
        optimizer=draw(st.sampled_from(["SGD", "Adam", "fused Adam"])),
        way=draw(st.sampled_from(["mixin", "both"] if names else ["callback", "mixin", "both"])),
        settings=draw(st.sampled_from(SETTINGS)),
        policy=policy,
        poisoned=poisoned,
        log_every=draw(st.integers(1, 5)),
        logger=draw(st.booleans()),
        validate_every=draw(st.sampled_from([0, 0, 1, 2])),
        max_steps=max_steps,
        broken=broken,
    )


def fitted(plan: Plan, folder: Path, ranks: int = 1) -> Outcome:
    """The outcome of a plan that a Trainer fits. A fit that breaks off is resumed."""
    raised, path = False, folder / "broken.ckpt"
    try:
        trainer = trained(plan, folder, ranks, [Breaks(plan)], None)
    except Broken:
        trainer = trained(plan, folder, ranks, [], path)
    except FloatingPointError:
        raised = True
    if ranks > 1 or raised:
        return pickle.loads((folder / "outcome").read_bytes())  # type: ignore[no-any-return]
    assert not {"training_step", "backward", "optimizer_step"} & set(vars(trainer.strategy))
    return outcome(trainer, folder, raised)


def trained(
    plan: Plan, folder: Path, ranks: int, breaks: list[Any], ckpt_path: Path | None
) -> pl.Trainer:
    net = (Net if plan.way == "callback" else MixinNet)(plan)
    callbacks = [] if plan.way == "mixin" else [callback(plan)]
    place = plan.seed % 2  # before or after ALRC's callback in the list
    callbacks[place:place] = breaks
    trainer = pl.Trainer(
        callbacks=[*callbacks, Keeps(folder), OnExceptionCheckpoint(folder, "broken")],
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        max_epochs=plan.epochs,
        max_steps=plan.max_steps,
        accumulate_grad_batches=plan.accumulate,
        precision=plan.precision,
        log_every_n_steps=plan.log_every,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1) if plan.logger else False,
        val_check_interval=min(plan.validate_every, plan.batches) or None,
        limit_val_batches=2 if plan.validate_every else 0,
        num_sanity_val_steps=1,
        inference_mode=False,
        use_distributed_sampler=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(net, ckpt_path=ckpt_path)
    return trainer


class Keeps(Checkpoint):
    """Writes the outcome of a fit that ends in another process, or by an error.

    It is a ``Checkpoint`` so that Lightning calls it after all other callbacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        if trainer.world_size > 1:
            self._write(trainer, raised=False)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if isinstance(exception, FloatingPointError):
            self._write(trainer, raised=True)

    def _write(self, trainer: Any, raised: bool) -> None:
        if trainer.is_global_zero:
            found = outcome(trainer, self.folder, raised)
            (self.folder / "outcome").write_bytes(pickle.dumps(found))


def outcome(trainer: Any, folder: Path, raised: bool) -> Outcome:
    alrc: ALRCCallback = callback_of(trainer)
    return Outcome(
        [
            each
            for parameter in trainer.lightning_module.parameters()
            for each in parameter.detach().flatten().tolist()
        ],
        {n: (a.mu1.item(), a.stddev.item()) for n, a in alrc.losses.items()},
        {
            n: (int(a.losses_total), int(a.clipped_total), int(a.nonfinite_total))
            for n, a in alrc.losses.items()
        },
        {(s.name, s.epoch, s.batch_idx, s.sample, s.rank) for s in alrc.spikes},
        rows_in(folder),
        raised,
    )


def rows_in(folder: Path) -> list[dict[str, tuple[float, float]]]:
    """The rows that the loggers of a run and of its continuation have written."""
    rows = []
    for path in sorted(folder.glob("lightning_logs/version_*/metrics.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                found = {}
                for name in ("loss", "square", "absolute"):
                    prefix = "alrc/" if name == "loss" else f"alrc/{name}/"
                    if row.get(f"{prefix}loss"):
                        clipped = float(row[f"{prefix}clipped_fraction"])
                        found[name] = (float(row[f"{prefix}loss"]), clipped)
                if found:
                    rows.append(found)
    return rows


PLAN = Plan(
    seed=1,
    epochs=1,
    batches=5,
    manual=False,
    names=(),
    vector=True,
    accumulate=1,
    precision="32-true",
    optimizer="SGD",
    way="callback",
    settings=SETTINGS[1],
    policy="propagate",
    poisoned=frozenset(),
    log_every=1,
    logger=False,
    validate_every=0,
    max_steps=-1,
    broken=None,
)
BREAKS_OFF_WHILE_ACCUMULATING = PLAN._replace(
    epochs=2,
    batches=3,
    vector=False,
    accumulate=2,
    settings={"num_stddev": 2.0},
    log_every=3,
    logger=True,
    broken=(1, 0, "on_train_batch_end"),
)


def check(plan: Plan, ranks: int) -> None:
    expected = PlainLoop(plan, ranks).run()
    with tempfile.TemporaryDirectory() as folder:
        found = fitted(plan, Path(folder), ranks)
    assert found.raised == expected.raised
    assert found.counts == expected.counts
    close = {"rel": 1e-4, "abs": 1e-5, "nan_ok": True}
    for name, moments in expected.moments.items():
        assert found.moments[name] == pytest.approx(moments, **close), name
    assert found.weights == pytest.approx(expected.weights, **close)
    assert found.clips == expected.clips
    assert len(found.rows) == len(expected.rows), (found.rows, expected.rows)
    for row, expected_row in zip(found.rows, expected.rows, strict=True):
        assert row.keys() == expected_row.keys()
        for name, means in expected_row.items():
            assert row[name] == pytest.approx(means, **close)


@given(plans())
@example(BREAKS_OFF_WHILE_ACCUMULATING)
@settings(max_examples=FITS)
def test_any_fit_equals_a_plain_loop(plan: Plan) -> None:
    check(plan, ranks=1)


@given(plans(ranks=2))
@settings(max_examples=max(FITS // 40, 1))
def test_any_fit_on_two_ranks_equals_a_plain_loop(plan: Plan) -> None:
    torch.manual_seed(0)
    check(plan, ranks=2)


def test_a_fit_with_other_settings_differs_from_the_plain_loop() -> None:
    """The comparison with the plain loop notices other settings."""
    check(PLAN, 1)
    with tempfile.TemporaryDirectory() as folder:
        other = fitted(PLAN._replace(settings={"num_stddev": math.inf}), Path(folder))
    assert other.weights != pytest.approx(PlainLoop(PLAN).run().weights, rel=1e-4, abs=1e-5)
