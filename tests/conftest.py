"""Fixtures shared by the tests: all code paths, both namespaces, and quiet Trainers."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

# Triton's interpreter runs the kernel on the CPU. The GPU tests run the compiled kernel instead.
# Triton reads the variable once, when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if "gpu" in sys.argv else "1")

import pytest
import torch
from _pytest.doctest import DoctestModule
from hypothesis import HealthCheck, settings

from lightning_alrc._moments import accelerator, paths, tensors
from lightning_alrc._telemetry import telemetry
from tests import nets, offline_wandb

quiet = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
settings.register_profile("alrc", max_examples=60, deadline=None, suppress_health_check=quiet)
settings.load_profile("alrc")


def pytest_configure(config: pytest.Config) -> None:
    for message in (
        "Consider setting `persistent_workers",
        "`training_step` returned `None`",
        "The number of training batches",
        "Checkpoint directory",
        "You defined a `validation_step`",
        "TensorBoardLogger|Starting from v1.9.0",
        "`isinstance.treespec, LeafSpec",
        "The `srun` command",
        "GPU available but not used",
        "`torch.jit",
        "The loss is a tensor of",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:.*{message}.*")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path) -> Generator[None, list[Any], list[Any]]:
    """Do not look for doctests in files of tests.

    If a file of tests cannot be imported, the search for doctests skips it, and leaves the
    unfinished module in sys.modules. Pytest 9.2 then looks for tests in this module: it finds none,
    and reports no error.
    """
    found = yield
    if not file_path.name.startswith("test_"):
        return found
    return [each for each in found if not isinstance(each, DoctestModule)]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _short_collections() -> None:
    """Leave what all imports made out of garbage collections.

    Such a collection takes a second with them. Lightning's tuners, for one, do it in each trial.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def _keep_denormals() -> None:
    torch.set_flush_denormal(False)  # torch 2.5's Inductor leaves flushing on


@pytest.fixture(params=["host", "device"])
def quick_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two paths that take microseconds a call, for tests with thousands of calls."""
    if request.param != "host":
        on_device(monkeypatch)
    return str(request.param)


@pytest.fixture(params=["host", "device", "kernel"])
def each_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """CPU losses on the CPU's own path, on a device's path, and on a device's path with Triton."""
    if request.param != "host":
        on_device(monkeypatch, request.param)
    return str(request.param)


def paths_with(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """All cases of `each_path` and these parameters, but few of them with the kernel.

    Triton's interpreter takes ten times as long as the other paths. What a kernel returns is
    handled as on a device without Triton, so each value of each parameter occurs with it, but not
    each combination.
    """
    values = [list(each) for each in parameters]
    fewest = min(map(len, values))
    few = [
        tuple(of_each[index] for of_each, index in zip(values, case, strict=True))
        for case in product(*(range(len(each)) for each in values))
        if sum(case) % fewest == 0
    ]
    quick = [(path, *case) for path in ("host", "device") for case in product(*values)]
    return quick + [("kernel", *case) for case in few]


def on_device(monkeypatch: pytest.MonkeyPatch, path: str = "device") -> None:
    """Treat CPU losses as those of a device, by tensor operations or by the kernel."""
    if path == "kernel" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")

    def path_of(loss: torch.Tensor) -> Any:
        uses_kernel = path == "kernel" and type(loss) is torch.Tensor
        return accelerator if uses_kernel and not torch.compiler.is_compiling() else tensors

    monkeypatch.setattr(paths, "path_of", path_of)
    if path == "kernel":
        monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.__call__", interpreted)


PREPARED: set[Callable[..., Any]] = set()
"""Functions within kernels that the interpreter has called, see `interpreted`."""


def interpreted(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function within a kernel.

    At every call, Triton's interpreter looks through all of ``triton.language`` for functions to
    replace. Only the first call finds any. Without the search, a kernel takes 60 % of the time.
    """
    if function.fn not in PREPARED:
        PREPARED.add(function.fn)
        from triton.runtime import interpreter

        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat CPU losses as those of a device without Triton."""
    on_device(monkeypatch)


@pytest.fixture
def kernel_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat CPU losses as those of a device with Triton."""
    on_device(monkeypatch, "kernel")


@pytest.fixture(params=list(nets.NAMESPACES))
def namespace(request: pytest.FixtureRequest) -> str:
    """``pytorch_lightning`` and ``lightning.pytorch``."""
    return str(request.param)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Makes a Trainer of a module's namespace, by default quiet and without checkpoints."""

    def make(net: Any, **arguments: Any) -> Any:
        unified = isinstance(net, nets.NAMESPACES["lightning.pytorch"].LightningModule)
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path / "root",
        }
        package = nets.NAMESPACES["lightning.pytorch" if unified else "pytorch_lightning"]
        return package.Trainer(**(defaults | arguments))

    return make


@pytest.fixture
def fit(make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    """Fit a module with callbacks and Trainer arguments; returns the Trainer."""

    def fit(
        net: Any, *callbacks: Any, ckpt_path: Any = None, batches: Any = None, **arguments: Any
    ) -> Any:
        trainer = make_trainer(net, callbacks=list(callbacks), **arguments)
        trainer.fit(net, batches, ckpt_path=ckpt_path)
        return trainer

    return fit


@pytest.fixture
def charts_of_short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw charts of fits shorter than a minute, too."""
    monkeypatch.setattr(telemetry, "SHORTEST_FIT_WITH_CHARTS", 0.0)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from this checkout."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture
def wandb_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes offline WandbLoggers of a namespace, all under ``tmp_path``.

    :func:`tests.offline_wandb.finished` finishes the run of a logger and reads it.
    """
    with offline_wandb.loggers(tmp_path, monkeypatch) as make:
        yield make


@pytest.fixture(scope="session")
def new_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow without runs. MLflow takes seconds to make one."""
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    place = tmp_path_factory.mktemp("new_mlflow_database") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{place}").search_experiments()
    return place


@pytest.fixture
def mlflow_database(new_mlflow_database: Path, tmp_path: Path) -> Path:
    """A database of MLflow for one test, ``mlflow.db`` in ``tmp_path``."""
    return Path(shutil.copy(new_mlflow_database, tmp_path))
