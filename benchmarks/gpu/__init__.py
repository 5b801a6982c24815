"""The ops and a whole step on an NVIDIA GPU: ``python -m benchmarks.gpu``."""
