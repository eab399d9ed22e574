"""Whole fits: the plan of a fit, the module that a Trainer fits, and the same fit as a plain loop.

The loop is written from the documentation. It uses the NumPy reference for ALRC, and no Trainer.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback, ALRCMixin
from tests.reference import Reference

SAMPLES = 4


class Plan(NamedTuple):
    """The settings of one fit."""

    seed: int
    epochs: int
    batches: int
    manual: bool
    names: tuple[str, ...]
    """names of the losses; empty if the step returns or differentiates a single loss"""
    vector: bool
    """whether each sample has its own loss"""
    accumulate: int
    precision: str
    optimizer: str
    way: str
    """callback, mixin or both"""
    settings: dict[str, float]
    policy: str
    poisoned: frozenset[tuple[int, int]]
    """epochs and batches with a NaN"""
    log_every: int
    logger: bool
    validate_every: int
    """batches between validations; 0 for no validation"""
    max_steps: int
    """-1 for no limit"""
    broken: tuple[int, int, str] | None
    """epoch, batch and hook at which the fit breaks off, to be resumed"""

    def batch(self, epoch: int, index: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, some of them far off."""
        random = np.random.default_rng((self.seed, epoch, index, rank))
        x = random.normal(size=(SAMPLES, 3))
        y = x @ np.array([[0.5], [-1.0], [2.0]]) + random.normal(size=(SAMPLES, 1))
        y[random.random(SAMPLES) < 0.15] *= 30.0
        if (epoch, index) in self.poisoned and rank == 0:
            y[0] = math.nan
        return torch.from_numpy(x), torch.from_numpy(y)

    def accumulates(self, index: int) -> bool:
        """Whether no optimizer step follows a batch, so that its gradients are kept."""
        return (index + 1) % self.accumulate != 0 and index + 1 != self.batches


class Core(nn.Module):
    """One layer, and the losses of a batch by name."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.layer = nn.Linear(3, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.1, -0.2, 0.3]]))
            self.layer.bias.zero_()

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = (each.to(self.layer.weight.dtype) for each in batch)
        error = self.layer(x) - y
        found = {}
        for name in self.plan.names or ("loss",):
            losses = (error.abs() if name == "absolute" else error.square()).mean(1)
            found[name] = losses if self.plan.vector else losses.mean()
        return found

    def optimizer(self) -> torch.optim.Optimizer:
        kind = self.plan.optimizer
        if kind == "SGD":
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.5)
        return torch.optim.Adam(self.parameters(), 0.01, fused=kind == "fused Adam")


def together(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the mean losses, which is differentiated."""
    return sum((loss.mean() for loss in losses.values()), torch.zeros(()))


class Broken(RuntimeError):
    """Raised where the plan breaks a fit off."""


