"""A run's folder: what is in it, and what is whole.

    runs/<name>/  config.yaml  run.json  metrics.jsonl  tensorboard/  evaluation/  summary.json  report.html
                  checkpoints/<stage>/<step>/   models/<stage>/   logs -> the Ray session's

Folders appear whole or not at all: they are written under another name and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs import RunConfig, load_config, save_config
from placement.shape import Stage

STAGES: tuple[Stage, ...] = ("sft", "rm", "ppo")


class RunError(RuntimeError):
    """A run cannot be started or continued as asked."""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name only when the block ends well."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


class Run:
    """A run's folder and settings."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder

    @classmethod
    def begin(cls, config: RunConfig, stages: Sequence[Stage]) -> Run:
        """Make the run's folder, or go on in it: finished stages stay finished.

        Raises RunError where the folder holds a run with other settings.
        """
        folder = Path(config.runs) / config.name
        file = folder / "config.yaml"
        if file.exists():
            old = load_config(file)
            changed = differences(old.model_dump(), config.model_dump())
            if changed:
                raise RunError(
                    f"{folder}: holds a run with other settings ({'; '.join(changed)}): choose another `name`, or remove it"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(config, file)
        run = cls(config, folder)
        run.write(
            "run.json",
            run.read("run.json") | {"stages": list(dict.fromkeys([*run.read("run.json").get("stages", []), *stages]))},
        )
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run. Raises RunError where there is none."""
        if not (folder / "config.yaml").exists():
            raise RunError(f"{folder}: no run is here (no config.yaml)")
        return cls(load_config(folder / "config.yaml"), folder)

    @property
    def stages(self) -> list[Stage]:
        """The stages that the run was asked for."""
        return list(self.read("run.json").get("stages", []))

    # ------------------------------------------------------------ models

    def model(self, stage: Stage) -> Path:
        return self.folder / "models" / stage

    def finished(self, stage: Stage) -> bool:
        return self.model(stage).exists()

    def starting_model(self, stage: Stage) -> str:
        """What a stage starts from: SFT from the configured model; later stages from the SFT stage's, where the run has one."""
        if stage == "rm" and self.config.rm and self.config.rm.model:
            return self.config.rm.model.path
        return str(self.model("sft")) if stage != "sft" and self.finished("sft") else self.config.model.path

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
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []

    def checkpoint(self, stage: Stage, step: int) -> Path:
        return self.folder / "checkpoints" / stage / str(step)

    def prune(self, stage: Stage, keep: int) -> None:
        for step in self.checkpoints(stage)[:-keep] if keep else self.checkpoints(stage):
            shutil.rmtree(self.checkpoint(stage, step))


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
