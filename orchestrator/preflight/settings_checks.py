"""What can be known to fail before anything starts."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from configs import RunConfig
from configs.schema import (
    ROLES,
    FunctionSettings,
    HttpReward,
    Judge,
    ModelReward,
    ModelSettings,
    PPOSettings,
    Reward,
)
from orchestrator.run.ray_cluster import address_of
from orchestrator.run.run_dir import STAGES, Run, RunError, in_copy, local
from placement.types import Stage
from workers.data import Row
from workers.models.lora import real, refuse_other_base
from workers.rewards.function import RewardError, find_function
from workers.rewards.function import check_columns as check_arguments

Check = Callable[[], object]
"""Raises an error that names the setting where something is wrong."""


def settings_checks(run: Run, stages: Sequence[Stage]) -> Iterator[Check]:
    """Checks of what the settings name: sections, models, plugins, functions, the value loss; where the results would land.

    A check raises RunError, RewardError or UnknownNameError, which name the setting. They are to be run in this order.
    """
    config = run.config
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # plugins, rewards and judges are looked for from here on
    yield from (partial(_check_section, config, stage) for stage in stages)
    yield partial(_check_folder, run)
    yield partial(address_of, config)
    yield partial(check_offload, config)
    yield from (partial(_import_plugin, plugin, f"plugins.{i}") for i, plugin in enumerate(config.plugins))
    yield partial(_check_start_model, run, stages)
    if "rm" in stages and config.rm and config.rm.model:
        yield partial(_check_model, config.rm.model.path, "rm.model.path")
    yield partial(_check_quantize, config)
    if "ppo" in stages and config.ppo:
        yield from _name_checks(config.ppo)
        yield from _reward_checks(config.ppo, run)
        yield partial(_check_sharing, config, config.ppo, run)


def _check_section(config: RunConfig, stage: Stage) -> None:
    if getattr(config, stage) is None:
        raise RunError(f"{stage}: the config has no section of this name, so the stage cannot run")


def _check_start_model(run: Run, stages: Sequence[Stage]) -> None:
    config = run.config
    if local(config.model.path) in {run.starting_model(stage) for stage in stages}:
        _check_model(config.model.path, "model.path")
    if "sft" in stages and config.model.init == "random" and config.model.lora:
        raise RunError(
            "model.lora: adapters are trained beside weights that stay as they are, and with model.init=random those are drawn; "
            "set model.lora=none"
        )
    if "ppo" in stages and run.trained("sft") is None and config.model.init == "random":
        raise RunError(
            "model.init: was 'random', but PPO starts from weights; run `troupe sft` with the same settings first, or take the "
            "SFT model of another run (start_from)"
        )


SAME = ("chat_template", "chat_template_args", "system_prompt", "model.end_tokens")
"""Settings that a stage shares with the stages whose models it takes from other runs: how prompts become tokens."""


def check_start(run: Run, stages: Sequence[Stage]) -> None:
    """Whether the run that `start_from` names has what these stages take from it, and trained it on the same model and form.

    Raises RunError.
    """
    config, named = run.config, run.config.start_from
    if named is None or not stages:
        return
    taken = run.taken(stages)
    if not taken:
        there = Run.open(Path(named))
        finished = ", ".join(stage for stage in STAGES if there.finished(stage)) or "nothing"
        raise RunError(
            f"start_from: was {named!r}, but nothing would be taken from there: this run runs {', '.join(run.stages)} itself, "
            f"and there {finished} is finished. To train a model of that run further, name it: model.path={named}/models/sft"
        )
    for stage in taken:
        owner = run.owner(stage)
        assert owner is not None
        for name in SAME:
            asked, trained = attrgetter(name)(config), attrgetter(name)(owner.config)
            if asked != trained:
                raise RunError(
                    f"{name}: was {asked!r}, but {owner.folder}, from where start_from takes the {stage} model, was trained with "
                    f"{trained!r}; must be the same"
                )
        if stage == "sft" and not _same_model(config.model.path, (owner.config.model.path, str(owner.model("sft")))):
            raise RunError(
                f"model.path: was {config.model.path!r}, but {owner.folder}, from where start_from takes the sft model, "
                f"began with {owner.config.model.path!r}; name that, or leave start_from out"
            )


def _same_model(path: str, others: Sequence[str]) -> bool:
    return any(path == other or real(local(path)) == real(local(other)) for other in others)


def _check_folder(run: Run) -> None:
    """Whether the run's folder can be made and written to, and stays."""
    if in_copy() and not Path(run.config.runs).is_absolute():
        raise RunError(
            f"runs: was {run.config.runs!r}, in the copy of the working folder that this job runs in and the cluster deletes; "
            "must be the absolute path of a folder that every node sees"
        )
    there = next(path for path in (run.folder, *run.folder.parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryDirectory(prefix=".troupe-", dir=there).cleanup()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # of which whoever writes first says more
            raise RunError(
                f"runs: no folder {run.folder} can be made or written to: {there}: {error.strerror}"
            ) from error


def check_offload(config: RunConfig) -> None:
    """What states on disk need, on this machine."""
    if "zero3_nvme" not in {config.strategy_of(role) for role in ROLES}:
        return
    folder = config.offload.nvme_path
    assert folder is not None
    if not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        raise RunError(f"offload.nvme_path: was {folder!r}, which is no folder that can be written to")
    from workers.training.deepspeed.nvme import can_swap  # imports DeepSpeed, which the driver can mostly do without

    if not can_swap():
        raise RunError(
            "strategy: zero3_nvme needs libaio with its headers (Debian's libaio-dev) and a C++ compiler, which are not "
            "here; zero3_offload, which keeps states in host memory, needs neither"
        )


def _check_model(path: str, setting: str) -> None:
    if is_missing(path):
        where = Path(path).absolute() / "config.json"
        raise RunError(f"{setting}: was {path!r}, which is no folder with a model; there is no {where}")


def is_missing(path: str) -> bool:
    """Whether a model's folder is not there; one word, or two with a slash between, may be a hub name."""
    looks_local = path[:1] in "./~" or path.count("/") > 1
    return looks_local and not (Path(path) / "config.json").is_file()


def _check_quantize(config: RunConfig) -> None:
    models = {"model": config.model} | ({"rm.model": config.rm.model} if config.rm and config.rm.model else {})
    for setting, model in models.items():
        if model.quantize and find_spec("bitsandbytes") is None:
            raise RunError(
                f"{setting}.quantize: was {model.quantize!r}, which needs the package bitsandbytes; "
                "install it (`pip install troupe[quantize]`)"
            )


def _refuse_hidden(name: str, setting: str) -> None:
    """A module of the working folder that is not what Python finds by its name. name: a module, or module:function."""
    module = name.partition(":")[0]
    top = module.partition(".")[0]
    here = Path.cwd()
    file = here.joinpath(*module.split("."))
    if not (file.is_dir() or file.with_name(f"{file.name}.py").is_file()):
        return
    spec = find_spec(top)
    places = [*(spec.submodule_search_locations or []), spec.origin] if spec else []
    found = [Path(place).resolve() for place in places if place]
    if found and not {here / top, here / f"{top}.py"} & set(found):
        mine = f"{top}/" if (here / top).is_dir() else f"{top}.py"
        raise RunError(
            f"{setting}: was {name!r}, but {mine} in {here} is hidden by {found[0]}, which has the same name; rename yours"
        )


def _import_plugin(module: str, setting: str) -> None:
    _refuse_hidden(module, setting)
    try:
        import_module(module)
    except ImportError as error:
        raise RunError(f"{setting}: cannot import {module!r}: {error}") from error


def _reward_checks(ppo: PPOSettings, run: Run) -> Iterator[Check]:
    for i, reward in enumerate(ppo.rewards):
        setting = f"ppo.rewards.{i}"
        if reward.kind == "function":
            yield partial(_find, reward.function, f"{setting}.function")
        elif reward.kind == "http":
            yield partial(_check_token, reward, f"{setting}.token_env")
        elif reward.path:
            yield partial(_check_model, reward.path, f"{setting}.path")
        else:
            yield partial(_check_trained_reward, run, f"{setting}.path")
    for i, judge in enumerate(ppo.evaluation.judges if ppo.evaluation else []):
        yield partial(_find, judge.function, f"ppo.evaluation.judges.{i}.function")


def _check_trained_reward(run: Run, setting: str) -> None:
    if run.trained("rm") is None:
        raise RunError(
            f"{setting}: none is named, and this run has no rm stage to take a reward model from; name a model, run `troupe rm` "
            "with the same settings first, or take it from another run (start_from)"
        )


def _find(function: str, setting: str) -> None:
    _refuse_hidden(function, setting)
    find_function(function, setting)


def column_checks(ppo: PPOSettings, prompts: Sequence[Row], held_out: Sequence[Row]) -> Iterator[Check]:
    """Checks that rewards and judges can be given the columns of the prompts that they score, one for each of them.

    prompts, held_out: rows of `ppo.prompts` and of `ppo.evaluation.prompts`; the second may be none. A check raises RewardError,
    which names the setting, the dataset and the column.
    """
    rewards: list[tuple[str, Reward | Judge]] = [(f"ppo.rewards.{i}", reward) for i, reward in enumerate(ppo.rewards)]
    yield from _column_checks(rewards, f"ppo.prompts ({ppo.prompts.name})", prompts)
    if ppo.evaluation:
        judges = [(f"ppo.evaluation.judges.{i}", judge) for i, judge in enumerate(ppo.evaluation.judges)]
        dataset = f"ppo.evaluation.prompts ({ppo.evaluation.prompts.name})"
        yield from _column_checks([*rewards, *judges], dataset, held_out)


def _column_checks(sources: Sequence[tuple[str, Reward | Judge]], dataset: str, rows: Sequence[Row]) -> Iterator[Check]:
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    for place, source in sources:
        if isinstance(source, FunctionSettings):
            yield partial(_check_function, source.function, f"{place}.function", names, dataset)
        elif isinstance(source, HttpReward):
            yield partial(_check_json, rows, place, dataset)


def _check_function(path: str, setting: str, columns: Sequence[str], dataset: str) -> None:
    try:
        function = find_function(path, setting)
    except RewardError:
        return  # which `check` says
    check_arguments(function, setting, columns, dataset)


def _check_json(rows: Sequence[Row], setting: str, dataset: str) -> None:
    from workers.rewards.http import check_json  # imports an HTTP client, which the driver can mostly do without

    check_json([row.columns for row in rows], setting, dataset)


def _check_sharing(config: RunConfig, ppo: PPOSettings, run: Run) -> None:
    """Reward models that are to share a base are adapters on the model that PPO starts from."""
    base = run.starting_model("ppo")
    models = [(i, source) for i, source in enumerate(ppo.rewards) if isinstance(source, ModelReward)]
    if "reward" not in config.share:
        models = models[: int("critic" in config.share)]  # the critic starts from the first
    for i, source in models:
        trained = run.trained("rm")
        if source.path or (trained and trained.exists()):
            try:
                refuse_other_base(local(source.path or str(trained)), base)
            except ValueError as error:
                raise RunError(f"ppo.rewards.{i}.path: {error}") from error
        elif config.rm and config.rm.model:
            _check_own_model(config.rm.model, base)


def _check_own_model(settings: ModelSettings, base: str) -> None:
    """Whether a reward model that starts from a model of its own will be an adapter on the base."""
    if settings.lora is None:
        raise RunError(
            "rm.model.lora: none, but a reward model that shares its base (`share`) is an adapter; set lora.rank"
        )
    if real(local(settings.path)) != real(base):
        raise RunError(
            f"rm.model.path: was {settings.path!r}, but a reward model that shares its base (`share`) must start from "
            f"the model that PPO starts from, {base}; leave rm.model out"
        )


def _check_token(reward: HttpReward, setting: str) -> None:
    if reward.token_env:
        from workers.rewards.http import read_token  # imports an HTTP client, which the driver can mostly do without

        read_token(reward.token_env, setting)


def _name_checks(ppo: PPOSettings) -> Iterator[Check]:
    if ppo.value_loss != PPOSettings.model_fields["value_loss"].default:
        from workers.rl.losses import value_losses  # imports torch, which the driver can mostly do without

        yield partial(value_losses.get, ppo.value_loss)