class Breaks(pl.Callback):
    """Breaks a fit off, once, at the place in its plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def _at(self, hook: str, trainer: Any) -> None:
        place = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx, hook)
        if place == self.plan.broken:
            raise Broken

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._at("on_train_batch_start", trainer)

    def on_after_backward(self, trainer: Any, *_: Any) -> None:
        self._at("on_after_backward", trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._at("on_train_batch_end", trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._at("on_train_epoch_end", trainer)


class Net(pl.LightningModule):
    """The module of a plan. It makes a batch from its epoch and index, not from the loader."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.core = Core(plan)
        self.automatic_optimization = not plan.manual

    def training_step(self, _: Any, batch_idx: int) -> Any:
        rank = self.trainer.global_rank
        losses = self.core.losses(self.plan.batch(self.current_epoch, batch_idx, rank))
        if self.plan.names:
            alrc: Any = self.alrc  # type: ignore[attr-defined]
            losses = {name: alrc(loss, name) for name, loss in losses.items()}
            loss = together(losses)
        else:
            (loss,) = losses.values()
        if not self.plan.manual:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, _: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            losses = self.core.losses(self.plan.batch(99, batch_idx))
            if self.plan.names:
                alrc: Any = self.alrc  # type: ignore[attr-defined]
                losses = {name: alrc(1e6 * loss, name) for name, loss in losses.items()}
            if self.plan.manual:
                gradients = [each.grad for each in self.parameters()]
                self.manual_backward(1e6 * together(losses))
                for parameter, gradient in zip(self.parameters(), gradients, strict=True):
                    parameter.grad = gradient

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.core.optimizer()

    def train_dataloader(self) -> Any:
        return DataLoader(range(self.plan.batches), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(range(2), batch_size=None)  # type: ignore[arg-type]


class MixinNet(ALRCMixin, Net):
    """The same module with the mixin, which adds the callback."""

    def configure_alrc(self) -> ALRCCallback:
        return callback(self.plan)


def callback(plan: Plan) -> ALRCCallback:
    """The callback of a plan. Its record can hold every clip."""
    return ALRCCallback(**plan.settings, nonfinite=plan.policy, record=10_000)  # type: ignore[arg-type]


class Outcome(NamedTuple):
    """The results of a fit."""

    weights: list[float]
    moments: dict[str, tuple[float, float]]
    counts: dict[str, tuple[int, int, int]]
    """numbers of finite, clipped and nonfinite losses, by name"""
    clips: set[tuple[str, int, int, int | None, int]]
    """name, epoch, batch, sample and rank of each loss in the record"""
    rows: list[dict[str, tuple[float, float]]]
    """for each logged step, mean loss and clipped fraction by name"""
    raised: bool


class PlainLoop:
    """The training of a plan, step by step.

    Args:
        plan: settings of the fit.
        ranks: number of ranks; gradients are averaged over them.
    """

    def __init__(self, plan: Plan, ranks: int = 1) -> None:
        self.plan, self.ranks = plan, ranks
        dtype = torch.float64 if plan.precision == "64-true" else torch.float32
        self.core = Core(plan).to(dtype)
        self.optimizer = self.core.optimizer()
        names = plan.names or ("loss",)
        self.references = {name: Reference(**plan.settings) for name in names}
        self.counts = {name: np.zeros(3, int) for name in names}
        self.windows = {name: np.zeros(3) for name in names}
        """by name, since the last row: number of losses, their sum, number of clipped losses"""
        self.clips: set[tuple[str, int, int, int | None, int]] = set()
        self.rows: list[dict[str, tuple[float, float]]] = []
        self.is_poisoned = False
        self.steps = self.logged_steps = 0
        """number of optimizer steps, and number of steps as loggers count them"""
        self.seen_at: int | None = None
        """the step of the newest losses; None if a row has logged them"""
        self.last_row_step = -1
        """the step of the row that was logged last"""

    def run(self) -> Outcome:
        raised = False
        for epoch in range(self.plan.epochs):
            for index in range(self.plan.batches):
                if self.steps == self.plan.max_steps or raised:
                    break
                if self.plan.broken in (
                    (epoch, index, "on_train_batch_start"),
                    (epoch, index, "on_after_backward"),
                ):
                    self._break_off_before(epoch, index)
                raised = self._train_on(epoch, index)
                if self.plan.broken == (epoch, index, "on_train_batch_end"):
                    self._break_off()
            if self.plan.broken == (epoch, self.plan.batches - 1, "on_train_epoch_end"):
                self._break_off()
        self._log_the_rest()
        return Outcome(
            [each for p in self.core.parameters() for each in p.detach().flatten().tolist()],
            {n: (r.mu[0], r.stddev) for n, r in self.references.items()},
            {n: tuple(map(int, count)) for n, count in self.counts.items()},  # type: ignore[misc]
            self.clips,
            self.rows,
            raised,
        )

    def _break_off_before(self, epoch: int, index: int) -> None:
        """Break off before the end of a batch. The resumed fit repeats the batch.

        If the fit breaks off after the backward pass, the batch's losses are in the rows of both
        fits.
        """
        if self.plan.broken == (epoch, index, "on_after_backward"):
            before = copy.deepcopy((self.references, self.counts, self.clips))
            losses = self._losses(epoch, index)
            for name in self.references:
                self._clip(
                    name, epoch, index, [each[name] for each in losses], [{} for _ in losses]
                )
            self.references, self.counts, self.clips = before
        self._break_off()
        # Lightning counts the repeated step twice.
        self.logged_steps += not self.plan.accumulates(index)

    def _break_off(self) -> None:
        """Drop the accumulated gradients, and log the row that was begun."""
        self._log_the_rest()
        self.optimizer.zero_grad()
        self.is_poisoned = False

    def _losses(self, epoch: int, index: int) -> list[dict[str, Tensor]]:
        """The losses of each rank, by name."""
        with autocast(self.plan):
            ranks = range(self.ranks)
            return [self.core.losses(self.plan.batch(epoch, index, rank)) for rank in ranks]

    def _train_on(self, epoch: int, index: int) -> bool:
        """Train on one batch. Returns whether ALRC raises an error."""
        plan = self.plan
        if plan.manual or index % plan.accumulate == 0:
            self.optimizer.zero_grad()
        nonfinite = self._nonfinite()
        of_ranks = self._losses(epoch, index)
        scaled: list[dict[str, Tensor]] = [{} for _ in of_ranks]
        for name in self.references:
            self._clip(name, epoch, index, [each[name] for each in of_ranks], scaled)
        self.is_poisoned |= self._nonfinite() > nonfinite
        if plan.policy == "raise" and self.is_poisoned:
            return True
        for losses in scaled:
            (together(losses) / plan.accumulate / self.ranks).backward()
        if plan.accumulates(index):
            return False
        self.steps += 1
        if not (self.is_poisoned and plan.policy == "skip"):
            self.optimizer.step()
        self.is_poisoned = False
        step = self.logged_steps
        self.logged_steps += 1
        # The row that was logged when the fit broke off may already have this step.
        if self.logged_steps % plan.log_every == 0 and step > self.last_row_step:
            self._log(step)
        return False

    def _nonfinite(self) -> int:
        return sum(int(count[2]) for count in self.counts.values())

    def _clip(
        self,
        name: str,
        epoch: int,
        index: int,
        losses: list[Tensor],
        scaled: list[dict[str, Tensor]],
    ) -> None:
        """Clip a name's losses of one batch, and put the results under this name into ``scaled``.

        Args:
            name: the name.
            epoch: the epoch.
            index: the batch.
            losses: each rank's losses.
            scaled: each rank's clipped losses by name.
        """
        self.seen_at = self.logged_steps
        values = [loss.detach().double().numpy() for loss in losses]
        _, scales = self.references[name](np.stack(values))
        for rank, (loss, value) in enumerate(zip(losses, values, strict=True)):
            scale = torch.from_numpy(np.asarray(scales[rank])).to(
                torch.promote_types(loss.dtype, torch.float32)
            )
            scaled[rank][name] = (loss * scale).to(loss.dtype)
            for sample in np.argwhere(np.isfinite(value) & (scales[rank] < 1.0)):
                place = int(sample[0]) if len(sample) else None
                self.clips.add((name, epoch, index, place, rank))
        finite = np.isfinite(np.stack(values))
        is_clipped = finite & (scales < 1.0)
        self.counts[name] += [finite.sum(), is_clipped.sum(), (~finite).sum()]
        self.windows[name] += [
            finite.sum(),
            np.where(finite, np.stack(values), 0.0).sum(),
            is_clipped.sum(),
        ]

    def _log_the_rest(self) -> None:
        if self.seen_at is not None:
            self._log(max(self.seen_at, self.last_row_step + 1))

    def _log(self, step: int) -> None:
        self.last_row_step, self.seen_at = step, None
        row: dict[str, tuple[float, float]] = {}
        for name, (count, total, clipped) in self.windows.items():
            if count:
                row[name] = (total / count, clipped / count)
            self.windows[name] = np.zeros(3)
        if row and self.plan.logger:
            self.rows.append(row)


def autocast(plan: Plan) -> Any:
    """The context of a forward pass."""
    is_mixed = plan.precision == "bf16-mixed"
    return torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext()
