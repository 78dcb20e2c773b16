"""Recipes for benchmarks."""

from __future__ import annotations

from pathlib import Path

import typer

from configs import ConfigError, RunConfig, load_config


def whole_recipe(recipe: Path, overrides: list[str]) -> RunConfig:
    """The settings of a recipe with all three stages. Raises typer.BadParameter for problems that its runs would
    report only after minutes, or only in their log."""
    try:
        config = load_config(recipe, overrides)
    except ConfigError as error:
        raise typer.BadParameter(f"{recipe}: {error}", param_hint="--recipe") from error
    if config.sft is None or config.rm is None or config.ppo is None:
        raise typer.BadParameter(f"{recipe}: must have all three stages, sft, rm and ppo", param_hint="--recipe")
    datasets = (config.sft.train, config.rm.train, config.ppo.prompts)
    for path in (config.model.path, *(path for data in datasets for path in data.paths)):
        looks_local = path[:1] in "./~" or path.count("/") > 1
        if looks_local and not Path(path).exists():
            raise typer.BadParameter(
                f"{recipe}: {path} does not exist; python -m examples.movies prepare creates the data of the recipes",
                param_hint="--recipe",
            )
    return config
