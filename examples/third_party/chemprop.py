"""chemprop's MPNN learns to count the carbon atoms of twenty alcohols, with ALRC."""

from chemprop import data, models, nn
from lightning.pytorch import Trainer

from lightning_alrc import ALRCCallback, ALRCMixin


class ClippedMPNN(ALRCMixin, models.MPNN): ...


def mpnn(kind: type[models.MPNN]) -> models.MPNN:
    return kind(nn.BondMessagePassing(), nn.MeanAggregation(), nn.RegressionFFN())


alcohols = [data.MoleculeDatapoint.from_smi("C" * n + "O", [float(n)]) for n in range(1, 21)]
batches = data.build_dataloader(data.MoleculeDataset(alcohols), batch_size=4, num_workers=0)

if __name__ == "__main__":
    Trainer(max_epochs=1, callbacks=[ALRCCallback()]).fit(mpnn(models.MPNN), batches)
    Trainer(max_epochs=1).fit(mpnn(ClippedMPNN), batches)
