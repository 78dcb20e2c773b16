"""The algorithms, SFT, reward model and PPO, and the runner that starts, recovers, checkpoints and records them."""
