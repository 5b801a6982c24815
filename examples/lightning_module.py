"""A PyTorch Lightning module that is trained with SGD first and with P-BFGS after that.

Lightning hands its training step to the optimizer as the usual closure, which P-BFGS calls for
every trial of its line search. One callback records the trajectory, another validates with
batch-norm statistics of the weights. Needs lightning.
"""

import warnings

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dldr_ext import PBFGS
from dldr_ext.integrations.lightning import BatchNormCallback, TrajectoryCallback


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)
        )
        self.subspace = None

    def forward(self, inputs):
        return self.model(inputs)

    def training_step(self, batch, index):
        inputs, labels = batch
        return cross_entropy(self(inputs), labels)

    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self):
        if self.subspace is None:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return PBFGS(self.parameters(), self.subspace, buffers=self)


def main(epochs=(4, 15)):
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(1024, 10)
    data = TensorDataset(inputs, (inputs @ torch.randn(10, 3)).argmax(1))
    whole = DataLoader(data, batch_size=1024)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    module = Classifier()

    record = TrajectoryCallback(every=1, capacity=300)
    callbacks = [record, BatchNormCallback()]
    sgd = lightning.Trainer(max_epochs=epochs[0], callbacks=callbacks, **quiet)
    sgd.fit(module, DataLoader(data, batch_size=32, shuffle=True), whole)

    module.subspace = record.trajectory.subspace(dim=10)
    pbfgs = lightning.Trainer(max_epochs=epochs[1], callbacks=[BatchNormCallback()], **quiet)
    pbfgs.fit(module, whole, whole)
    trainers = {"sgd": sgd, "pbfgs": pbfgs}
    return {name: trainer.callback_metrics["loss"].item() for name, trainer in trainers.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("loss of the whole data:", main())
