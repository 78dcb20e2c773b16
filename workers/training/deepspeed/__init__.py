"""The training backend DeepSpeed: configuration of a strategy, NVMe offload, and checkpoints for another number of ranks."""
