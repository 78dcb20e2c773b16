"""DeepSpeed: its configuration from a strategy, NVMe offload, and checkpoints for another number of ranks."""
