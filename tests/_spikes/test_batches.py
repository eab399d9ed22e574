"""Batches that spiked are kept in files, without disturbing the training."""

from __future__ import annotations

import copy
import errno
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_alrc import ALRCCallback, replay
from lightning_alrc._spikes.batches import load_batch
from tests.nets import NAMESPACES, NETS, SETTINGS, Net, ResumableLoader, callback_of, loader
from tests.spikes import FOLDER

Fit = Callable[..., Any]


def run(fit: Fit, folder: Path, net: Any = None, count: bool | int = True, **kwargs: Any) -> Any:
    """Fit with batches kept, and return the callback."""
    net = Net("vector") if net is None else net
    package = NAMESPACES["pytorch_lightning" if isinstance(net, Net) else "lightning.pytorch"]
    saving = package.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1
    )
    kwargs = {"enable_checkpointing": True} | kwargs
    return callback_of(fit(net, ALRCCallback(**SETTINGS, save_batches=count), saving, **kwargs))


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: load_batch(path) for path in sorted((folder / FOLDER).iterdir())}


def worst_files(callback: ALRCCallback, count: int) -> set[str]:
    return set(list(dict.fromkeys(spike.batch_file for spike in callback.spikes))[:count])


@pytest.mark.parametrize("count", [1, 3, 10, True])
def test_the_batches_of_the_worst_spikes_are_kept(
    fit: Fit, tmp_path: Path, namespace: str, count: bool | int
) -> None:
    net = NETS[namespace]("vector")
    callback = run(fit, tmp_path, net, count, log_every_n_steps=5)
    kept = contents(tmp_path)
    assert kept.keys() == worst_files(callback, 10 if count is True else count)
    assert 0 < len(kept) <= (10 if count is True else count)
    batches = list(loader())
    for spike in callback.spikes:
        if spike.batch_file in kept:
            content = kept[spike.batch_file]
            assert (content["batch_idx"], content["epoch"]) == (spike.batch_idx, spike.epoch)
            assert content["global_step"] == spike.step
            for found, expected in zip(content["batch"], batches[spike.batch_idx], strict=True):
                assert torch.equal(found, expected)


def test_no_batch_is_kept_if_save_batches_is_false(fit: Fit, tmp_path: Path) -> None:
    run(fit, tmp_path, count=False)
    assert not (tmp_path / FOLDER).exists()


