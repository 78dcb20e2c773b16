"""A run's folder: what is in it, and what is whole.

    runs/<name>/  config.yaml  run.json  status.json  metrics.jsonl  tensorboard/  samples/  evaluation/  summary.json
                  report.html  checkpoints/<stage>/<step>/   models/<stage>/   failures/
                  logs -> the workers' of the latest Ray session

Folders and small files appear whole or not at all. A checkpoint carries checksums; one that does not agree with them is
renamed to <step>.damaged, and the one before serves.
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
from orchestrator.storage.atomic_files import (
    DiskError,
    atomic_directory,
    clear_leftovers,
    discard,
    sync,
    verify,
    write_checksums,
    write_json,
    writing,
)
from orchestrator.storage.failure_log import FailureLog
from placement.memory import auto_roles, keep_resolved
from placement.plan import auto_dtype_settings
from placement.stages import STAGES
from placement.types import Stage


class RunError(RuntimeError):
    """A run cannot be started or continued as asked."""


class Run:
    """A run's folder and settings."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Raises RunError where something in the folder leads out of it, or it cannot be read."""
        self.config = config
        self.folder = folder.absolute()
        self.failures = FailureLog(self.folder / "failures")
        try:
            _refuse_links(self.folder)
            known = self.read("run.json")
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be read: {error.strerror}") from error
        self.stages: list[Stage] = list(known.get("stages", []))
        """What the run was asked for, in order."""
        self.changes: list[dict[str, Any]] = list(known.get("changes", []))
        """Settings with which stages went on that had begun with others: stage, step after which, path -> [old, new]."""
        started = known.get("started")
        self.started = datetime.fromisoformat(started) if started else datetime.now().replace(microsecond=0)
        """When it first began: the date that chat templates write, also after midnight."""
        self.working_folder: str | None = known.get("working_folder", None if in_copy() else os.getcwd())
        """Where the run began: relative paths and modules in its settings are meant from there. None: a folder that is gone."""

    @classmethod
    def begin(cls, config: RunConfig, stages: Sequence[Stage], accept_changes: bool = False) -> Run:
        """A new run, or more of one that is there: finished stages stay finished. Nothing is written before `keep`.

        Raises RunError where a stage that has finished there has other settings, and where one that has begun has, unless changes
        are accepted.
        """
        run = cls(config, Path(config.runs) / config.name)
        if (run.folder / "config.yaml").exists():
            old = load_config(run.folder / "config.yaml")
            if run.begun():
                run.config = keep_resolved(config, old)
            run._refuse_other_settings(old, accept_changes)
        run.stages = [stage for stage in STAGES if stage in {*run.stages, *stages}]
        return run

    def keep(self, forms: Mapping[Stage, str] | None = None) -> None:
        """Make the folder, and note in it the settings, the stages, what each starts from, and the changes on the way; of stages
        about to run also the form of their rows."""
        with writing(self.folder):
            save_config(self.config, self.folder / "config.yaml")
        known = self.read("run.json")
        starts = {stage: self._start(stage) for stage in self.stages if not self.finished(stage)}
        noted = {
            "stages": self.stages,
            "started": self.started.isoformat(),
            "working_folder": self.working_folder,
            "forms": known.get("forms", {}) | dict(forms or {}),
            "from": known.get("from", {}) | starts,
        }
        self.write("run.json", known | noted | ({"changes": self.changes} if self.changes else {}))

    def choose(self, config: RunConfig, why: str | None) -> list[str]:
        """Go on with settings in which each strategy and type is named, and note them in the folder. What each `auto` became, in
        words. why: the type was chosen, for run.json."""
        roles, types = auto_roles(self.config), auto_dtype_settings(self.config)
        if not roles and not types:
            return []
        self.config = config
        self.keep()
        words = []
        if types:
            dtype = attrgetter(types[0])(config)
            words.append(f"{types[0]}: auto is {dtype}: {why}")
            self.write("run.json", self.read("run.json") | {"dtype": {"is": dtype, "why": why}})
        if roles:
            words.append(
                f"strategy: auto is {', '.join(f'{config.strategy_of(role)} for the {role}' for role in roles)}"
            )
        return words

    def _refuse_other_settings(self, old: RunConfig, accept_changes: bool) -> None:
        """What finished stages were run with stays as it is noted; changes in the middle of a stage are noted."""
        begun = self.begun()
        starts = self.read("run.json").get("from", {})
        found = {stage: changes(old, self.config, stage, starts.get(stage, {})) for stage in begun}
        changed = {stage: paths for stage, paths in found.items() if paths}
        finished = [stage for stage in changed if self.finished(stage)]
        paths = {path: values for each in changed.values() for path, values in each.items()}
        lines = [f"{path}: {was!r} there, {asked!r} asked for" for path, (was, asked) in sorted(paths.items())]
        if finished:
            text = (
                f"{self.folder}: has finished ({', '.join(finished)}) with other settings, which config.yaml goes on to say. To "
                f"train with these choose another name; start_from={self.folder} takes the models of stages that the new run "
                "does not run from here"
            )
            if further := [stage for stage in finished if STAGES[stage].chats]:
                text += f", model.path={self.folder / 'models' / further[-1]} trains that model further"
            raise RunError("\n  ".join([text, *lines]))
        if changed and not accept_changes:
            text = (
                f"{self.folder}: has begun ({', '.join(begun)}) with other settings; choose another name, remove the folder, "
                f"go on as it began with: troupe resume {self.folder}, or with these by --accept-changes"
            )
            raise RunError("\n  ".join([text, *lines]))
        for stage, mine in changed.items():
            if saved := self.checkpoints(stage):  # else nothing is left of what the other settings did
                self.changes.append({"stage": stage, "after": saved[-1], "settings": mine})

    @classmethod
    def open(cls, folder: Path, overrides: Sequence[str] = (), accept_changes: bool = False) -> Run:
        """An existing run, with some settings changed. Raises RunError where there is none, or where results depend on a
        change, unless changes of a stage that is not finished are accepted."""
        folder = folder.expanduser()
        if not (folder / "config.yaml").exists():
            raise RunError(f"{folder.absolute()}: no run is here (no config.yaml)")
        old = load_config(folder / "config.yaml")
        run = cls(load_config(folder / "config.yaml", list(overrides)), folder)
        for name in ("name", "runs"):
            if (asked := getattr(run.config, name)) != getattr(old, name):
                raise RunError(f"{name}: was {asked!r}, but the run goes on in its folder, {folder}; leave it out")
        run._refuse_other_settings(old, accept_changes)
        return run

    def go_to_working_folder(self) -> bool:
        """Change to the folder where the run began, if it is another one and still there. Whether it was changed."""
        folder = self.working_folder
        if folder is None or in_copy() or not Path(folder).is_dir() or Path(folder).samefile("."):
            return False
        os.chdir(folder)
        return True

    # ------------------------------------------------------------ models

    def model(self, stage: Stage) -> Path:
        """Where a stage's model lies once it is finished; absolute, for workers with other working folders."""
        return self.folder / "models" / stage

    def finished(self, stage: Stage) -> bool:
        return self.model(stage).exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder, and tidy up after one that was killed. Raises RunError where one is at work."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.folder}: another process is at work in this run") from error
            for folder in (self.folder, *(self.folder / name for name in ("models", "samples"))):
                clear_leftovers(folder)
            for folder in (self.folder / "checkpoints").glob("*/"):
                clear_leftovers(folder)
            yield

    def at_work(self) -> bool:
        """Whether a process is at work in the folder. Changes nothing there."""
        try:
            with open(self.folder / ".lock", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def begun(self) -> list[Stage]:
        """The stages of which anything has been computed."""
        from orchestrator.storage.metrics_file import read_metrics

        recorded = {line["stage"] for line in read_metrics(self.folder)}
        return [stage for stage in STAGES if stage in recorded or self.finished(stage)]

    # ------------------------------------------------------------ what stages start from

    @cached_property
    def lineage(self) -> list[Run]:
        """This run, the run that it starts from (`start_from`), the one that that one started from, and so on.

        Raises RunError where one is not there.
        """
        runs, folders = [self], {os.path.realpath(self.folder)}
        while (named := runs[-1].config.start_from) is not None:
            folder, of = Path(named), f"{runs[-1].folder}: " if len(runs) > 1 else ""
            if os.path.realpath(folder) in folders:
                raise RunError(f"{of}start_from: was {named!r}, which leads back to the run itself; name another run")
            if not (folder / "config.yaml").exists():
                raise RunError(f"{of}start_from: was {named!r}, where no run is (no config.yaml)")
            folders.add(os.path.realpath(folder))
            runs.append(Run(load_config(folder / "config.yaml"), folder))
        return runs

    def owner(self, stage: Stage) -> Run | None:
        """The run whose model of a stage is this run's too: itself where it runs the stage, else the nearest of those that it
        starts from. Raises RunError as `lineage`."""
        return next((run for run in self.lineage if stage in run.stages or run.finished(stage)), None)

    def trained(self, stage: Stage) -> Path | None:
        """Where the model of a stage lies, or will lie once this run has finished the stage; None where no run has the stage.

        Raises RunError where another run has it and has not finished it.
        """
        owner = self.owner(stage)
        if owner is None or owner is self or owner.finished(stage):
            return owner.model(stage) if owner else None
        raise RunError(
            f"start_from: was {self.config.start_from!r}, but {owner.folder} has not finished its stage {stage}, whose model is "
            f"needed; finish it first: troupe resume {owner.folder}"
        )

    def starting_model(self, stage: Stage) -> str:
        """What a stage starts from: SFT from the configured model; later stages from the SFT stage's, where there is one."""
        if stage == "rm" and self.config.rm and self.config.rm.model:
            return local(self.config.rm.model.path)
        trained = self.trained("sft") if stage != "sft" else None
        return str(trained) if trained else local(self.config.model.path)

    def reward_models(self) -> dict[str, str]:
        """Folders of the reward models of PPO, by the names of their sources; those that no run has are left out."""
        sources = (
            [source for source in self.config.ppo.rewards if isinstance(source, ModelReward)] if self.config.ppo else []
        )
        trained = self.trained("rm") if any(source.path is None for source in sources) else None
        found = {source.name: local(source.path) if source.path else trained for source in sources}
        return {name: str(path) for name, path in found.items() if path}

    def taken(self, stages: Sequence[Stage]) -> dict[Stage, Path]:
        """The models that stages take from other runs, by the stage that trained them there. Errors: as `trained`."""
        used = {self.starting_model(stage) for stage in stages if stage != "sft"}
        used |= set(self.reward_models().values()) if "ppo" in stages else set()
        owners = {stage: self.owner(stage) for stage in STAGES}
        theirs = {stage: owner.model(stage) for stage, owner in owners.items() if owner and owner is not self}
        return {stage: path for stage, path in theirs.items() if str(path) in used}

    def _start(self, stage: Stage) -> dict[str, Any]:
        """What a stage starts from, for run.json: this run's own models as `models/<stage>`."""
        own = {str(self.model(other)): f"models/{other}" for other in STAGES}
        model = self.starting_model(stage)
        rewards = self.reward_models() if stage == "ppo" else {}
        found: dict[str, Any] = {"model": own.get(model, model)}
        return found | ({"rewards": {name: own.get(path, path) for name, path in rewards.items()}} if rewards else {})

    def text_model(self, stage: Stage) -> str:
        """The model whose tokenizer reads a stage's data: what it starts from, or will, once the SFT stage is finished."""
        sft = self.owner("sft")
        return self.starting_model(stage) if sft and sft.finished("sft") else local(self.config.model.path)

    def form(self, stage: Stage) -> str:
        """text, chat or mixed: what a stage's rows were, plain text or conversations in the chat template."""
        known: str | None = self.read("run.json").get("forms", {}).get(stage)
        return known or ("chat" if self.config.chat_template else "text")

    # ------------------------------------------------------------ small files

    def read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write(self, name: str, value: Any) -> None:
        write_json(self.folder / name, value)

    def summarize(self, stage: Stage, numbers: dict[str, float]) -> None:
        """Note a stage's results in summary.json."""
        summary = self.read("summary.json")
        summary.setdefault("stages", {})[stage] = numbers
        self.write("summary.json", summary)

    # ------------------------------------------------------------ checkpoints

    def checkpoints(self, stage: Stage) -> list[int]:
        """Steps of the stage's whole checkpoints, ascending."""
        folder = self.folder / "checkpoints" / stage
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.exists() else []

    def checkpoint(self, stage: Stage, step: int) -> Path:
        return self.folder / "checkpoints" / stage / str(step)

    @contextmanager
    def saving(self, stage: Stage, step: int) -> Iterator[Path]:
        """A folder to write a checkpoint in. It counts once the block has ended well, and then is on disk with its checksums,
        as are the metrics and the kept answers up to it. Raises DiskError where the disk is full or fails; earlier checkpoints
        are unharmed."""
        with atomic_directory(self.checkpoint(stage, step)) as folder:
            yield folder
            write_checksums(folder)
            for file in (*self.folder.glob("metrics.jsonl"), *self.folder.glob("samples/*.jsonl")):
                sync(file)

    def sound_checkpoint(self, stage: Stage, warn: Callable[[str], None]) -> int | None:
        """Step of the stage's newest checkpoint that is as it was saved; None where there is none.

        A damaged one is set aside as <step>.damaged and `warn` is told.
        """
        for step in reversed(self.checkpoints(stage)):
            folder = self.checkpoint(stage, step)
            if not (faults := verify(folder)):
                return step
            aside = next(name for n in count() if not (name := folder.with_name(f"{step}.damaged{n or ''}")).exists())
            os.rename(folder, aside)
            warn(f"{folder}: damaged, so the one before serves; set aside as {aside.name}\n  " + "\n  ".join(faults))
        return None

    def prune(self, stage: Stage, keep: int) -> None:
        for step in self.checkpoints(stage)[:-keep] if keep else self.checkpoints(stage):
            discard(self.checkpoint(stage, step))

    @contextmanager
    def tolerating(self, warn: Callable[[str], None]) -> Iterator[None]:
        """What is saved or recorded in the block may fail for want of disk space, if `checkpoint.on_error` is continue."""
        try:
            yield
        except DiskError as error:
            if self.config.checkpoint.on_error == "stop":
                raise
            self.failures.write("DiskError", f"DiskError: {error}", key=DiskError)
            warn(f"{error}; going on, as checkpoint.on_error is continue")


def _refuse_links(folder: Path) -> None:
    """What is written through a link lands elsewhere, and a run's folder may come from somebody else."""
    inside = os.path.realpath(folder)
    for path in folder.rglob("*"):
        if path.is_symlink() and path != folder / "logs":
            target = os.path.realpath(path)
            if os.path.commonpath([inside, target]) != inside:
                raise RunError(
                    f"{path}: a link to {target}, outside of the run's folder, which is not written through; remove it "
                    "(`runs` may lie on another disk as a whole)"
                )


def in_copy() -> bool:
    """Whether this process is a job in a copy of the working folder that it was sent from, which the cluster deletes."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return bool(job.get("runtime_env", {}).get("working_dir"))


def described(config: RunConfig) -> list[Stage]:
    """The stages that a config describes."""
    return [stage for stage in STAGES if config.section(stage) is not None]


def local(path: str) -> str:
    """A model's folder by its absolute path, for workers with other working folders; a hub name as it is."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path
