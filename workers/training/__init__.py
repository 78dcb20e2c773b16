"""Training: what the roles that learn do in a step (trainer, policy, value), over a training backend (backend, deepspeed).

DeepSpeed is imported in workers.training.deepspeed alone.
"""
