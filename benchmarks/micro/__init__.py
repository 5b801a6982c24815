"""Each op and a whole step against plain torch, under pytest-benchmark: `make bench`."""
