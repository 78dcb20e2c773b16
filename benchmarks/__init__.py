"""Measurements; each prints the hardware and ratios within one run."""
