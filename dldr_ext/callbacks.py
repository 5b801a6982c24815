"""The same as `dldr_ext.optim.callbacks`."""

from .optim.callbacks import log_to_tensorboard as log_to_tensorboard
from .optim.callbacks import progress as progress
