"""A run's folder: its files, models and checkpoints.

    runs/<name>/  config.yaml  run.json  status.json  metrics.jsonl  tensorboard/  samples/  evaluation/  summary.json
                  report.html  checkpoints/<stage>/<step>/   models/<stage>/   failures/
                  logs -> the logs of the latest Ray session

Folders and small files appear whole or not at all. A checkpoint has checksums; a checkpoint that does not match them is
renamed to <step>.damaged, and the previous one is used.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

from configs import RunConfig, load_config, save_config
from configs.schema import ModelReward
from orchestrator.run.changes import changes
from orchestrator.storage import (
    DiskError,
    FailureLog,
    atomic_directory,
    clear_leftovers,
    discard,
    sync,
    verify,
    write_checksums,
    write_json,
    writing,
)
from placement.memory import auto_roles, keep_resolved
from placement.plan import auto_dtype_settings
from placement.stages import STAGES
from placement.types import Stage


class RunError(RuntimeError):
    """A run cannot be started or continued as asked."""


class Run:
    """A run's folder and settings."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Raises RunError if a link in the folder leads out of it, or the folder cannot be read."""
        self.config = config
        self.folder = folder.absolute()
        self.failures = FailureLog(self.folder / "failures")
        try:
            _refuse_links(self.folder)
            record = self.read("run.json")
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be read: {error.strerror}") from error
        self.stages: list[Stage] = list(record.get("stages", []))
        """The stages of the run, in order."""
        self.changes: list[dict[str, Any]] = list(record.get("changes", []))
        """Settings that changed within a stage: `stage`, `after` (step), `settings` (path -> [old, new])."""
        started = record.get("started")
        self.started = datetime.fromisoformat(started) if started else datetime.now().replace(microsecond=0)
        """The run's first start: the date that chat templates write, also after midnight."""
        self.working_folder: str | None = record.get("working_folder", None if in_copy() else os.getcwd())
        """The working folder of the first start: relative paths and modules of the settings refer to it. None: a copy."""

    @classmethod
    def begin(cls, config: RunConfig, stages: Sequence[Stage], accept_changes: bool = False) -> Run:
        """A new run, or the continuation of an existing one: finished stages stay finished. Nothing is written before `save`.

        Raises RunError if the settings of a finished stage differ, or of a stage that has begun unless changes are accepted.
        """
        run = cls(config, Path(config.runs) / config.name)
        if (run.folder / "config.yaml").exists():
            old = load_config(run.folder / "config.yaml", saved=True)
            if run.begun():
                run.config = keep_resolved(config, old)
            run._refuse_other_settings(old, accept_changes)
        run.stages = [stage for stage in STAGES if stage in {*run.stages, *stages}]
        return run

    def save(self, forms: Mapping[Stage, str] | None = None) -> None:
        """Make the folder, and write config.yaml and run.json: stages, the models that each starts from, and changed settings.

        forms: of stages that are about to run, the form of their rows.
        """
        with writing(self.folder):
            save_config(self.config, self.folder / "config.yaml")
        record = self.read("run.json")
        starts = {stage: self._start(stage) for stage in self.stages if not self.finished(stage)}
        update = {
            "stages": self.stages,
            "started": self.started.isoformat(),
            "working_folder": self.working_folder,
            "forms": record.get("forms", {}) | dict(forms or {}),
            "from": record.get("from", {}) | starts,
        }
        self.write("run.json", record | update | ({"changes": self.changes} if self.changes else {}))

    def record_resolved(self, config: RunConfig, why: str | None) -> list[str]:
        """Continue with settings in which each `auto` is resolved, and save them. Returns a line for each `auto`.

        why: reason for the dtype, for run.json.
        """
        roles, dtypes = auto_roles(self.config), auto_dtype_settings(self.config)
        if not roles and not dtypes:
            return []
        self.config = config
        self.save()
        lines = []
        if dtypes:
            dtype = attrgetter(dtypes[0])(config)
            lines.append(f"{dtypes[0]}: auto is {dtype}: {why}")
            self.write("run.json", self.read("run.json") | {"dtype": {"is": dtype, "why": why}})
        if roles:
            lines.append(
                f"strategy: auto is {', '.join(f'{config.strategy_of(role)} for the {role}' for role in roles)}"
            )
        return lines

    def _refuse_other_settings(self, old: RunConfig, accept_changes: bool) -> None:
        """Refuse other settings for a finished stage; refuse or record them for a stage that has begun."""
        begun = self.begun()
        starts = self.read("run.json").get("from", {})
        differing = {stage: changes(old, self.config, stage, starts.get(stage, {})) for stage in begun}
        changed = {stage: paths for stage, paths in differing.items() if paths}
        finished = [stage for stage in changed if self.finished(stage)]
        paths = {path: values for settings in changed.values() for path, values in settings.items()}
        lines = [f"{path}: {saved!r} in the run, {new!r} now" for path, (saved, new) in sorted(paths.items())]
        if finished:
            text = (
                f"{self.folder}: has finished ({', '.join(finished)}) with other settings, which config.yaml keeps. To train "
                f"with the new settings choose another name; with start_from={self.folder} the new run uses this run's "
                "models of the stages that it does not run itself"
            )
            if policies := [stage for stage in finished if STAGES[stage].chats]:
                text += f", with model.path={self.folder / 'models' / policies[-1]} it trains that model further"
            raise RunError("\n  ".join([text, *lines]))
        if changed and not accept_changes:
            text = (
                f"{self.folder}: has begun ({', '.join(begun)}) with other settings; choose another name, remove the folder, "
                f"resume with the old settings: troupe resume {self.folder}, or with the new ones: --accept-changes"
            )
            raise RunError("\n  ".join([text, *lines]))
        for stage, settings in changed.items():
            if saved := self.checkpoints(stage):  # else no work with the old settings is left
                self.changes.append({"stage": stage, "after": saved[-1], "settings": settings})

    @classmethod
    def open(cls, folder: Path, overrides: Sequence[str] = (), accept_changes: bool = False) -> Run:
        """An existing run, with overrides. Raises RunError if there is no run, or if an override affects the results of a stage
        that is finished, or that has begun unless changes are accepted."""
        folder = folder.expanduser()
        if not (folder / "config.yaml").exists():
            raise RunError(f"{folder.absolute()}: not a run's folder (no config.yaml)")
        old = load_config(folder / "config.yaml", saved=True)
        run = cls(load_config(folder / "config.yaml", list(overrides), saved=True), folder)
        for name in ("name", "runs"):
            if (new := getattr(run.config, name)) != getattr(old, name):
                raise RunError(f"{name}: was {new!r}, but the run stays in its folder, {folder}; leave it out")
        run._refuse_other_settings(old, accept_changes)
        return run

    def go_to_working_folder(self) -> bool:
        """Change to the run's working folder if it differs from the current one and exists. Returns whether it changed."""
        folder = self.working_folder
        if folder is None or in_copy() or not Path(folder).is_dir() or Path(folder).samefile("."):
            return False
        os.chdir(folder)
        return True

    # ------------------------------------------------------------ models

    def model(self, stage: Stage) -> Path:
        """Folder of a stage's model; exists once the stage is finished. Absolute, for workers with other working folders."""
        return self.folder / "models" / stage

    def finished(self, stage: Stage) -> bool:
        return self.model(stage).exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, and remove what a killed process left. Raises RunError if another process has locked it."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.folder}: another process is running this run") from error
            for folder in (self.folder, *(self.folder / name for name in ("models", "samples"))):
                clear_leftovers(folder)
            for folder in (self.folder / "checkpoints").glob("*/"):
                clear_leftovers(folder)
            yield

    def is_locked(self) -> bool:
        """Whether a process has locked the folder. Changes nothing there."""
        try:
            with open(self.folder / ".lock", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def begun(self) -> list[Stage]:
        """The stages that have recorded metrics or finished."""
        from orchestrator.storage import read_metrics

        recorded = {line["stage"] for line in read_metrics(self.folder)}
        return [stage for stage in STAGES if stage in recorded or self.finished(stage)]

    # ------------------------------------------------------------ models that stages start from

    @cached_property
    def lineage(self) -> list[Run]:
        """This run, the run of its `start_from`, the run of that run's `start_from`, and so on.

        Raises RunError if one does not exist.
        """
        runs, folders = [self], {os.path.realpath(self.folder)}
        while (start := runs[-1].config.start_from) is not None:
            folder, prefix = Path(start), f"{runs[-1].folder}: " if len(runs) > 1 else ""
            if os.path.realpath(folder) in folders:
                raise RunError(
                    f"{prefix}start_from: was {start!r}, which leads back to the run itself; name another run"
                )
            if not (folder / "config.yaml").exists():
                raise RunError(f"{prefix}start_from: was {start!r}, which is not a run's folder (no config.yaml)")
            folders.add(os.path.realpath(folder))
            runs.append(Run(load_config(folder / "config.yaml", saved=True), folder))
        return runs

    def owner(self, stage: Stage) -> Run | None:
        """The run that has the stage: this run, or else the nearest run of its `lineage`. Errors: see lineage."""
        return next((run for run in self.lineage if stage in run.stages or run.finished(stage)), None)

    def trained(self, stage: Stage) -> Path | None:
        """Folder of a stage's model, which exists once this run has finished the stage; None if no run has the stage.

        Raises RunError if the stage belongs to another run, which has not finished it.
        """
        owner = self.owner(stage)
        if owner is None or owner is self or owner.finished(stage):
            return owner.model(stage) if owner else None
        raise RunError(
            f"start_from: was {self.config.start_from!r}, but {owner.folder} has not finished its stage {stage}, whose model is "
            f"needed; finish it first: troupe resume {owner.folder}"
        )

    def starting_model(self, stage: Stage) -> str:
        """The model that a stage starts from: the configured one for SFT; for later stages the SFT stage's, if there is one."""
        if stage == "rm" and self.config.rm and self.config.rm.model:
            return local(self.config.rm.model.path)
        trained = self.trained("sft") if stage != "sft" else None
        return str(trained) if trained else local(self.config.model.path)

    def reward_models(self) -> dict[str, str]:
        """Source of a reward -> folder of its model; without models that no run has."""
        sources = (
            [source for source in self.config.ppo.rewards if isinstance(source, ModelReward)] if self.config.ppo else []
        )
        trained = self.trained("rm") if any(source.path is None for source in sources) else None
        folders = {source.name: local(source.path) if source.path else trained for source in sources}
        return {name: str(path) for name, path in folders.items() if path}

    def external_models(self, stages: Sequence[Stage]) -> dict[Stage, Path]:
        """The models of other runs that stages start from: the stage that trained a model -> its folder. Errors: see trained."""
        used = {self.starting_model(stage) for stage in stages if stage != "sft"}
        used |= set(self.reward_models().values()) if "ppo" in stages else set()
        owners = {stage: self.owner(stage) for stage in STAGES}
        external = {stage: owner.model(stage) for stage, owner in owners.items() if owner and owner is not self}
        return {stage: path for stage, path in external.items() if str(path) in used}

    def _start(self, stage: Stage) -> dict[str, Any]:
        """The models that a stage starts from, for run.json; this run's own models as `models/<stage>`."""
        own = {str(self.model(other)): f"models/{other}" for other in STAGES}
        model = self.starting_model(stage)
        rewards = self.reward_models() if stage == "ppo" else {}
        start: dict[str, Any] = {"model": own.get(model, model)}
        return start | ({"rewards": {name: own.get(path, path) for name, path in rewards.items()}} if rewards else {})

    def text_model(self, stage: Stage) -> str:
        """The model whose tokenizer encodes a stage's data: its starting model; before SFT is finished, the configured model."""
        sft = self.owner("sft")
        return self.starting_model(stage) if sft and sft.finished("sft") else local(self.config.model.path)

    def form(self, stage: Stage) -> str:
        """The form of a stage's training rows: text (plain), chat (in the chat template) or mixed."""
        recorded: str | None = self.read("run.json").get("forms", {}).get(stage)
        return recorded or ("chat" if self.config.chat_template else "text")

    # ------------------------------------------------------------ small files

    def read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write(self, name: str, value: Any) -> None:
        write_json(self.folder / name, value)

    def summarize(self, stage: Stage, numbers: dict[str, float]) -> None:
        """Record a stage's results in summary.json."""
        summary = self.read("summary.json")
        summary.setdefault("stages", {})[stage] = numbers
        self.write("summary.json", summary)

    # ------------------------------------------------------------ checkpoints

    def checkpoints(self, stage: Stage) -> list[int]:
        """Steps of the stage's checkpoints, ascending."""
        folder = self.folder / "checkpoints" / stage
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.exists() else []

    def checkpoint(self, stage: Stage, step: int) -> Path:
        return self.folder / "checkpoints" / stage / str(step)

    @contextmanager
    def saving(self, stage: Stage, step: int) -> Iterator[Path]:
        """A folder for a new checkpoint. After the block the checkpoint, its checksums, and the metrics and logged answers are on
        disk. Raises DiskError if the disk is full or fails; earlier checkpoints stay intact."""
        with atomic_directory(self.checkpoint(stage, step)) as folder:
            yield folder
            write_checksums(folder)
            for file in (*self.folder.glob("metrics.jsonl"), *self.folder.glob("samples/*.jsonl")):
                sync(file)

    def sound_checkpoint(self, stage: Stage, warn: Callable[[str], None]) -> int | None:
        """Step of the stage's newest intact checkpoint; None if there is none.

        Renames damaged ones to <step>.damaged and calls `warn`.
        """
        for step in reversed(self.checkpoints(stage)):
            folder = self.checkpoint(stage, step)
            if not (faults := verify(folder)):
                return step
            renamed = next(name for n in count() if not (name := folder.with_name(f"{step}.damaged{n or ''}")).exists())
            os.rename(folder, renamed)
            warn(f"{folder}: damaged, so the previous one is used; renamed to {renamed.name}\n  " + "\n  ".join(faults))
        return None

    def prune(self, stage: Stage, keep: int) -> None:
        for step in self.checkpoints(stage)[:-keep] if keep else self.checkpoints(stage):
            discard(self.checkpoint(stage, step))

    @contextmanager
    def tolerating(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Turn disk errors in the block into warnings if `checkpoint.on_error` is continue."""
        try:
            yield
        except DiskError as error:
            if self.config.checkpoint.on_error == "stop":
                raise
            self.failures.write("DiskError", f"DiskError: {error}", key=DiskError)
            warn(f"{error}; the run continues (checkpoint.on_error: continue)")


def _refuse_links(folder: Path) -> None:
    """Refuse links that lead out of the folder: a run's folder may come from somebody else, and a link would redirect writes."""
    root = os.path.realpath(folder)
    for path in folder.rglob("*"):
        if path.is_symlink() and path != folder / "logs":
            target = os.path.realpath(path)
            if os.path.commonpath([root, target]) != root:
                raise RunError(
                    f"{path}: a link to {target}, outside of the run's folder; remove it (to use another disk, "
                    "set `runs` to a folder there)"
                )


def in_copy() -> bool:
    """Whether this process is a Ray job in a copy of the working folder, which the cluster deletes afterwards."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return bool(job.get("runtime_env", {}).get("working_dir"))


def described(config: RunConfig) -> list[Stage]:
    """The stages with a section in the config."""
    return [stage for stage in STAGES if config.section(stage) is not None]


def local(path: str) -> str:
    """The absolute path of a model's folder, for workers with other working folders; a hub name unchanged."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path
