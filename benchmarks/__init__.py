"""Measured claims: what was run, on which hardware, with which versions; results in `benchmarks/results/`."""
