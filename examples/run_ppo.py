"""A run from Python: load a config, change settings, run, and print the result.

python -m examples.movies prepare
python -m examples.run_ppo [CONFIG] [a.b=c ...]
"""

from __future__ import annotations

import sys

from troupe import Result, load_config, run_stages


def main(path: str = "configs/movies/tiny.yaml", *overrides: str) -> Result:
    """Run all three stages; stages that are finished in the run's folder are skipped."""
    config = load_config(path, ["name=from-python", "ppo.steps=20", *overrides])
    result = run_stages(config, ["sft", "rm", "ppo"])

    numbers = result.numbers["ppo"]
    print(
        f"reward on held-out prompts: {numbers['reward_before']:+.3f} before PPO, {numbers['reward_after']:+.3f} after"
    )
    print(f"KL to the starting model: {numbers['kl']:.3f} nats per token")
    print(f"model: {result.models['ppo']}")
    print(f"report: {result.report}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
