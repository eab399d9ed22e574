"""chemprop's MPNN learns to count the carbon atoms of twenty alcohols, with ALRC."""

from typing import Any

from chemprop import data, models, nn
from lightning.pytorch import Trainer

from lightning_alrc import ALRCCallback, ALRCMixin


class ClippedMPNN(ALRCMixin, models.MPNN):
    """The mixin does what the callback does."""


def batches() -> Any:
    alcohols = [data.MoleculeDatapoint.from_smi("C" * n + "O", [float(n)]) for n in range(1, 21)]
    return data.build_dataloader(data.MoleculeDataset(alcohols), batch_size=4, num_workers=0)


def mpnn(kind: type[models.MPNN] = models.MPNN) -> models.MPNN:
    return kind(nn.BondMessagePassing(), nn.MeanAggregation(), nn.RegressionFFN())


if __name__ == "__main__":
    alrc = ALRCCallback()
    Trainer(max_epochs=1, callbacks=[alrc]).fit(mpnn(), batches())
    print(f"mean loss of five steps: {alrc.losses['loss'].mu1:.3f}")
    Trainer(max_epochs=1).fit(mpnn(ClippedMPNN), batches())
