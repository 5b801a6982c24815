"""A PyTorch Lightning module that is trained with SGD first and with P-BFGS after that.

Lightning hands its training step to the optimizer as the usual closure, which P-BFGS calls for
every trial of its line search. Needs lightning.
"""

import warnings

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dldr_ext import PBFGS, Trajectory


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)
        )
        self.subspace = None

    def training_step(self, batch, index):
        inputs, labels = batch
        return cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self):
        if self.subspace is None:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)
        return PBFGS(self.model.parameters(), self.subspace, buffers=self.model)


class Record(lightning.Callback):
    """A snapshot of the weights before every step."""

    def __init__(self, model):
        self.trajectory = Trajectory(model.named_parameters(), capacity=300)

    def on_train_batch_start(self, trainer, module, batch, index):
        self.trajectory.record()


def main(epochs=(4, 15)):
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(1024, 10)
    data = TensorDataset(inputs, (inputs @ torch.randn(10, 3)).argmax(1))
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    module = Classifier()

    def loss():
        with torch.no_grad():
            return cross_entropy(module.model(inputs), data.tensors[1]).item()

    record = Record(module.model)
    trainer = lightning.Trainer(max_epochs=epochs[0], callbacks=[record], **quiet)
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))
    found = {"sgd": loss()}

    module.subspace = record.trajectory.subspace(dim=10)
    trainer = lightning.Trainer(max_epochs=epochs[1], **quiet)
    trainer.fit(module, DataLoader(data, batch_size=1024))
    return found | {"pbfgs": loss()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("training loss:", main())
