"""REINFORCE in a custom training loop: Troupe's worker groups, no critic.

    python -m examples.movies prepare
    python -m examples.reinforce [CONFIG] [a.b=c ...]

The driver holds object references and a few numbers per response; tokens stay in the object store.
"""

from __future__ import annotations

import sys

import numpy as np

from troupe import Experience, KLTerm, evaluate, load_config, read_rows, run_concurrently, run_stages, start_team

KL_PENALTY = KLTerm(reward_coefficient=0.1)


def main(path: str = "configs/movies/tiny.yaml", *overrides: str) -> list[float]:
    """Train; returns the mean reward of each step."""
    no_critic = ["ppo.critic=false", "ppo.advantage=reinforce", "ppo.epochs=1", "ppo.mini_batches=1"]
    config = load_config(path, ["name=reinforce", "ppo.steps=20", *no_critic, *overrides])
    ppo = config.ppo
    assert ppo is not None and ppo.evaluation is not None
    models = run_stages(config, ["sft", "rm"]).models
    prompts, held_out = read_rows(ppo.prompts, "prompt"), read_rows(ppo.evaluation.prompts, "prompt")
    draw = np.random.default_rng(config.seed)
    rewards = []
    with start_team(config) as team:
        team.load(str(models["sft"]), {"model": str(models["rm"])})
        team.add_prompts("prompts", prompts)
        team.add_prompts("evaluation", held_out)
        before = evaluate(team, len(held_out))
        for step in range(1, ppo.steps + 1):
            picked = draw.choice(len(prompts), ppo.prompts_per_step, replace=False)
            rollouts = team.generate("prompts", picked, step, ppo.samples_per_prompt).get()
            reference, scores = run_concurrently(team.log_probs(rollouts), team.scores(rollouts, ["model"]))
            reward = scores["model"].values
            experience = Experience(rollouts, reference, None, reward.clip(-3, 3), KL_PENALTY)
            metrics = team.train_actor(experience, step, ppo.steps).get()
            team.sync_weights(version=step)
            rewards.append(float(reward.mean()))
            kl = reference.per_answer.sum() / rollouts.trained_tokens.sum()
            print(f"step {step}: reward {rewards[-1]:+.3f}, KL {kl:.3f}, entropy {metrics['entropy']:.2f}")
        after = evaluate(team, len(held_out))
        team.export("actor", f"{config.runs}/{config.name}/models/reinforce")
    print(f"reward on held-out prompts: {before.reward.mean():+.3f} before, {after.reward.mean():+.3f} after")
    return rewards


if __name__ == "__main__":
    main(*sys.argv[1:])
