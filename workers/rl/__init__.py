"""Reinforcement learning as pure tensor functions: losses, advantages, KL estimates. Imports torch and nothing of Ray."""
