"""Training: the steps of the trained roles (trainer, policy, value), on top of a training backend (backend, deepspeed).

Only workers.training.deepspeed imports DeepSpeed.
"""
