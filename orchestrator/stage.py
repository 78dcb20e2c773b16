"""What every stage does around its loop: plan, workers, progress, metrics, checkpoints, the finished model."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from configs.schema import DatasetSettings, Role, RunConfig
from orchestrator.calls import together
from orchestrator.metrics import Recorder
from orchestrator.progress import Progress
from orchestrator.run import Run, RunError, whole_folder
from orchestrator.team import Team
from placement.plan import Plan
from placement.shape import Stage as StageName
from workers.data import Row, RowKind, read_rows


class Stopped(RuntimeError):
    """The run was asked to stop, and did, with a checkpoint where there was something to keep."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number
        """Of the signal."""


class StopSignal:
    """SIGTERM and SIGINT: the first asks the run to stop after its step, the second ends the process at once."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._number = 0

    @property
    def asked(self) -> bool:
        return self._number != 0

    def heed(self, when: str) -> None:
        """Raises Stopped where the run was asked to stop."""
        if self.asked:
            raise Stopped(f"stopped {when}; go on with: troupe resume {self._run.folder}", self._number)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self._number = number
        self._console.print("stopping after this step; once more stops at once")


class StageRun:
    """One stage of a run. Subclasses say what is read, loaded and done."""

    name: StageName

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self.config: RunConfig = run.config
        self.plan: Plan
        self.seconds: dict[str, float] = {}
        self.team: Team
        self.progress: Progress
        self.recorder: Recorder
        self.stop: StopSignal
        self.done = 0
        """Steps that are done."""

    # ------------------------------------------------------------ for subclasses

    @property
    def steps(self) -> int:
        raise NotImplementedError

    def read(self) -> None:
        """Read and check all data, before anything starts."""
        raise NotImplementedError

    def load(self) -> None:
        """Load models and data into the workers."""
        raise NotImplementedError

    def loop(self) -> None:
        """Steps done + 1 to `steps`."""
        raise NotImplementedError

    def result(self) -> dict[str, float]:
        """Final numbers, for the summary."""
        raise NotImplementedError

    def trained(self) -> list[Role]:
        """The roles that learn; the first one's model is the stage's result."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What steers the run and is not a function of the step."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""

    # ------------------------------------------------------------ the stage

    def execute(self, plan: Plan, stop: StopSignal) -> None:
        """Run the stage from its latest checkpoint, or from the start, to its end; export the model, note the numbers.

        Raises Stopped after the step in which the run was asked to stop, with a checkpoint where a step was done.
        """
        started = time.monotonic()
        self.plan, self.stop = plan, stop
        saved = self.run.checkpoints(self.name)
        self.done = saved[-1] if saved else 0
        with (
            Progress(self.name, self.steps, self.console, start=self.done) as self.progress,
            Recorder(self.run.folder, self.config.name, self.name, self.done if saved else None) as self.recorder,
        ):
            self.progress.phase("starting workers")
            self.team = Team.start(self.config, self.plan)
            try:
                self.progress.phase("loading")
                self.load()
                if saved:
                    self._restore(self.run.checkpoint(self.name, self.done))
                stop.heed(f"before step {self.done + 1} of {self.steps} of {self.name}")
                self.loop()
                self.run.summarize(self.name, self.result() | {"seconds": time.monotonic() - started})
                self._export()
            finally:
                self.team.stop()
        self.run.prune(self.name, 0)

    def rows(self, data: DatasetSettings, kind: RowKind) -> list[Row]:
        return read_rows(data, kind)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of a step."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def spent(self) -> dict[str, float]:
        """Metrics of the step: seconds of its phases, memory of each role."""
        memory = self.team.memory()
        return {
            **{f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()},
            **{f"memory_gib/{role}": size / 2**30 for role, size in memory.items()},
        }

    def finish_step(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step; save where it is due. Raises Stopped where the run was asked to stop."""
        self.done = step
        self.seconds = {}
        self.recorder.record(step, metrics)
        self.progress.update(step, metrics)
        every = self.config.checkpoint.every
        if step == self.steps:
            return  # the model is about to be exported, and the stage is over
        if self.stop.asked or (every and step % every == 0):
            self.save()
        self.stop.heed(f"after step {step} of {self.steps} of {self.name}")

    # ------------------------------------------------------------ saving

    def save(self) -> None:
        with whole_folder(self.run.checkpoint(self.name, self.done)) as folder:
            together(*(self.team.groups[role].call("save", str((folder / role).absolute())) for role in self.trained()))
            for role in self.trained():
                self._must_see(folder / role)
            (folder / "state.json").write_text(json.dumps({"step": self.done, **self.state()}), encoding="utf-8")
        self.run.prune(self.name, self.config.checkpoint.keep)

    def _restore(self, folder: Path) -> None:
        self.progress.phase(f"resuming after step {self.done}")
        together(*(self.team.groups[role].call("restore", str((folder / role).absolute())) for role in self.trained()))
        self.set_state(json.loads((folder / "state.json").read_text(encoding="utf-8")))

    def _export(self) -> None:
        self.progress.phase("exporting")
        with whole_folder(self.run.model(self.name)) as folder:
            self.team.export(self.trained()[0], folder)
            self._must_see(folder / "model.safetensors")

    def _must_see(self, path: Path) -> None:
        """A worker on another node may have written elsewhere."""
        if not path.exists():
            raise RunError(
                f"runs: was {self.config.runs!r}, where the driver does not see what the workers wrote ({path.name})"
            )
