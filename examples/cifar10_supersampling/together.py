"""Stacks many trainings of a grid on one device. Each has the result that it has when run alone.

A training of the paper's network with batches of one uses little of a GPU. Here the weights of many
trainings are stacked, and each step is one step of all. Each has its own images, losses, threshold
and moments. `grid --together` uses it; `side_by_side` measures what it saves.
"""

from __future__ import annotations

import copy
import csv
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock
from rich.progress import Progress
from torch import Tensor
from torch.func import functional_call, stack_module_state

from lightning_alrc import functional

from ..comparison import files
from . import published, results
from .clipping import require_float64
from .command_line import experiment_config, use_full_float32
from .datamodule import CIFAR10Supersampling, TrainingBatches
from .module import ERROR_SCALE, POWERS, Supersampling, guarded
from .network import Convolution
from .recording import StepRecorder
from .training import AUTHORS_START, Run, restored_images, row_of, test

PRECISIONS = ("32-true", "64-true", "bf16-mixed")

CHECKPOINT = "together.ckpt"
CUT_OFF_TABLE = "cut-off.csv"

# Number of steps whose images are made together and whose losses are read together.
STEPS_AT_A_TIME = 64

# Number of steps before a step is captured as a CUDA graph.
WARM_UP = 10

# ALRC without start moments, as in `lightning_alrc`: the number of first losses that are not
# clipped, and the horizon of the ramped decay.
BURN_IN, HORIZON = 10, 9.0
DECAY = 0.999


