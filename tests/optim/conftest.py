"""One thread for every test of the optimizers."""

from optim_problems import one_thread  # noqa: F401
