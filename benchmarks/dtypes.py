"""Duration of a recipe in bfloat16 compared with float32.

    python -m examples.movies prepare --model smollm2 && python -m benchmarks.dtypes

Runs the recipe's three stages in float32, then in bfloat16, with a tenth of the steps of SFT and reward model and five PPO
steps, two of which train only the critic; validation and evaluation are complete. The estimated time of a full stage is its
measured time plus its median step for each omitted step (in PPO: the median of steps that train the actor). The last line is the
ratio of the full recipes' times; the exit status is 1 if it exceeds 0.7.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.recipes import whole_recipe
from configs import RunConfig
from orchestrator import Result, run_stages
from orchestrator.storage import read_metrics
from placement.plan import bfloat16_instructions
from placement.types import Stage

DTYPES = ("float32", "bfloat16")
SHARE = 0.1
"""Share of the epochs of SFT and reward model that are run."""
ACTOR_STEPS = 3
MAX_RATIO = 0.7


def main(
    recipe: Annotated[Path, typer.Option(exists=True, dir_okay=False)] = Path("configs/movies/smollm2.yaml"),
) -> None:
    """Run the recipe in both dtypes and compare."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        whole = whole_recipe(recipe, [f"runs={folder}"])
        seconds = {dtype: _whole(whole, run_stages(_short(whole, dtype), console=console)) for dtype in DTYPES}
    sys.exit(_report(console, seconds))


def _short(config: RunConfig, dtype: str) -> RunConfig:
    assert config.sft and config.rm and config.ppo
    settings = config.model_dump()
    settings["name"] = f"{config.name}-{dtype}"
    settings["model"]["dtype"] = dtype
    settings["sft"]["epochs"] *= SHARE
    settings["rm"]["epochs"] *= SHARE
    settings["ppo"]["steps"] = min(config.ppo.steps, config.ppo.critic_warmup + ACTOR_STEPS)
    return RunConfig.model_validate(settings)


def _whole(config: RunConfig, result: Result) -> dict[Stage, float]:
    """Estimated seconds of each full stage."""
    assert config.ppo
    steps: dict[str, list[float]] = {}
    for line in read_metrics(result.folder):
        if "seconds/step" in line:
            steps.setdefault(line["stage"], []).append(line["seconds/step"])
    omitted = {stage: len(steps[stage]) * (1 / SHARE - 1) for stage in ("sft", "rm")}
    omitted["ppo"] = config.ppo.steps - len(steps["ppo"])
    steps["ppo"] = steps["ppo"][config.ppo.critic_warmup :]
    return {stage: took + omitted[stage] * statistics.median(steps[stage]) for stage, took in result.seconds.items()}


def _report(console: Console, seconds: dict[str, dict[Stage, float]]) -> int:
    table = Table("seconds", *DTYPES, "ratio")
    full, half = (seconds[dtype] for dtype in DTYPES)
    rows = {str(stage): (full[stage], half[stage]) for stage in full} | {
        "all": (sum(full.values()), sum(half.values()))
    }
    for name, (a, b) in rows.items():
        table.add_row(name, f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}")
    console.print(table)
    console.print(f"instructions for bfloat16: {bfloat16_instructions() or 'none'}")
    a, b = rows["all"]
    console.print(f"the recipe in bfloat16 takes {b / a:.2f} of its time in float32 (at most {MAX_RATIO:g})")
    return int(b / a > MAX_RATIO)


if __name__ == "__main__":
    typer.run(main)
