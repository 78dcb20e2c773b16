"""Rollout engines: RolloutWorker (engine), vLLM in a Ray actor. Importing `engine` imports vLLM."""
