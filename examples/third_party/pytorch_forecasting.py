"""pytorch-forecasting's networks forecast series that it generates, with ALRC."""

from lightning.pytorch import Trainer
from pytorch_forecasting import DeepAR, NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data

from lightning_alrc import ALRCCallback, ALRCMixin


class ClippedTransformer(ALRCMixin, TemporalFusionTransformer): ...


class ClippedDeepAR(ALRCMixin, DeepAR): ...


class ClippedNBeats(ALRCMixin, NBeats): ...


table = generate_ar_data(n_series=4, timesteps=44)
settings = {"max_encoder_length": 20, "max_prediction_length": 5}
settings |= {"time_varying_unknown_reals": ["value"]}
series = TimeSeriesDataSet(table, "time_idx", "value", ["series"], **settings)
batches = series.to_dataloader(batch_size=16)

if __name__ == "__main__":
    for network in (TemporalFusionTransformer, DeepAR, NBeats):
        Trainer(max_steps=5, callbacks=[ALRCCallback()]).fit(network.from_dataset(series), batches)
    for network in (ClippedTransformer, ClippedDeepAR, ClippedNBeats):
        Trainer(max_steps=5).fit(network.from_dataset(series), batches)
