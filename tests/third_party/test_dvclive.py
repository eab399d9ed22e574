"""dvclive's logger, which clears the folder of checkpoints if ``log_model`` is set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_alrc import ALRCCallback
from lightning_alrc.spikes import read_spikes
from tests.nets import NAMESPACES, SETTINGS, UnifiedNet

dvclive = pytest.importorskip("dvclive.lightning", reason="dvclive is not installed")


@pytest.mark.filterwarnings("ignore::UserWarning:dvclive")
def test_the_record_and_the_saved_batches_are_kept(
    fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_TEST", "1")  # dvclive then sends no analytics
    monkeypatch.chdir(tmp_path)
    logger = dvclive.DVCLiveLogger(dir=str(tmp_path / "live"), log_model="all", save_dvc_exp=False)
    callback = ALRCCallback(**SETTINGS, save_batches=5)
    checkpoints = NAMESPACES["lightning.pytorch"].callbacks.ModelCheckpoint(save_top_k=-1)
    trainer = fit(
        UnifiedNet(),
        callback,
        checkpoints,
        logger=logger,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    assert trainer.current_epoch == 2
    assert list(Path(checkpoints.dirpath).glob("*.ckpt"))
    (record,) = tmp_path.rglob("alrc_spikes.jsonl")
    assert read_spikes(record) == callback.spikes != []
    assert any(each.batch_file for each in callback.spikes)
    for each in callback.spikes:
        assert each.batch_file is None or list(tmp_path.rglob(each.batch_file))
