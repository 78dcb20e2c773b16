"""Evaluations on held-out prompts, sampled answers, and the statistics over them."""
