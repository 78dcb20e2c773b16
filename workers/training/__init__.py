"""Training: what the roles that learn do in a step. DeepSpeed is imported in workers.training.deepspeed alone."""
