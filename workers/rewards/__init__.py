"""Rewards from trained models, Python functions and HTTP services.

worker: RewardWorker, which scores answers with all sources. result: RewardResult. function_process: FunctionProcess, a function
in a process of its own. http: Endpoint. Import these from their modules: a function's process imports this package, and must
start fast, without numpy, torch and Ray.
"""

from workers.rewards.function import RewardError, RewardFunction, SampleRecord, Score

__all__ = ["RewardError", "RewardFunction", "SampleRecord", "Score"]
