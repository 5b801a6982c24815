"""The same as `dldr_ext.optim.callbacks`."""

from .optim.callbacks import log_to_mlflow as log_to_mlflow
from .optim.callbacks import log_to_tensorboard as log_to_tensorboard
from .optim.callbacks import log_to_wandb as log_to_wandb
from .optim.callbacks import on_step as on_step
from .optim.callbacks import progress as progress
