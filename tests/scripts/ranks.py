"""Fits over several ranks: ``python ranks.py FOLDER STRATEGY RANKS SCENARIO...``.

Some scenarios have a strategy of their own.

Every rank writes what it saw of each scenario to ``FOLDER/SCENARIO-RANK.json``. Lightning starts
this script once more for each further rank. The package's root must be on the PYTHONPATH.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder, ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, parallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_alrc import ALRC, ALRCCallback, ALRCMixin
from tests.conftest import on_device
from tests.nets import SETTINGS, callback_of

STEPS = 8
BATCH = 8
NAN_STEPS = (2, 5)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """The batch of all ranks in a step; every third sample's loss is a spike."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1)
    y[::3] *= 9.0
    return x, y


class Batches:
    """This rank's share of the batches of ``steps``, in an order that a checkpoint can continue."""

    def __init__(self, steps: Any, rank: int, ranks: int, uneven: bool = False) -> None:
        self.steps, self.rank, self.ranks, self.uneven = list(steps), rank, ranks, uneven
        self.given = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Any]:
        while self.given < len(self):
            step = self.steps[self.given]
            self.given += 1
            x, y = global_batch(step)
            edges = [BATCH * rank // self.ranks for rank in range(self.ranks + 1)]
            if self.uneven:
                # Each rank has one sample. Except in the last step, the last rank has all further
                # samples, too.
                edges = [*range(self.ranks), BATCH if step < STEPS - 1 else self.ranks]
            own = slice(edges[self.rank], edges[self.rank + 1])
            yield x[own], y[own], step

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Plain(pl.LightningModule):
    """One linear layer in float64 with a loss for each sample. Losses are kept by name."""

    def __init__(self, optimizer: str = "sgd", **policy: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.fill_(0.25)
        self.optimizer, self.policy = optimizer, policy
        self.data: dict[str, Any] = {}
        self.seen: list[dict[str, list[float]]] = []

    def train_dataloader(self) -> Batches:
        return Batches(rank=self.global_rank, ranks=self.trainer.world_size, **self.data)

    def losses(self, batch: Any) -> Tensor:
        x, y, _ = batch
        return (self.layer(x)[:, 0] - y) ** 2

    def remember(self, name: str, loss: Tensor) -> Tensor:
        self.seen[-1][name] = loss.tolist()
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append({})
        return self.remember("loss", self.losses(batch)).mean()

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        adam = torch.optim.AdamW(self.parameters(), 0.05, fused=self.optimizer == "fused")
        if self.optimizer != "scheduled":
            return adam
        scheduler = torch.optim.lr_scheduler.ExponentialLR(adam, 0.9)
        return [adam], [{"scheduler": scheduler, "interval": "step"}]


class Net(ALRCMixin, Plain):
    """The same with ALRC, sample by sample."""

    def configure_alrc(self) -> ALRCCallback:
        return ALRCCallback(**(SETTINGS | self.policy))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append({})
        return self.remember("loss", self.losses(batch))


class Named(Net):
    """Two losses; with ``late``, the first rank has a third loss from step 3 on."""

    late = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append({})
        losses = self.losses(batch)
        total = self.alrc(self.remember("first", losses), "first").mean()
        total = total + self.alrc(self.remember("second", 3 * losses[:1]), "second").mean()
        if self.late and self.global_rank == 0 and batch_idx >= 3:
            total = total + self.alrc(self.remember("late", 2 * losses), "late").mean()
        return total


class Late(Named):
    late = True


class Searching(Late):
    """A search for a learning rate runs before the fit."""

    lr = 0.01
    finder: type[LearningRateFinder] = LearningRateFinder

    def configure_callbacks(self) -> list[pl.Callback]:
        finder = self.finder(num_training_steps=6, update_attr=False, early_stop_threshold=None)
        return [*super().configure_callbacks(), finder]

    def train_dataloader(self) -> Any:
        # The fit after the search starts with the first batch again.
        return DataLoader(list(super().train_dataloader()), batch_size=None)  # type: ignore[arg-type]


class FinderInFit(LearningRateFinder):
    """Searches at the start of an epoch, as Lightning's guide shows it."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.lr_find(trainer, module)


class SearchingInFit(Searching):
    finder = FinderInFit


class Many(Net):
    """A separate loss for each of 64 parts of a network."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append({})
        losses = self.losses(batch)
        return torch.stack(
            [self.alrc(part * losses, f"part{part}").mean() for part in range(1, 65)]
        ).mean()


class Compiled(Named):
    """Two losses that are not kept: appending them to a list would recompile each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.losses(batch)
        return self.alrc(losses, "first").mean() + self.alrc(3 * losses[:1], "second").mean()


class Manual(Net):
    def __init__(self, *args: Any, **policy: Any) -> None:
        super().__init__(*args, **policy)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Sharded(Net):
    """Its layer is sharded by FSDP2."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


class Spread(Net):
    """Tensor parallelism splits its layer and its losses over the ranks.

    With a policy, the losses of ``NAN_STEPS`` are NaN.
    """

    def configure_model(self) -> None:
        rowwise = parallel.RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False
        )
        parallel.parallelize_module(self.layer, self.device_mesh["tensor_parallel"], rowwise)

    def train_dataloader(self) -> Batches:
        return Batches(rank=0, ranks=1, **self.data)  # the same batches on all ranks

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append({})
        x, y, step = batch
        mesh: Any = self.device_mesh["tensor_parallel"]
        losses = (self.layer(x).sum(1) - DTensor.from_local(y, mesh, [Replicate()])) ** 2
        return losses * math.nan if self.policy and step in NAN_STEPS else losses


class Poisoned(Net):
    """The last rank's losses are NaN in some steps; their gradients are unchanged."""

    def losses(self, batch: Any) -> Tensor:
        losses = super().losses(batch)
        last = self.global_rank == self.trainer.world_size - 1
        return losses + math.nan if last and batch[2] in NAN_STEPS else losses


class Spiking(Net):
    """The last rank's losses spike in some steps; their gradients are unchanged."""

    spiking_steps: tuple[int, ...] = NAN_STEPS

    def losses(self, batch: Any) -> Tensor:
        losses = super().losses(batch)
        last = self.global_rank == self.trainer.world_size - 1
        return losses + 1e9 if last and batch[2] in self.spiking_steps else losses


class SpikingLater(Spiking):
    """Its spike may be judged: enough calls come before it."""

    spiking_steps = (28,)


class LossesInClosure(Poisoned, Manual):
    """Computes its losses in the optimizer's closure."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Any:
            optimizer.zero_grad()
            loss = Net.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss.mean()

        optimizer.step(closure=closure)


class Resetting(Net):
    """Resets the moments in step 3, right after a call clipped a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append({})
        losses = self.alrc(self.remember("x", 100 + self.losses(batch) / 100), "x")
        if batch_idx == 3:
            callback_of(self.trainer).reset("x")
        return losses.mean()


class LatePoisoned(Net):
    """In step 1, all ranks add a new loss. It is NaN in that step, and so are its gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append({})
        losses = self.losses(batch)
        total = self.alrc(self.remember("loss", losses), "loss").mean()
        if batch_idx >= 1:
            losses = losses * math.nan if batch_idx == 1 else losses
            total = total + self.alrc(self.remember("late", losses), "late").mean()
        return total


class Failing(Named):
    """One rank fails in step 3."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3 and self.global_rank == int(os.environ["FAILING_RANK"]):
            raise RuntimeError("this rank fails")
        return super().training_step(batch, batch_idx)


class Leaving(Named):
    """Fails if a thread still holds tensors of gathered objects when a fit ends.

    Here the interpreter does not switch threads by itself.
    """

    def setup(self, stage: str) -> None:
        sys.setswitchinterval(100)

    def teardown(self, stage: str) -> None:
        sys.setswitchinterval(0.005)
        tensors = [each for each in gc.get_objects() if type(each) is Tensor]
        if any(each.dtype == torch.uint8 for each in tensors):
            raise RuntimeError("gathered objects are still held")


class Collectives(TorchDispatchMode):
    """Counts the collectives between the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Recorder(pl.Callback):
    """Writes each step's losses, moments, collectives and weights.

    It counts collectives only if nothing is compiled.
    """

    def __init__(self, folder: Path, scenario: str, counts: bool) -> None:
        self.folder, self.scenario, self.counts = folder, scenario, counts
        self.collectives = Collectives()
        self.report: dict[str, Any] = {"moments": [], "collectives": [], "weights": [], "error": ""}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self.counts:
            self.collectives.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        calls, self.collectives.calls = self.collectives.calls, []
        self.report["collectives"].append(calls)
        self.report["weights"].append(weights(module))
        for callback in trainer.callbacks:
            if isinstance(callback, ALRCCallback):
                self.report["moments"].append(moments(callback.losses))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.finish(trainer, module)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.report["error"] = f"{type(exception).__name__}: {exception}"
        self.finish(trainer, module)

    def finish(self, trainer: Any, module: Any) -> None:
        self.report |= {"seen": module.seen, "final": weights(module)}
        callbacks = [each for each in trainer.callbacks if isinstance(each, ALRCCallback)]
        self.report["at_end"] = [moments(each.losses) for each in callbacks]
        metrics = trainer.callback_metrics
        self.report["monitored"] = {name: metrics[name].item() for name in metrics}
        if self.counts:
            self.collectives.__exit__(None, None, None)
        else:
            counters = torch._dynamo.utils.counters
            self.report |= {name: dict(counters[name]) for name in ("stats", "graph_break")}
        path = self.folder / f"{self.scenario}-{trainer.global_rank}.json"
        path.write_text(json.dumps(self.report))


def weights(module: Any) -> list[float]:
    values = [getattr(each, "full_tensor", lambda e=each: e)() for each in module.parameters()]
    return [value for each in values for value in each.flatten().tolist()]


def moments(losses: Mapping[str, ALRC]) -> dict[str, dict[str, float]]:
    names = ("mu1", "mu2", "losses_total", "clipped_total", "nonfinite_total")
    return {
        loss: {name: getattr(alrc, name).item() for name in names} for loss, alrc in losses.items()
    }


def unclipped(policy: str = "skip", **settings: Any) -> dict[str, Any]:
    """Settings that clip nothing, so that a run without the bad steps has equal weights."""
    return {"nonfinite": policy, "num_stddev": math.inf, **settings}


STRATEGIES: dict[str, Callable[[int], Any]] = {
    "fsdp2": lambda ranks: ModelParallelStrategy(ranks, 1),
    "tensor_parallel": lambda ranks: ModelParallelStrategy(1, ranks),
}
SKIPS_SPIKES = unclipped("propagate", num_stddev=6, on_spike="skip", decay=1 - 1e-15) | {
    "mu1_start": 1.0,
    "mu2_start": 1e8,
}
SHARDED: dict[str, Any] = {"net": Sharded, "strategy": "fsdp2"}
JUDGING: dict[str, Any] = {
    "net": SpikingLater,
    "steps": range(40),
    "policy": {"num_stddev": 6},
}
SPREAD: dict[str, Any] = {"net": Spread, "strategy": "tensor_parallel"}
FINE_STEPS = [step for step in range(STEPS) if step not in NAN_STEPS]
SCENARIOS: dict[str, dict[str, Any]] = {
    "even": {"net": Net},
    "uneven": {"net": Net, "uneven": True},
    "accumulating": {"net": Net, "accumulate_grad_batches": 3},
    "manual": {"net": Manual},
    "named": {"net": Named},
    "compiled": {"net": Compiled, "compiles": True},
    "late": {"net": Late},
    "late, unlogged": {"net": Late, "log_every_n_steps": 0},
    "late, logged last": {"net": Late, "log_every_n_steps": STEPS},
    "late, saving": {
        "net": Late,
        "log_every_n_steps": 50,
        "saves": "late-{step}",
        "policy": {"record": 0},  # the folder has the record of "saving"
    },
    "searching": {"net": Searching},
    "searching in the fit": {"net": SearchingInFit},
    "searching in the fit, skipping": {"net": SearchingInFit, "policy": {"nonfinite": "skip"}},
    "many": {"net": Many},
    "poisoned": {"net": Poisoned},
    "in a closure, with bad steps": {"net": LossesInClosure, "policy": unclipped()},
    "in a closure, without bad steps": {
        "net": LossesInClosure,
        "policy": unclipped(),
        "steps": FINE_STEPS,
    },
    "in a closure, raising": {"net": LossesInClosure, "policy": {"nonfinite": "raise"}},
    "resetting": {"net": Resetting},
    "raising": {"net": Poisoned, "policy": {"nonfinite": "raise"}},
    "late, skipping": {
        "net": LatePoisoned,
        "policy": {"nonfinite": "skip"},
        "log_every_n_steps": 50,
    },
    "late, raising": {
        "net": LatePoisoned,
        "policy": {"nonfinite": "raise"},
        "log_every_n_steps": 50,
    },
    "failing": {"net": Failing},
    "leaving": {"net": Leaving, "log_every_n_steps": 50},
    "saving": {"net": Net, "saves": "{step}", "policy": {"save_batches": 2}},
    "resuming": {"net": Net, "resumes": "resumed.ckpt"},
    "judging": JUDGING | {"saves": "judged/{step}"},
    "judging, resuming": JUDGING | {"resumes": "judged/step=32.ckpt", "saves": "judged/again"},
    "plain": {"net": Plain},
    "plain, accumulating": {"net": Plain, "accumulate_grad_batches": 3},
    "sharded": SHARDED,
    "sharded, saving": SHARDED | {"saves": "sharded-{step}"},
    "sharded, resuming": SHARDED | {"resumes": "sharded-step=4.ckpt"},
    "spread": SPREAD,
    "spread, as on an accelerator": SPREAD | {"device": True},
    "spread, raising": SPREAD | {"policy": {"nonfinite": "raise"}},
} | {
    f"{optimizer}, {which} bad steps": {
        "net": Poisoned,
        "optimizer": optimizer,
        "policy": unclipped(),
        "steps": steps,
    }
    for optimizer in ("sgd", "fused", "unfused", "scheduled")
    for which, steps in {"with": range(STEPS), "without": FINE_STEPS}.items()
}
SCENARIOS |= {
    f"{optimizer}, {which} spikes": {
        "net": Spiking,
        "optimizer": optimizer,
        "policy": SKIPS_SPIKES,
        "steps": steps,
    }
    for optimizer in ("fused", "scheduled")
    for which, steps in {"with": range(STEPS), "without": FINE_STEPS}.items()
}


def run(
    folder: Path,
    usual_strategy: str,
    ranks: int,
    scenario: str,
    net: type[Net],
    strategy: str = "",
    optimizer: str = "sgd",
    policy: Any = None,
    steps: Any = None,
    uneven: bool = False,
    saves: str = "",
    resumes: str = "",
    compiles: bool = False,
    device: bool = False,
    **trainer_arguments: Any,
) -> None:
    module = net(optimizer, **(policy or {}))
    module.data = {"steps": range(STEPS) if steps is None else steps, "uneven": uneven}
    recorder = Recorder(folder, scenario, counts=not compiles)
    strategy = strategy or usual_strategy
    path = folder / saves
    saving = ModelCheckpoint(path.parent, path.name, save_top_k=-1, every_n_train_steps=4)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": STRATEGIES[strategy](ranks) if strategy in STRATEGIES else strategy,
        "max_epochs": 1,
        "logger": False,
        "log_every_n_steps": 2,
        "enable_checkpointing": bool(saves),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "callbacks": [recorder, *[saving] * bool(saves)],
    }
    trainer = pl.Trainer(**(defaults | trainer_arguments))
    if compiles:
        module = torch.compile(module, backend="eager")
    with pytest.MonkeyPatch.context() as patch:
        if device:
            on_device(patch)
        try:
            trainer.fit(module, ckpt_path=folder / resumes if resumes else None)
        except FloatingPointError:
            assert "FloatingPointError" in recorder.report["error"]


def leave() -> None:
    """End this process at once.

    A gloo thread may still hold a tensor of Lightning or DDP. The thread would abort the
    interpreter's shutdown, even after the process group was destroyed.
    """
    sys.stdout.flush()
    os._exit(0)


def main(folder: Path, strategy: str, ranks: int, *scenarios: str) -> None:
    faulthandler.dump_traceback_later(560)  # shows where it hangs, before the timeout kills it
    for scenario in scenarios:
        run(folder, strategy, ranks, scenario, **SCENARIOS[scenario])
    leave()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, strategy, ranks, *scenarios = sys.argv[1:]
    main(Path(folder), strategy, int(ranks), *scenarios)
