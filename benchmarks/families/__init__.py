"""Checks which model families Troupe trains and serves correctly: `python -m benchmarks.families`."""
