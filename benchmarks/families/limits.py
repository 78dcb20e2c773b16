"""Limits of the comparisons."""

AGREES = 1e-4
"""Largest difference of log-probabilities (nats), and of gradients relative to a tensor's largest, that counts as equal."""
MOVED = 0.03
"""Least change of log-probabilities by an update: a smaller change could hide an error."""
