"""pytorch-forecasting's networks forecast series that it generates, with ALRC."""

from typing import Any

from lightning.pytorch import Trainer
from pytorch_forecasting import DeepAR, NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data

from lightning_alrc import ALRCCallback, ALRCMixin

NETWORKS = (TemporalFusionTransformer, DeepAR, NBeats)


def series() -> TimeSeriesDataSet:
    lengths = {f"{end}_encoder_length": 20 for end in ("min", "max")}
    lengths |= {f"{end}_prediction_length": 5 for end in ("min", "max")}
    table = generate_ar_data(n_series=4, timesteps=44)
    names: dict[str, Any] = {"target": "value", "time_varying_unknown_reals": ["value"]}
    return TimeSeriesDataSet(table, time_idx="time_idx", group_ids=["series"], **names, **lengths)


def clipped(network: type[Any]) -> type[Any]:
    """The network with the mixin, which does what the callback does."""
    return type(f"Clipped{network.__name__}", (ALRCMixin, network), {})


if __name__ == "__main__":
    data = series()
    for network in NETWORKS:
        alrc = ALRCCallback()
        trainer = Trainer(max_steps=5, callbacks=[alrc])
        trainer.fit(network.from_dataset(data), data.to_dataloader(batch_size=16))
        print(f"{network.__name__}: mean loss of five steps: {alrc.losses['loss'].mu1:.3f}")
        trainer = Trainer(max_steps=5)
        trainer.fit(clipped(network).from_dataset(data), data.to_dataloader(batch_size=16))