def test_a_resumed_run_keeps_the_batches_of_an_uninterrupted_run(fit: Fit, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(fit, whole, count=3, batches=ResumableLoader())
    run(fit, resumed, count=3, batches=ResumableLoader(), max_epochs=1)
    before = batches_in(resumed)
    checkpoint = resumed / "step=6.ckpt"
    run(fit, resumed, count=3, batches=ResumableLoader(), ckpt_path=checkpoint)
    assert batches_in(resumed) == batches_in(whole) != before


def batches_in(folder: Path) -> set[tuple[int, float]]:
    # Names are not compared, because Lightning 2.4 counts one batch too few after resuming.
    return {
        (content["epoch"], content["batch"][0].sum().item())
        for content in contents(folder).values()
    }


def test_a_run_that_is_resumed_in_another_folder_keeps_its_own_worst_batches(
    fit: Fit, tmp_path: Path
) -> None:
    """All spikes from before the resume are worse than those after it."""
    first, second = tmp_path / "first", tmp_path / "second"
    far = [(x, 100.0 * y) for x, y in loader()]
    run(fit, first, count=2, batches=DataLoader(far, batch_size=None), max_epochs=1)  # type: ignore[arg-type]
    net = Net("vector")
    callback = run(fit, second, net, count=2, ckpt_path=first / "step=6.ckpt")
    later = [spike.batch_file for spike in callback.spikes if spike.epoch == 1]
    assert contents(second).keys() == set(list(dict.fromkeys(later))[:2])
    worst = callback.spikes[0]
    assert worst.epoch == 0
    assert (first / FOLDER / worst.batch_file).exists()
    with pytest.raises(FileNotFoundError, match="or an earlier folder of a resumed run has it"):
        replay(second / FOLDER / worst.batch_file, net)


def test_runs_in_one_folder_keep_separate_batches(fit: Fit, tmp_path: Path) -> None:
    for _ in range(2):
        run(fit, tmp_path, count=2)
    assert len(list((tmp_path / FOLDER).iterdir())) == 2
    assert len(list((tmp_path / f"{FOLDER}-v1").iterdir())) == 2


class Slices(DataLoader[Any]):
    """Batches that are views of one large tensor."""

    def __init__(self) -> None:
        super().__init__(range(12))  # type: ignore[arg-type]
        self.x = torch.randn(1_000_000, 3)
        self.y = torch.zeros(1_000_000, 2)
        self.y[8] = 100.0

    def __iter__(self) -> Any:
        for index in range(12):
            yield self.x[index : index + 1], self.y[index : index + 1]


def test_a_view_is_kept_without_its_base(fit: Fit, tmp_path: Path) -> None:
    run(fit, tmp_path, count=1, batches=Slices(), max_epochs=1)
    (path,) = (tmp_path / FOLDER).iterdir()
    assert path.name == "epoch=0-batch=8-step=8-rank=0.pt"
    assert path.stat().st_size < 50_000


class Unpicklable(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[:2], batch_idx)

    def train_dataloader(self) -> Any:
        batches = [(x, y, lambda: None) for x, y in loader()]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_a_batch_that_cannot_be_kept_gives_one_warning(fit: Fit, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not kept in .*: its type list cannot be") as caught:
        callback = run(fit, tmp_path, Unpicklable("vector"))
    assert len(callback.spikes) > 3
    assert len([each for each in caught if "not kept" in str(each.message)]) == 1
    assert not list((tmp_path / FOLDER).iterdir())


def test_a_batch_that_cannot_be_kept_is_warned_of_in_the_first_step(
    fit: Fit, tmp_path: Path
) -> None:
    class Watching(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            told.append(sum("not kept" in str(each.message) for each in caught))

    told: list[int] = []
    callback = ALRCCallback(save_batches=True)  # nothing is clipped yet
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saving = ModelCheckpoint(tmp_path)
        callbacks = [callback, saving, Watching()]
        fit(Unpicklable("vector"), *callbacks, enable_checkpointing=True, max_epochs=1)
    assert told == [1] * 6
    assert callback.spikes == []


class Fields:
    """A batch of a class that Lightning does not look into."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self


@dataclass(frozen=True)
class Frozen:
    """A batch that cannot be copied field by field."""

    x: Any
    y: Any

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self


class Checked:
    """Checks its arguments, as anomalib's batches do, and keeps them under other names."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {value!r:.100}")
        vars(self)[f"_{name}"] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)[f"_{name}"]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self


class Replacing(Net):
    """Its step replaces the fields of the batch, or writes into the fields."""

    def __init__(self, kind: Any, in_place: bool = False) -> None:
        super().__init__("vector")
        self.kind, self.in_place = kind, in_place

    def losses(self, batch: Any) -> Tensor:
        x, y = torch.as_tensor(batch.x).clone(), torch.as_tensor(batch.y).clone()
        losses = super().losses((x, y))
        if self.in_place:
            batch.x *= 0.0
        elif not isinstance(batch, Frozen):
            batch.x, batch.y = torch.zeros(1), torch.zeros(1)
        return losses

    def train_dataloader(self) -> Any:
        batches = [self.kind(x.clone(), y.clone()) for x, y in loader()]
        return DataLoader(batches, batch_size=None, collate_fn=copy.deepcopy)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Fields, Frozen, Checked])
def test_a_batch_of_any_class_is_kept_as_the_step_received_it(
    fit: Fit, tmp_path: Path, kind: Any
) -> None:
    callback = run(fit, tmp_path, Replacing(kind), count=3)
    batches = list(loader())
    with torch.serialization.safe_globals([kind]):
        kept = contents(tmp_path)
    assert kept.keys() == worst_files(callback, 3)
    for content in kept.values():
        assert type(content["batch"]) is kind
        assert torch.equal(content["batch"].x, batches[content["batch_idx"]][0])


def test_a_batch_of_any_class_that_is_changed_in_place_gives_one_warning(
    fit: Fit, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="was not kept.*changed its tensors in place") as warned:
        run(fit, tmp_path, Replacing(Fields, in_place=True))
    assert sum("was not kept" in str(each.message) for each in warned) == 1
    assert not list(tmp_path.glob(f"{FOLDER}/*"))


