"""A run from Python: load a config, change settings, run, look at the result.

python -m examples.movies prepare
python -m examples.run_ppo [CONFIG] [a.b=c ...]
"""

from __future__ import annotations

import sys

from orchestrator import Result, load_config, run_stages


def main(path: str = "configs/movies/tiny.yaml", *overrides: str) -> Result:
    """All three stages; those that are finished in the run's folder are not run again."""
    config = load_config(path, ["name=from-python", "ppo.steps=20", *overrides])
    result = run_stages(config, ["sft", "rm", "ppo"])

    numbers = result.numbers["ppo"]
    print(
        f"reward on held-out prompts: {numbers['reward_before']:+.3f} before PPO, {numbers['reward_after']:+.3f} after"
    )
    print(f"distance from where PPO started: {numbers['kl']:.3f} nats per token")
    print(f"model: {result.models['ppo']}")
    print(f"report: {result.report}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
