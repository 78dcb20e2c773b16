"""Checks of the settings before a run starts."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from configs import RunConfig
from configs.extensions import hidden_module, search_working_folder
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
from orchestrator.run import Run, RunError, address_of, in_copy, local
from placement.stages import STAGES
from placement.types import Stage
from workers.data import Row
from workers.models.lora import real, refuse_other_base
from workers.rewards.function import RewardError, find_function
from workers.rewards.function import check_columns as check_arguments

Check = Callable[[], object]
"""Raises an error that names the setting if there is a problem."""


def settings_checks(run: Run, stages: Sequence[Stage]) -> Iterator[Check]:
    """Checks of the sections, models, plugins, loggers, functions and the value loss that the settings name, and of the run's
    folder.

    A check raises RunError, RewardError or UnknownNameError, which name the setting. Run them in this order.
    """
    config = run.config
    search_working_folder()
    yield from (partial(_check_section, config, stage) for stage in stages)
    yield partial(_check_folder, run)
    yield partial(address_of, config)
    yield partial(check_offload, config)
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
            "model.lora: adapters need trained base weights, but with model.init=random the base is random; set model.lora=none"
        )
    if "ppo" in stages and run.trained("sft") is None and config.model.init == "random":
        raise RunError(
            "model.init: was 'random', but PPO needs trained weights; run `troupe sft` with the same settings first, or use the "
            "SFT model of another run (start_from)"
        )


SAME = ("chat_template", "chat_template_args", "system_prompt", "model.end_tokens")
"""Settings that must equal those of the runs whose models a stage starts from: how prompts become tokens."""


def check_start(run: Run, stages: Sequence[Stage]) -> None:
    """Check that the run of `start_from` has the models that these stages need, trained on the same model and form.

    Raises RunError.
    """
    config, start = run.config, run.config.start_from
    if start is None or not stages:
        return
    external_models = run.external_models(stages)
    if not external_models:
        other = Run.open(Path(start))
        finished = ", ".join(stage for stage in STAGES if other.finished(stage)) or "nothing"
        raise RunError(
            f"start_from: was {start!r}, but this run would use none of its models: it runs {', '.join(run.stages)} itself, "
            f"and that run has finished {finished}. To train a model of that run further: model.path={start}/models/sft"
        )
    for stage in external_models:
        owner = run.owner(stage)
        assert owner is not None
        for name in SAME:
            value, trained = attrgetter(name)(config), attrgetter(name)(owner.config)
            if value != trained:
                raise RunError(
                    f"{name}: was {value!r}, but {owner.folder}, whose {stage} model start_from uses, was trained with "
                    f"{trained!r}; must be the same"
                )
        if stage == "sft" and not _same_model(config.model.path, (owner.config.model.path, str(owner.model("sft")))):
            raise RunError(
                f"model.path: was {config.model.path!r}, but {owner.folder}, whose sft model start_from uses, "
                f"began with {owner.config.model.path!r}; use that path, or leave start_from out"
            )


def _same_model(path: str, others: Sequence[str]) -> bool:
    return any(path == other or real(local(path)) == real(local(other)) for other in others)


def _check_folder(run: Run) -> None:
    """Check that the run's folder can be made and written to, and is not deleted after the run."""
    if in_copy() and not Path(run.config.runs).is_absolute():
        raise RunError(
            f"runs: was {run.config.runs!r}, in the job's copy of the working folder, which the cluster deletes; "
            "must be the absolute path of a folder that every node can access"
        )
    existing = next(path for path in (run.folder, *run.folder.parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryDirectory(prefix=".troupe-", dir=existing).cleanup()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # the first write reports a full disk better
            raise RunError(
                f"runs: cannot make or write to the folder {run.folder}: {existing}: {error.strerror}"
            ) from error


def check_offload(config: RunConfig) -> None:
    """Check that this machine can keep states on disk, if a strategy needs it."""
    if "zero3_nvme" not in {config.strategy_of(role) for role in ROLES}:
        return
    folder = config.offload.nvme_path
    assert folder is not None
    if not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        raise RunError(f"offload.nvme_path: was {folder!r}, which is not a writable folder")
    from workers.training.deepspeed.nvme import can_swap  # imports DeepSpeed, which the driver seldom needs

    if not can_swap():
        raise RunError(
            "strategy: zero3_nvme needs libaio with its headers (Debian's libaio-dev) and a C++ compiler, which are "
            "missing; zero3_offload, which keeps states in host memory, needs neither"
        )


def _check_model(path: str, setting: str) -> None:
    if is_missing(path):
        file = Path(path).absolute() / "config.json"
        raise RunError(f"{setting}: was {path!r}, which is not a model's folder; {file} does not exist")


def is_missing(path: str) -> bool:
    """Whether a model's folder is missing. `name` and `owner/name` may be hub names, and count as present."""
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
    if problem := hidden_module(name, setting):
        raise RunError(problem)


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
            f"{setting}: not set, and this run has no rm stage that trains a reward model; set a model, run `troupe rm` "
            "with the same settings first, or use another run's model (start_from)"
        )


def _find(function: str, setting: str) -> None:
    _refuse_hidden(function, setting)
    find_function(function, setting)


def column_checks(ppo: PPOSettings, prompts: Sequence[Row], held_out: Sequence[Row]) -> Iterator[Check]:
    """A check for each reward and judge: whether it accepts the columns of the prompts that it scores.

    prompts, held_out: rows of `ppo.prompts` and of `ppo.evaluation.prompts`; the latter may be empty. A check raises RewardError,
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
    for setting, source in sources:
        if isinstance(source, FunctionSettings):
            yield partial(_check_function, source.function, f"{setting}.function", names, dataset)
        elif isinstance(source, HttpReward):
            yield partial(_check_json, rows, setting, dataset)


def _check_function(path: str, setting: str, columns: Sequence[str], dataset: str) -> None:
    try:
        function = find_function(path, setting)
    except RewardError:
        return  # another check reports it
    check_arguments(function, setting, columns, dataset)


def _check_json(rows: Sequence[Row], setting: str, dataset: str) -> None:
    from workers.rewards.http import check_json  # imports an HTTP client, which the driver seldom needs

    check_json([row.columns for row in rows], setting, dataset)


def _check_sharing(config: RunConfig, ppo: PPOSettings, run: Run) -> None:
    """Check that reward models that share a base are adapters on the model that PPO starts from."""
    base = run.starting_model("ppo")
    models = [(i, source) for i, source in enumerate(ppo.rewards) if isinstance(source, ModelReward)]
    if "reward" not in config.shared_base:
        models = models[: int("critic" in config.shared_base)]  # the critic starts from the first
    for i, source in models:
        trained = run.trained("rm")
        if source.path or (trained and trained.exists()):
            try:
                refuse_other_base(local(source.path or str(trained)), base)
            except ValueError as error:
                raise RunError(f"ppo.rewards.{i}.path: {error}") from error
        elif config.rm and config.rm.model:
            _check_future_adapter(config.rm.model, base)


def _check_future_adapter(settings: ModelSettings, base: str) -> None:
    """Check that a reward model with its own settings will be trained as an adapter on the base."""
    if settings.lora is None:
        raise RunError(
            "rm.model.lora: not set, but a reward model that shares its base (`shared_base`) is an adapter; set lora.rank"
        )
    if real(local(settings.path)) != real(base):
        raise RunError(
            f"rm.model.path: was {settings.path!r}, but a reward model that shares its base (`shared_base`) must start from "
            f"the model that PPO starts from, {base}; leave rm.model out"
        )


def _check_token(reward: HttpReward, setting: str) -> None:
    if reward.token_env:
        from workers.rewards.http import read_token  # imports an HTTP client, which the driver seldom needs

        read_token(reward.token_env, setting)


def _name_checks(ppo: PPOSettings) -> Iterator[Check]:
    if ppo.value_loss != PPOSettings.model_fields["value_loss"].default:
        from workers.rl.losses import value_losses  # imports torch, which the driver can mostly do without

        yield partial(value_losses.get, ppo.value_loss)
