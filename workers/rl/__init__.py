"""Reinforcement learning as pure tensor functions: losses, advantages, KL estimates. Imports torch, not Ray."""