@dataclass(frozen=True)
class Method:
    """What protects a training.

    Attributes:
        num_stddev: standard deviations of ALRC; infinite without ALRC.
        published: whether ALRC is that of the authors' code.
        norm: largest norm of the gradient; infinite without gradient clipping.
    """

    num_stddev: float = torch.inf
    published: bool = False
    norm: float = torch.inf


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: the method cannot be stacked.
    """
    method = Method()
    for part in name.split("+"):
        if alrc := re.fullmatch(r"(alrc|published)([234])", part):
            method = replace(method, num_stddev=float(alrc[2]), published=alrc[1] == "published")
        elif part == "norm":
            method = replace(method, norm=1.0)
        elif part != "none":
            raise ValueError(
                "methods must be none, alrc2 to alrc4, published2 to published4, norm, or alrc and "
                f"norm joined by '+', to be trained together, got {name!r}"
            )
    return method


def check(runs: Sequence[Run]) -> None:
    """Raise ValueError for trainings that cannot be stacked."""
    for run in runs:
        method_of(run.method)
        if run.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {list(PRECISIONS)} to train together, "
                f"got {run.precision!r}"
            )
        for name in ("wandb", "every_image"):
            if getattr(run, name):
                raise ValueError(f"{name} must be False to train together, got True")


class Moments:
    """ALRC's moments of many trainings, [runs] each.

    Args:
        runs: the trainings.
        device: device of the losses.
    """

    NAMES = ("mu1", "mu2_or_variance", "updates", "losses", "clipped")

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        methods = [method_of(run.method) for run in runs]

        def column(values: Sequence[Any], dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.num_stddev = column([each.num_stddev for each in methods])
        self.published = column([each.published for each in methods], torch.bool)
        self.burns_in = column([run.alrc_start == "first_losses" for run in runs], torch.bool)
        self.burns_in &= ~self.published
        starts = [self._start(run, method) for run, method in zip(runs, methods, strict=True)]
        self.mu1 = column([mu1 for mu1, _ in starts])
        # The second moment if ALRC is as published, otherwise the variance.
        self.mu2_or_variance = column([second for _, second in starts])
        self.updates, self.losses, self.clipped = (torch.zeros_like(self.mu1) for _ in range(3))

    @staticmethod
    def _start(run: Run, method: Method) -> tuple[float, float]:
        if method.published:
            return published.MU1_START, published.MU2_START
        if run.alrc_start == "authors":
            mu1, mu2 = AUTHORS_START[run.loss]
            return mu1, mu2 - mu1**2
        return 0.0, 0.0

    def threshold(self) -> Tensor:
        """The threshold of each training, [runs]."""
        moments = self.mu1, self.mu2_or_variance
        ours = functional.threshold(*moments, self.num_stddev)  # type: ignore[arg-type]
        ours = ours.masked_fill(self.burns_in & (self.losses < BURN_IN), torch.inf)
        as_published = published.threshold(*moments, self.num_stddev)
        return torch.where(self.published, as_published, ours)

    def learn(self, clipped: functional.Clipped) -> None:
        """Update by clipped losses, [runs, batch].

        ALRC ignores losses that are not finite. ALRC as published counts each of them as ``mu1``.
        """
        finite = clipped.finite.double()
        count = finite.sum(1)
        some, deviation = count.clamp(min=1.0), (clipped.bounded - self.mu1[:, None]) * finite
        delta = deviation.sum(1) / some
        spread = deviation.square().sum(1) / some - delta.square()
        learns = count.clamp(max=1.0)
        decay = torch.where(
            self.burns_in,
            functional.ramped_decay(DECAY, self.updates, HORIZON),
            torch.full_like(self.mu1, DECAY),
        ).pow(learns)
        mu1, variance = functional.update(
            self.mu1, self.mu2_or_variance, delta, spread.clamp(min=0.0), decay
        )
        their_mu1, their_mu2 = published.moved(self.mu1, self.mu2_or_variance, clipped.bounded)
        self.mu1.copy_(torch.where(self.published, their_mu1, mu1))
        self.mu2_or_variance.copy_(torch.where(self.published, their_mu2, variance))
        self.updates += learns
        self.losses += count
        self.clipped += (clipped.scale < 1.0).sum(1)

    def state(self, index: int) -> dict[str, Tensor]:
        """The state of one training, on the CPU."""
        return {name: getattr(self, name)[index].cpu().clone() for name in self.NAMES}

    def load(self, index: int, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name in self.NAMES:
            getattr(self, name)[index] = state[name].to(self.mu1.device)


@dataclass
class Recorded:
    """The record of one training so far.

    Attributes:
        loss: float32 [steps done], each step's mean of the clean images.
        clean: int32 [steps done], how many images of a step are clean.
        threshold: float64 [steps done].
        survived: number of steps up to the last one with finite losses.
        seconds: this training's share of the seconds of all trainings.
    """

    loss: Tensor = field(default_factory=lambda: torch.empty(0))
    clean: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    threshold: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    survived: int = 0
    seconds: float = 0.0

    def add(self, losses: Tensor, outlier: Tensor, threshold: Tensor, seconds: float) -> None:
        """Add steps: losses and outliers [steps, batch], thresholds [steps]."""
        done, clean = len(self.loss), (~outlier).sum(dim=1)
        mean = losses.float().masked_fill(outlier, 0).sum(dim=1) / clean
        self.loss = torch.cat([self.loss, mean])
        self.clean = torch.cat([self.clean, clean.int()])
        self.threshold = torch.cat([self.threshold, threshold])
        finite = losses.isfinite().all(dim=1).nonzero()
        if len(finite):
            self.survived = done + int(finite[-1]) + 1
        self.seconds += seconds

    def recorder(self, steps: int, weights: dict[str, Tensor]) -> StepRecorder:
        """The recorder that a training by itself would have at the end of these steps."""
        recorder = StepRecorder(steps)
        survived = self.survived
        if survived == steps and not all(bool(each.isfinite().all()) for each in weights.values()):
            survived -= 1
        recorder.load_state_dict(
            {**vars(self), "survived": survived, "image_losses": [], "outliers": []}
        )
        return recorder


class Trainings:
    """Stacked trainings that share the settings of `shared_settings_of`.

    Args:
        runs: the trainings.
        device: device of all.
        states: what `state` returned for each interrupted training, by the training's name.
    """

    def __init__(
        self, runs: Sequence[Run], device: torch.device, states: dict[str, Any] | None = None
    ) -> None:
        require_float64(device)
        self.runs, self.device = list(runs), device
        first = runs[0]
        self.done = 0
        self.dtype = torch.float64 if first.precision == "64-true" else torch.float32
        networks = [initial_network(run).to(device, self.dtype) for run in runs]
        self.weights: dict[str, Tensor] = stack_module_state(networks)[0]
        self.skeleton = copy.deepcopy(networks[0]).to("meta")
        for layer in self.skeleton.modules():
            if isinstance(layer, Convolution):
                layer.as_product = True
        quartic = [POWERS[run.loss] == 4 for run in runs]
        self.quartic = torch.tensor(quartic, device=device)[:, None]
        self.guard = torch.tensor([has_guard(run) for run in runs], device=device)[:, None]
        norms = [method_of(run.method).norm for run in runs]
        self.largest_norm = torch.tensor(norms, device=device, dtype=self.dtype)
        self.moments = Moments(runs, device)
        self.recorded = [Recorded() for _ in runs]

        # A CUDA graph always reads the learning rate from the same memory, so the rate is a tensor.
        self.uses_graph = device.type == "cuda" and first.optimizer == "adam"
        rate: Any = first.learning_rate
        optimizer_class: Any = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[first.optimizer]
        options: dict[str, Any] = {"fused": True}
        if self.uses_graph:
            rate, options["capturable"] = torch.tensor(rate, device=device), True
        self.optimizer = optimizer_class(list(self.weights.values()), lr=rate, **options)
        self.drop_at = first.learning_rate_drop_at

        self.average_decay = average_decay(first)
        self.average: dict[str, Tensor] = {}
        if self.average_decay is not None:
            self.average = {name: each.detach().clone() for name, each in self.weights.items()}
        # The average starts from the weights after the first step, so the first share is 1.
        self.newest_share = torch.ones((), device=device, dtype=self.dtype)

        # Runs with the same key see the same images.
        keys = list(dict.fromkeys(key_of_images(run) for run in runs))
        self.sources = [source(key) for key in keys]
        source_of_run = [keys.index(key_of_images(run)) for run in runs]
        self.source_of_run = torch.tensor(source_of_run, device=device)
        shape = (len(keys), first.batch_size, 3, 32, 32)
        self.input, self.target = (
            torch.zeros(shape, device=device, dtype=self.dtype) for _ in range(2)
        )
        self.losses = torch.zeros(len(runs), first.batch_size, device=device, dtype=self.dtype)
        self.threshold = torch.zeros(len(runs), device=device, dtype=torch.float64)
        self._graph: Any = None
        self._eager_steps = 0
        self._load(states or {})

    # ---- a step

    def step(self) -> None:
        """A step of each training, with the images in `input` and `target`."""
        mixed = self.runs[0].precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            restore = torch.vmap(lambda weights, images: self._network(weights, images))
            restored = restore(self.weights, self.input[self.source_of_run])
            square = (restored - self.target[self.source_of_run]).square()
            power = torch.where(self.quartic[..., None, None, None], square.square(), square)
            losses = ERROR_SCALE * power.mean(dim=(2, 3, 4))
            losses = torch.where(self.guard, guarded(losses), losses)
        self.losses.copy_(losses.detach())
        self.threshold.copy_(self.moments.threshold())
        clipped = functional.clip(losses, self.moments.mu1[:, None], self.threshold[:, None])
        # The runs share no weights, so the gradient of the sum contains each run's own gradient.
        loss = clipped.loss.mean(dim=1).sum()
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        self._step_by(gradients)
        self.moments.learn(clipped)
        with torch.no_grad():
            for name, average in self.average.items():
                average.lerp_(self.weights[name], self.newest_share)

    def _network(self, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        restored: Tensor = functional_call(self.skeleton, weights, (images,))
        return restored

    def _step_by(self, gradients: Sequence[Tensor]) -> None:
        """Clip each training's gradient, as `torch.nn.utils.clip_grad_norm_` does, and step."""
        squares = [each.flatten(1).square().sum(dim=1) for each in gradients]
        norm = torch.stack(squares).sum(dim=0).sqrt()
        factor = (self.largest_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = factor.masked_fill(self.largest_norm.isinf(), 1.0)
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            # A fused optimizer reads gradients in memory order and ignores their strides.
            weight.grad = (gradient * factor.view(-1, *[1] * (gradient.ndim - 1))).contiguous()
        self.optimizer.step()

    def _go(self) -> None:
        """Make a step, by a CUDA graph if there is one, and do the host's part of the step."""
        if self._graph is not None:
            self._graph.replay()
        elif self.uses_graph and self._eager_steps >= WARM_UP:
            # Capturing does not run the step. The thread that loads images may pin memory
            # meanwhile. The default error mode, "global", does not allow that.
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.step()
            self._graph.replay()
        else:
            self.step()
            self._eager_steps += 1
        self.done += 1
        if self.done == self.drop_at:
            self._drop_rate()
        if self.average_decay is not None and self.done == 1:
            self.newest_share.fill_(1.0 - self.average_decay)

    def _drop_rate(self) -> None:
        for group in self.optimizer.param_groups:
            rate = group["lr"]
            group["lr"] = rate.mul_(0.1) if isinstance(rate, Tensor) else 0.1 * rate

    # ---- many steps

    def train(self, until: int, report: Callable[[int], None] = lambda step: None) -> None:
        """Train to a step.

        Args:
            until: number of the step.
            report: called regularly with the number of steps done.
        """
        chunks = self._chunks(until)
        with ThreadPoolExecutor(1) as pool:  # makes images while the device trains
            coming = pool.submit(next, chunks, None)
            while (chunk := coming.result()) is not None:
                coming = pool.submit(next, chunks, None)
                self._train_on(*chunk)
                report(self.done)

    def _chunks(self, until: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, targets and outliers of several steps: [steps, sources, batch, ...] each."""
        for each in self.sources:
            each.load_state_dict({"batches": self.done})
        images = [endless(each) for each in self.sources]
        for first in range(self.done, until, STEPS_AT_A_TIME):
            steps = min(STEPS_AT_A_TIME, until - first)
            batches = [[next(each) for _ in range(steps)] for each in images]
            made = [
                torch.stack([torch.stack(of_source) for of_source in column], dim=1)
                for column in zip(*(zip(*each, strict=True) for each in batches), strict=True)
            ]
            if self.device.type == "cuda":
                made = [each.pin_memory() for each in made]
            yield made[0], made[1], made[2]

    def _train_on(self, inputs: Tensor, targets: Tensor, outliers: Tensor) -> None:
        started = time.perf_counter()
        on_device = [each.to(self.device, non_blocking=True) for each in (inputs, targets)]
        losses, thresholds = [], []
        for image, target in zip(*on_device, strict=True):
            self.input.copy_(image)
            self.target.copy_(target)
            self._go()
            losses.append(self.losses.clone())
            thresholds.append(self.threshold.clone())
        loss, threshold = torch.stack(losses).cpu(), torch.stack(thresholds).cpu()
        outlier = outliers[:, self.source_of_run.cpu()]
        seconds = (time.perf_counter() - started) / len(self.runs)
        for index, recorded in enumerate(self.recorded):
            recorded.add(loss[:, index], outlier[:, index], threshold[:, index], seconds)

    # ---- states

    def state(self, index: int) -> dict[str, Any]:
        """All that one training needs to continue, on the CPU."""

        def own(each: Tensor) -> Tensor:
            return each.detach()[index].cpu().clone()

        kept = [
            {n: value.cpu().clone() if value.ndim == 0 else own(value) for n, value in each.items()}
            for each in (self.optimizer.state.get(w, {}) for w in self.weights.values())
        ]
        return {
            "done": self.done,
            "weights": {name: own(each) for name, each in self.weights.items()},
            "average": {name: own(each) for name, each in self.average.items()},
            "optimizer": kept,
            "moments": self.moments.state(index),
            "recorded": vars(self.recorded[index]),
        }

    def _load(self, states: dict[str, Any]) -> None:
        """Continue from the states, all of the same step."""
        if not states:
            return
        ordered = [states[run.name] for run in self.runs]
        self.done = ordered[0]["done"]
        with torch.no_grad():
            for index, state in enumerate(ordered):
                for stacked, key in ((self.weights, "weights"), (self.average, "average")):
                    for name, each in stacked.items():
                        each[index].copy_(state[key][name])
                self.moments.load(index, state["moments"])
                self.recorded[index] = Recorded(**state["recorded"])
        for number, weight in enumerate(self.weights.values()):
            kept = [state["optimizer"][number] for state in ordered]
            self.optimizer.state[weight] = {
                name: (value if value.ndim == 0 else torch.stack([each[name] for each in kept])).to(
                    self.device, copy=True
                )
                for name, value in kept[0].items()
            }
        if self.drop_at is not None and self.done >= self.drop_at:
            self._drop_rate()
        if self.average_decay is not None:
            self.newest_share.fill_(1.0 - self.average_decay)


# ---- what determines a training


def settings_of(run: Run) -> dict[str, Any]:
    """The configuration of a training's experiment."""
    settings: dict[str, Any] = yaml.safe_load(experiment_config(run.experiment).read_text())
    return settings


def has_guard(run: Run) -> bool:
    """Whether losses over 50 are replaced by their square roots."""
    guard: bool = settings_of(run)["model"]["guard"]
    return guard or method_of(run.method).published


def average_decay(run: Run) -> float | None:
    """The decay of the moving average of the weights; None if the training keeps none."""
    callbacks = settings_of(run)["trainer"].get("callbacks", [])
    decays: list[float] = [each["init_args"]["decay"] for each in callbacks] if run.average else []
    return decays[0] if decays else None


def initial_network(run: Run) -> torch.nn.Module:
    """The network that a training by itself would have with the same seed."""
    pl.seed_everything(run.seed, verbose=False)
    return Supersampling(width=run.width).network


def key_of_images(run: Run) -> tuple[Any, ...]:
    """A key that determines a training's images."""
    return (
        run.data,
        run.root,
        run.batch_size,
        run.outlier_fraction,
        run.outlier_kind or "hot_pixels",
        run.seed,
    )


def datamodule(key: tuple[Any, ...]) -> CIFAR10Supersampling:
    """The datamodule for a key from `key_of_images`."""
    data, root, batch_size, fraction, kind, seed = key
    return CIFAR10Supersampling(
        data=data,
        root=root,
        batch_size=batch_size,
        outlier_fraction=fraction,
        outlier_kind=kind,
        seed=seed,
    )


def source(key: tuple[Any, ...]) -> TrainingBatches:
    """The training batches for a key from `key_of_images`."""
    return datamodule(key).train_dataloader()


def endless(batches: TrainingBatches) -> Iterator[Any]:
    """The batches, epoch after epoch."""
    while True:
        yield from batches


def shared_settings_of(run: Run) -> tuple[Any, ...]:
    """What trainings must share to be stacked."""
    return (
        run.batch_size,
        run.width,
        run.steps,
        run.precision,
        run.optimizer,
        run.learning_rate,
        average_decay(run),
    )


# ---- a grid


def train_together(
    runs: Sequence[Run], output: Path, count: int, report: Callable[[int], None] | None = None
) -> None:
    """Train in stacks of ``count``, and save each training as if it had run by itself.

    Finished trainings are skipped. Interrupted ones continue from their checkpoints, stacked with
    other trainings of the same step.

    Args:
        runs: the trainings.
        output: directory of their results.
        count: trainings in a stack.
        report: called regularly with the number of steps done.
    """
    check(runs)
    with ExitStack() as locks:
        for run in runs:
            folder = output / run.name
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(FileLock(folder / files.LOCK))
        todo = [run for run in runs if not files.is_finished(output / run.name)]
        with Progress() as progress:
            for group, states in groups(todo, output, count):
                task = progress.add_task(f"{len(group)} trainings at once", total=group[0].steps)

                def on_step(step: int, task: Any = task) -> None:
                    progress.update(task, completed=step)
                    if report is not None:
                        report(step)

                train_group(group, output, states, on_step)
                files.update_table(output)
    files.write_table(output)


def groups(
    runs: Sequence[Run], output: Path, count: int
) -> Iterator[tuple[list[Run], dict[str, Any]]]:
    """The stacks of trainings to run, with the states that they continue from."""
    alike_runs: dict[tuple[Any, ...], list[Run]] = {}
    states = {}
    for run in runs:
        state = read_state(output / run.name)
        if state is not None:
            states[run.name] = state
        alike_runs.setdefault(
            (*shared_settings_of(run), 0 if state is None else state["done"]), []
        ).append(run)
    for alike in alike_runs.values():
        for first in range(0, len(alike), count):
            group = alike[first : first + count]
            yield group, {run.name: states[run.name] for run in group if run.name in states}


def train_group(
    runs: Sequence[Run], output: Path, states: dict[str, Any], report: Callable[[int], None]
) -> None:
    """Train a stack of runs to the end, with checkpoints, and save them."""
    for run in runs:
        files.clear_unfinished(output / run.name)
        files.write_json(output / run.name / files.RUN, run.determinants)
    trainer = tester(runs[0])
    trainings = Trainings(runs, trainer.strategy.root_device, states)
    report(trainings.done)
    steps, every = runs[0].steps, runs[0].checkpoint_every
    while trainings.done < steps:
        trainings.train(min(steps, (trainings.done // every + 1) * every), report)
        for index, run in enumerate(runs):
            write_state(output / run.name, trainings.state(index))
    for index, run in enumerate(runs):
        folder = output / run.name
        results.save(folder, result_of(run, trainings.state(index), trainer))
        (folder / CHECKPOINT).unlink(missing_ok=True)


def tester(run: Run) -> pl.Trainer:
    """A Trainer for the tests of a training."""
    use_full_float32()
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=1,
        precision=run.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def result_of(run: Run, state: dict[str, Any], trainer: pl.Trainer) -> results.Result:
    """Test a training in its present state."""
    recorder = Recorded(**state["recorded"]).recorder(run.steps, state["weights"])
    data = datamodule(key_of_images(run))
    module = Supersampling(width=run.width, loss=run.loss, guard=has_guard(run))  # type: ignore[arg-type]

    def tested(weights: dict[str, Tensor]) -> dict[str, float]:
        module.network.load_state_dict(weights)
        return test(trainer, module, data)

    average = tested(state["average"]) if state["average"] else {}
    row = row_of(run, recorder, tested(state["weights"]), average)
    clips = method_of(run.method).num_stddev < torch.inf
    row["clipped"] = int(state["moments"]["clipped"]) if clips else None
    return results.Result(row, recorder.history(), restored_images(module, data))


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Overwrite the checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write_whole(folder / CHECKPOINT, buffer.getvalue())


def read_state(folder: Path) -> dict[str, Any] | None:
    """The checkpoint of an interrupted training, if there is one."""
    path = folder / CHECKPOINT
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def write_cut_off(runs: Sequence[Run], output: Path) -> int:
    """Write `cut-off.csv`, with a row for each training that has a checkpoint and is not finished.

    Each row is measured at the checkpoint's step: `steps` is the number of steps done, and
    `steps_asked` the number asked for. The training can still be resumed. If there is no such
    training, an old table is removed.

    Returns:
        The number of rows.
    """
    rows = []
    for run in runs:
        state = read_state(output / run.name)
        if state is None or files.is_finished(output / run.name):
            continue
        done = state["done"]
        short = replace(run, steps=done, last_steps=min(run.last_steps, done))
        rows.append(result_of(short, state, tester(run)).row | {"steps_asked": run.steps})
    if rows:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_whole(output / CUT_OFF_TABLE, text.getvalue().encode())
    else:
        (output / CUT_OFF_TABLE).unlink(missing_ok=True)
    return len(rows)
