"""The parts that a step of PBFGS is put together from."""