def test_arrays_that_the_step_changes_are_kept_unchanged(fit: Fit, tmp_path: Path) -> None:
    def of_arrays(x: Tensor, y: Tensor) -> Fields:
        return Fields(x.numpy(), y.numpy())

    run(fit, tmp_path, Replacing(of_arrays, in_place=True), count=3)
    with torch.serialization.safe_globals([Fields]):
        kept = contents(tmp_path)
    assert len(kept) == 3
    for content in kept.values():
        x, _ = list(loader())[content["batch_idx"]]
        assert (content["batch"].x == x.numpy()).all()


def test_a_file_has_the_state_before_its_step(fit: Fit, tmp_path: Path) -> None:
    class Scheduled(Net):
        def __init__(self) -> None:
            super().__init__("vector")
            self.frozen = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=torch.tensor(1.0))
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    callback = run(fit, tmp_path, Scheduled(), max_epochs=1, count=2)
    for name, content in contents(tmp_path).items():
        assert content["learning_rates"] == [[0.5 ** content["batch_idx"]]]
        assert content["eval_modules"] == ["frozen", "frozen.0"]
        raw = torch.load(tmp_path / FOLDER / name, weights_only=True)
        assert raw["run"] == callback._recording._run


class Rateless(torch.optim.Optimizer):
    """Computes its own rates, as Adafactor may. Here it leaves the parameters as they are."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return None if closure is None else closure()


@pytest.mark.parametrize("defaults", [{}, {"lr": None}])
def test_batches_are_kept_if_the_optimizer_has_no_learning_rate(
    fit: Fit, tmp_path: Path, defaults: dict[str, Any]
) -> None:
    net = Net("vector")
    net.optimizer = lambda: Rateless(net.parameters(), defaults)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a batch was not kept")
        callback = run(fit, tmp_path, net, count=1)
    spike = callback.spikes[0]
    content = contents(tmp_path)[spike.batch_file]
    assert content["learning_rates"] is None
    losses = replay(tmp_path / FOLDER / spike.batch_file, net)["loss"]
    assert losses[spike.sample].item() == spike.loss


def test_a_file_of_an_earlier_release_loads(fit: Fit, tmp_path: Path) -> None:
    run(fit, tmp_path, count=1)
    (path,) = (tmp_path / FOLDER).iterdir()
    content = torch.load(path, weights_only=True)
    old = {"batch", "batch_idx", "epoch", "global_step", "cpu_generator"}
    torch.save({key: content[key] for key in old} | {"cuda_generator": None}, path)
    assert load_batch(path)["learning_rates"] is None
    torch.testing.assert_close(load_batch(path)["batch"], content["batch"], rtol=0, atol=0)


def test_files_of_another_run_are_neither_overwritten_nor_removed(fit: Fit, tmp_path: Path) -> None:
    """While this run continues, another run resumes from the checkpoint and takes files over."""
    taken: dict[str, bytes] = {}

    class Other(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            for path in (tmp_path / FOLDER).iterdir():
                if trainer.global_step <= 6 and path.name not in taken:
                    content = torch.load(path, weights_only=True)
                    torch.save(content | {"run": "abc"}, path)
                    taken[path.name] = path.read_bytes()

    callback = ALRCCallback(**SETTINGS, save_batches=1)
    saving = ModelCheckpoint(tmp_path)
    growing = [(x, step * y) for step, (x, y) in enumerate([*loader()] * 5)]
    batches = DataLoader(growing, batch_size=None)  # type: ignore[arg-type]
    arguments = {"enable_checkpointing": True, "batches": batches, "max_epochs": 1}
    fit(Net("vector"), callback, Other(), saving, **arguments)
    assert len(taken) > 1
    for name, content in taken.items():
        assert (tmp_path / FOLDER / name).read_bytes() == content
    assert callback.spikes[0].batch_file not in taken
    assert (tmp_path / FOLDER / callback.spikes[0].batch_file).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_gives_one_warning(fit: Fit, tmp_path: Path) -> None:
    class Full(Net):
        def on_train_start(self) -> None:
            # Each file is written to a device that is always full.
            run = callback_of(self.trainer)._recording._run
            for step in range(12):
                name = f"epoch={step // 6}-batch={step % 6}-step={step}-rank=0.pt"
                (tmp_path / FOLDER / f".{name}.{run}.part").symlink_to("/dev/full")

    with pytest.warns(UserWarning, match=f"not kept.*{errno.ENOSPC}") as warned:
        callback = run(fit, tmp_path, Full("vector"))
    assert len([each for each in warned if "not kept" in str(each.message)]) == 1
    assert callback.losses["loss"].updates.item() == 12


class Changing(Net):
    """Its step changes the batch that it is given."""

    def __init__(self, how: str) -> None:
        super().__init__("vector")
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.how == "popped":
            return super().training_step((batch.pop("x"), batch.pop("y")), batch_idx)
        return super().training_step((batch["x"].mul_(2.0), batch["y"]), batch_idx)

    def train_dataloader(self) -> Any:
        batches = [{"x": x, "y": y} for x, y in loader()]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_a_batch_is_kept_as_the_step_received_it(fit: Fit, tmp_path: Path) -> None:
    callback = run(fit, tmp_path, Changing("popped"))
    batches = [{"x": x, "y": y} for x, y in loader()]
    kept = contents(tmp_path)
    assert kept
    for spike in callback.spikes:
        if spike.batch_file in kept:
            torch.testing.assert_close(
                kept[spike.batch_file]["batch"], batches[spike.batch_idx], rtol=0, atol=0
            )


def test_a_batch_that_the_step_draws_itself_is_kept(fit: Fit, tmp_path: Path) -> None:
    class Taking(Net):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    (spike, *_) = run(fit, tmp_path, Taking("vector"), count=1, max_epochs=1).spikes
    ((name, content),) = contents(tmp_path).items()
    assert name == spike.batch_file
    x, _ = list(loader())[spike.batch_idx]
    kept = content["batch"]
    kept = kept[0] if isinstance(kept[0], list | tuple) else kept
    assert torch.equal(kept[0], x)


def test_a_batch_that_was_changed_in_place_gives_one_warning(fit: Fit, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="was not kept.*changed its tensors in place") as warned:
        run(fit, tmp_path, Changing("in place"))
    assert sum("was not kept" in str(each.message) for each in warned) == 1
    assert not list(tmp_path.glob(f"{FOLDER}/*"))


def test_batches_without_a_record_are_left_alone(fit: Fit, tmp_path: Path) -> None:
    first = tmp_path / FOLDER / "epoch=0-batch=30-rank=0.pt"
    first.parent.mkdir()
    first.write_bytes(b"")
    run(fit, tmp_path)
    assert first.exists()
    assert (tmp_path / "alrc_batches-v1").is_dir()
    assert (tmp_path / "alrc_spikes-v1.jsonl").exists()


def test_batches_need_a_record_and_a_number() -> None:
    with pytest.raises(ValueError, match="save_batches must be False where record is 0, got True"):
        ALRCCallback(record=0, save_batches=True)
    with pytest.raises(ValueError, match=r"save_batches must be True, False .* got -1"):
        ALRCCallback(save_batches=-1)
    with pytest.raises(TypeError, match=r"save_batches must be True, False .* got 'all'"):
        ALRCCallback(save_batches="all")  # type: ignore[arg-type]


# ---- files


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_a_file_that_would_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"batch": Malicious()}, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=r"allow them with torch\.serialization"):
        load_batch(tmp_path / "it.pt")
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"batch": 1},
        {"batch": 1, "batch_idx": 1.0, "epoch": 0, "global_step": 0, "cpu_generator": None},
    ],
)
def test_a_file_without_a_batch_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=r"path must be a file of save_batches, got .*it\.pt"):
        load_batch(tmp_path / "it.pt")


@pytest.mark.parametrize(
    "content", [b"hello world\n", b"lr: 0.1\n", b"step,loss\n1,2\n", b"\x89PNG"]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "it.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"path must be a file of save_batches, got .*it\.pt"):
        load_batch(tmp_path / "it.pt")


def test_a_truncated_file_is_refused(fit: Fit, tmp_path: Path) -> None:
    run(fit, tmp_path, count=1)
    (path,) = (tmp_path / FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="path must be a file of save_batches"):
        load_batch(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="path must be a file of save_batches"):
        load_batch(path)
