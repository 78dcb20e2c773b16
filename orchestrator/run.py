"""A run's folder: what is in it, and what is whole.

    runs/<name>/  config.yaml  run.json  metrics.jsonl  tensorboard/  evaluation/  summary.json  report.html
                  checkpoints/<stage>/<step>/   models/<stage>/   logs -> the workers' of the latest Ray session

Folders and small files appear whole or not at all. A checkpoint carries checksums; one that does not agree with them is
renamed to <step>.damaged, and the one before serves.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from configs import RunConfig, load_config, save_config
from orchestrator.integrity import (
    DiskError,
    clear_leftovers,
    discard,
    seal,
    sync,
    verify,
    whole_folder,
    write_json,
    writing,
)
from placement.choice import automatic, kept
from placement.shape import Stage

STAGES: tuple[Stage, ...] = ("sft", "rm", "ppo")
OWN: dict[Stage, tuple[str, ...]] = {"sft": ("sft",), "rm": ("rm",), "ppo": ("ppo", "rollout", "publish")}
"""Settings that no other stage looks at: they may change until the stage has begun."""
FREE = (
    "cluster",
    "checkpoint",
    "deadlines",
    "recovery",
    "runs",
    "placement",
    "strategy",
    "strategies",
    "offload",
    "share",
)
"""Settings that may change at any time: no result depends on them (on where roles lie and how they are sharded, none beyond
float tolerance)."""


class RunError(RuntimeError):
    """A run cannot be started or continued as asked."""


class Run:
    """A run's folder and settings."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Raises RunError where something in the folder leads out of it, or it cannot be read."""
        self.config = config
        self.folder = folder.absolute()
        try:
            _refuse_links(self.folder)
            noted = self.read("run.json")
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be read: {error.strerror}") from error
        self.stages: list[Stage] = list(noted.get("stages", []))
        """What the run was asked for, in order."""
        self.working_folder: str | None = noted.get("working_folder", None if in_copy() else os.getcwd())
        """Where the run began: relative paths and modules in its settings are meant from there. None: a folder that is gone."""

    @classmethod
    def begin(cls, config: RunConfig, stages: Sequence[Stage], accept_changes: bool = False) -> Run:
        """A new run, or more of one that is there: finished stages stay finished. Nothing is written before `keep`.

        Raises RunError where a stage that has begun there has other settings, unless changes are accepted.
        """
        run = cls(config, Path(config.runs) / config.name)
        if (run.folder / "config.yaml").exists():
            old = load_config(run.folder / "config.yaml")
            if any(run.begun(stage) for stage in STAGES):
                run.config = kept(config, old)
            if not accept_changes:
                run._refuse_other_settings(old)
        run.stages = [stage for stage in STAGES if stage in {*run.stages, *stages}]
        return run

    def keep(self) -> None:
        """Make the folder, and note the settings and the stages in it."""
        with writing(self.folder):
            save_config(self.config, self.folder / "config.yaml")
        self.write("run.json", {"stages": self.stages, "working_folder": self.working_folder})

    def chosen(self, config: RunConfig) -> str | None:
        """Go on with settings in which each strategy is named, and note them in the folder. What `auto` became, in words."""
        roles = automatic(self.config)
        if not roles:
            return None
        self.config = config
        self.keep()
        return f"strategy: auto is {', '.join(f'{config.strategy_of(role)} for the {role}' for role in roles)}"

    def _refuse_other_settings(self, old: RunConfig) -> None:
        begun = [stage for stage in STAGES if self.begun(stage)]
        free = {*FREE, *(name for stage in STAGES if stage not in begun for name in OWN[stage])}
        changed = differences(old.model_dump(exclude=free), self.config.model_dump(exclude=free))
        if begun and changed:
            text = (
                f"{self.folder}: has begun ({', '.join(begun)}) with other settings; choose another name, remove the folder, "
                f"go on as it began with: troupe resume {self.folder}, or with these by --accept-changes"
            )
            raise RunError("\n  ".join([text, *changed]))

    @classmethod
    def open(cls, folder: Path, overrides: Sequence[str] = (), accept_changes: bool = False) -> Run:
        """An existing run, with some settings changed. Raises RunError where there is none, or where results depend on a
        change, unless changes are accepted."""
        if not (folder / "config.yaml").exists():
            raise RunError(f"{folder.absolute()}: no run is here (no config.yaml)")
        run = cls(load_config(folder / "config.yaml", list(overrides)), folder)
        if not accept_changes:
            run._refuse_other_settings(load_config(folder / "config.yaml"))
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
        with open(self.folder / ".lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.folder}: another process is at work in this run") from error
            for folder in (self.folder, self.folder / "models", *(self.folder / "checkpoints").glob("*/")):
                clear_leftovers(folder)
            yield

    def begun(self, stage: Stage) -> bool:
        """Whether anything of the stage has been computed."""
        from orchestrator.metrics import read_metrics  # half a second, which `troupe plan` need not spend

        return self.finished(stage) or any(line["stage"] == stage for line in read_metrics(self.folder))

    def starting_model(self, stage: Stage) -> str:
        """What a stage starts from: SFT from the configured model; later stages from the SFT stage's, where the run has one."""
        if stage == "rm" and self.config.rm and self.config.rm.model:
            return local(self.config.rm.model.path)
        return str(self.model("sft")) if stage != "sft" and self.finished("sft") else local(self.config.model.path)

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
        as are the metrics up to it. Raises DiskError where the disk is full or fails; earlier checkpoints are unharmed."""
        with whole_folder(self.checkpoint(stage, step)) as folder:
            yield folder
            seal(folder)
            if (metrics := self.folder / "metrics.jsonl").exists():
                sync(metrics)

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
    return [stage for stage in STAGES if getattr(config, stage) is not None]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of settings that differ, with both values."""
    found = []
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} there, {b!r} asked for")
    return sorted(found)


def local(path: str) -> str:
    """A model's folder by its absolute path, for workers with other working folders; a hub name as it is."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path
