"""What counts as equal."""

AGREES = 1e-4
"""Largest difference of log-probabilities (nats), and of gradients relative to a tensor's largest, that counts as equal."""
MOVED = 0.03
"""Difference of log-probabilities that an update makes at least: less would hide a fault."""
