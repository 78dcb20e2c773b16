"""The algorithms, SFT, reward model and PPO, and the runner that starts, recovers, checkpoints, records and stops them."""

from orchestrator.algorithms.base import ALGORITHMS, Algorithm, Context
from orchestrator.algorithms.ppo import PPO
from orchestrator.algorithms.runner import Callback, Runner
from orchestrator.algorithms.supervised import SFT, RewardModel, Supervised

__all__ = ["ALGORITHMS", "PPO", "SFT", "Algorithm", "Callback", "Context", "RewardModel", "Runner", "Supervised"]
