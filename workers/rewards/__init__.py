"""Rewards from trained models, Python functions and HTTP services.

worker: RewardWorker, which scores answers with all sources. result: RewardResult. function: RewardFunction, SampleRecord,
RewardError. function_process: FunctionProcess, a function in a process of its own. http: Endpoint. Import from the modules: the
function's process imports `function` and must start without numpy, torch and Ray.
"""
