"""The rollout engines: vLLM in a Ray actor."""
