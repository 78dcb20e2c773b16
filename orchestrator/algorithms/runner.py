"""The runner: everything around the steps of a stage. It starts, recovers, checkpoints, records, exports and stops."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import RayError
from rich.console import Console

from configs.schema import Role, RunConfig
from orchestrator.algorithms.base import Algorithm
from orchestrator.loggers.console import Progress
from orchestrator.loggers.recorder import Recorder
from orchestrator.run.run_dir import RunError
from orchestrator.run.status import Status
from orchestrator.run.stop_signal import Stopped, StopSignal
from orchestrator.storage.atomic_files import DiskError, atomic_directory
from orchestrator.worker_groups.calls import run_concurrently
from orchestrator.worker_groups.failure_policy import FailurePolicy
from orchestrator.worker_groups.failures import WorkerError
from orchestrator.worker_groups.snapshot import Snapshot
from orchestrator.worker_groups.team import Team
from placement.types import Plan
from placement.types import Stage as StageName
from workers.api import TrainerApi, WorkerApi
from workers.process.inspection import proportional_memory
from workers.process.remote_error import summary

MAX_SKIPPED_BATCHES = 20
"""Files with the batches of skipped optimizer steps in a run's folder."""


class SkippedStepsError(RuntimeError):
    """Optimizer steps were skipped in too many steps in a row: the run learns nothing more."""


class Callback:
    """Hooks around a stage, for measurements for example. All methods are optional."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Context of the phases `start` and `load`, and of each phase of a step."""
        return nullcontext()

    def workers_changed(self, team: Team) -> None:
        """Called when there are new workers."""


class Runner:
    """Runs an algorithm: plan, workers, progress, metrics, recovery, checkpoints, the finished model.

    export: whether the trained model is written.
    """

    def __init__(
        self, algorithm: Algorithm, console: Console, callbacks: Sequence[Callback] = (), export: bool = True
    ) -> None:
        self.algorithm, self.run, self.console = algorithm, algorithm.run, console
        self.callbacks, self.exports = callbacks, export
        algorithm.context = self
        self.plan: Plan
        self.seconds: dict[str, float] = {}
        self.team: Team = None  # type: ignore[assignment]  # until it is started
        self.loaded = False
        """Whether models and data are loaded."""
        self.snapshots: list[Snapshot] = []
        """Newest first. Older ones are kept until the newest is replicated to a second node."""
        self.skipped = 0
        """Latest steps in a row in which an optimizer step was skipped."""
        self.first_state: dict[str, Any] = {}
        self.recovery: FailurePolicy
        self.status: Status
        self.progress: Progress
        self.recorder: Recorder
        self.stop: StopSignal
        self.done = 0
        """Finished steps."""

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def name(self) -> StageName:
        return self.algorithm.name

    @property
    def steps(self) -> int:
        return self.algorithm.steps

    def trained(self) -> list[Role]:
        return self.algorithm.trained()

    def state(self) -> dict[str, Any]:
        """State of the run that is not a function of the step."""
        return {"skipped": self.skipped, **self.algorithm.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a result of `state`."""
        self.skipped = state["skipped"] if "skipped" in state else state["refused"]  # its name in older checkpoints
        self.algorithm.set_state(state)

    # ------------------------------------------------------------ the stage

    def execute(self, plan: Plan, stop: StopSignal) -> None:
        """Run the stage to its end, from its latest checkpoint if there is one; export the model, write the numbers.

        Raises Stopped after the step in which a stop was requested, with a checkpoint if a step was finished.
        """
        self.plan, self.stop = plan, stop
        self.done = self.run.sound_checkpoint(self.name, lambda text: self.console.print(f"warning: {text}")) or 0
        self.recovery = FailurePolicy(self.config.recovery, self.run.failures, lambda text: self.progress.note(text))
        with Status(self.run.folder, self.name, self.steps, self.done) as self.status:
            try:
                with (
                    Progress(self.name, self.steps, self.console, self.done, self.status.begin_phase) as self.progress,
                    self._recorder() as self.recorder,
                ):
                    self.recovery.on_failure = self.recorder.failed
                    self._carry_out()
            except DiskError as error:
                if not self.run.finished(self.name):
                    raise
                self.run.failures.write_exception(error)
                self.console.print(
                    f"warning: {self.name} is finished, but not all of its metrics were written: {error}"
                )

    def _recorder(self) -> Recorder:
        def failed(logger: str, error: Exception) -> None:
            self.run.failures.write_exception(error)
            self.warn(f"{logger}: {summary(error)}; the run continues, and further errors of this logger are not shown")

        resume_step = self.done or None
        return Recorder(self.run.folder, self.config.name, self.name, resume_step, self.config.loggers, on_error=failed)

    def _carry_out(self) -> None:
        """The whole stage. If it fails, the latest snapshot becomes a checkpoint."""
        try:
            self._survive()
            self._finish()
        except Exception:
            try:
                self._keep_snapshot()
            except (DiskError, RayError) as error:
                self.warn(f"the latest snapshot was not kept: {error}")
            raise
        finally:
            self._end_team()

    def _survive(self) -> None:
        """Start, run the steps and export the model. After a failure go back and repeat the lost steps, as often as the failure
        policy allows."""
        prepare: Callable[[], None] = self._start
        self.run.failures.where = f"{self.name}, before step {self.done + 1}"
        while True:
            try:
                prepare()
                self._work()
                self.run.failures.where = f"{self.name}, after step {self.steps} of {self.steps}"
                self.algorithm.complete()
                if self.exports:
                    self._export()
                return
            except WorkerError as error:
                if error.final:
                    raise
                prepare = partial(self._go_back if self.loaded else self._start_again, error)

    def _finish(self) -> None:
        """Work after the export. Its errors must not end the run: the stage is finished."""
        with self.sparing("its numbers in summary.json are omitted"):
            self.run.summarize(self.name, self.algorithm.result())
        with self.sparing("its checkpoints, which are no longer needed, were not removed"):
            self.run.prune(self.name, 0)

    @contextmanager
    def sparing(self, consequence: str) -> Iterator[None]:
        """For work that the trained model does not depend on: an error in the block is recorded, and the stage goes on.

        Raises the WorkerError of a worker that has to be replaced, or of a trained role: its ranks may wait for one another,
        and the model could then not be exported.
        """
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if isinstance(error, WorkerError):
                if not error.final and (error.failure.survivable or error.failure.role in self.trained()):
                    raise
                reason = error.failure.text
                if not error.final:
                    self.recovery.record(error.failure, consequence)
            else:
                reason = summary(error)
                self.run.failures.write_exception(error)
            self.warn(f"{self.name}: {consequence}: {reason}")

    def _start(self) -> None:
        """Start workers, load models and data, and the latest checkpoint if there is one."""
        with self._called_back("start"):
            self.progress.phase("starting workers")
            self.team = Team.start(
                self.config, self.plan, self.recovery, self._workers_changed, self.run.started, self.progress.note
            )
            self._check_folder()
        with self._called_back("load"):
            self.progress.phase("loading")
            self.algorithm.load()
        self.loaded = True
        self.first_state = self.state()
        if self.done:
            self._restore()

    def _start_again(self, error: WorkerError) -> None:
        decision = self.recovery.decide(error)
        if isinstance(decision, WorkerError):
            raise decision
        self._end_team()
        self._start()

    def _go_back(self, error: WorkerError) -> None:
        """Replace failed workers and go on from the latest snapshot or checkpoint, or from the start of the stage."""
        snapshot = self._latest_snapshot()
        saved = None if snapshot else self.run.sound_checkpoint(self.name, self.warn)
        self.progress.phase("replacing workers")
        self.team.replace(error, reset_roles=[] if snapshot or saved else self.trained())
        self.seconds = {}
        if snapshot:
            del self.snapshots[0]  # restoring it may show that it is lost
            self.done = snapshot.step
            self.team.restore(snapshot)
            self.set_state(snapshot.state)
            self.snapshots.insert(0, snapshot)
        elif saved:
            self.done = saved
            self._restore()
        else:
            self.done = 0
            self.set_state(self.first_state)
        self.recorder.rewind(self.done or -1)
        self.status.update(step=self.done)

    def _work(self) -> None:
        if not self.done:
            self.algorithm.begin()
        if self.done < self.steps:
            self.stop.raise_if_requested(f"before step {self.done + 1} of {self.steps} of {self.name}")
        while self.done < self.steps:
            self.run.failures.where = f"{self.name}, step {self.done + 1} of {self.steps}"
            self._finish_step(self.done + 1, self.algorithm.step(self.done + 1))

    def _end_team(self) -> None:
        if self.team:
            self.team.stop()
        self.team = None  # type: ignore[assignment]

    def _workers_changed(self, team: Team) -> None:
        self.status.watch(team)
        for callback in self.callbacks:
            callback.workers_changed(team)
        self.recorder.workers(team.workers())

    def warn(self, text: str) -> None:
        self.progress.note(f"warning: {text}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of a step."""
        started = time.monotonic()
        self.status.begin_phase(name)
        with self._called_back(name):
            yield
        self.seconds[name] = time.monotonic() - started

    @contextmanager
    def _called_back(self, phase: str) -> Iterator[None]:
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.phase(phase))
            yield

    def show(self, text: str) -> None:
        self.progress.phase(text)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self.recorder.record(step, metrics)

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        self.recorder.keep_answers(step, answers, most_bytes)

    def spent(self) -> dict[str, float]:
        """Seconds of the phases since the previous step was recorded, its snapshot and checkpoint included; memory of each role
        and of this process."""
        memory = self.team.memory() | {"driver": proportional_memory()}
        return {
            **{f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()},
            **{f"memory_gib/{process}": size / 2**30 for process, size in memory.items()},
        }

    def _finish_step(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step, and save if a checkpoint or snapshot is due. Raises Stopped if a stop was requested."""
        self.done = step
        self.seconds = {}
        self._count_skipped(metrics)
        with self.run.tolerating(self.warn):
            self.recorder.record(step, metrics)
        self.recorder.spent(self.team.deadlines.taken())
        self.progress.update(step, metrics)
        self.status.update(step=step, version=self.team.version)
        every = self.config.checkpoint.every
        if step == self.steps:
            return  # the stage ends with the export, so no checkpoint is needed
        if self.stop.asked or (every and step % every == 0):
            with self.phase("save"), self.run.tolerating(self.warn):
                self.save()
        if (often := self.config.recovery.snapshot_every) and step % often == 0:
            with self.phase("snapshot"):
                self.snapshots.insert(0, self.team.snapshot(step, self.state(), self.trained()))
        for k, snapshot in enumerate(self.snapshots[:-1], start=1):
            if snapshot.safe():
                del self.snapshots[k:]
                break
        self.stop.raise_if_requested(f"after step {step} of {self.steps} of {self.name}")

    def _count_skipped(self, metrics: dict[str, float]) -> None:
        """Record skipped optimizer steps, with their batches. Raises SkippedStepsError after too many in a row."""
        roles = [role for role in self.trained() if metrics.get(f"skipped/{role}", metrics.get("skipped"))]
        self.skipped = self.skipped + 1 if roles else 0
        for role in roles:
            self._record_skipped(role, metrics)
        if self.skipped >= self.config.recovery.max_skipped_steps:
            raise SkippedStepsError(
                f"{self.name}, step {self.done}: optimizer steps were skipped in {self.skipped} steps in a row "
                "(recovery.max_skipped_steps): loss, gradient or KL are not finite or too large "
                f"(skip_grad_norm, ppo.max_kl_per_step); their batches are in {self.run.failures.folder}"
            )

    def _record_skipped(self, role: Role, metrics: dict[str, float]) -> None:
        """Write a failure record and, where the ranks skipped the step themselves, each rank's batch."""
        folder = self.run.failures.folder
        loss = {"actor": "loss/policy", "critic": "loss/value"}.get(role, "loss")
        names = dict.fromkeys(("kl", "loss", loss, "grad_norm", f"grad_norm/{role}"))
        numbers = ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
        text = f"train: {role}: an optimizer step was skipped: {numbers}"
        self.run.failures.write(f"{role}-skipped", text, key=("skipped", role))
        for rank, batch in enumerate(self.team.groups[role].call(TrainerApi.skipped_batch).get()):
            if batch is not None and len(list(folder.glob("*.npz"))) < MAX_SKIPPED_BATCHES:
                path = folder / f"{self.name}-{self.done}-skipped-{role}-{rank}.npz"
                with self.sparing(f"the batch of {role}'s skipped optimizer step in step {self.done} was not written"):
                    np.savez(path, **dict[str, Any](batch))
                    self.warn(f"step {self.done}: {role} skipped an optimizer step; its batch: {path}")

    # ------------------------------------------------------------ saving

    def save(self) -> None:
        with self.run.saving(self.name, self.done) as folder:
            run_concurrently(
                *(
                    self.team.groups[role].call(TrainerApi.save, str((folder / role).absolute()))
                    for role in self.trained()
                )
            )
            for role in self.trained():
                self._must_see(folder / role)
            self._write_state(folder, self.done, self.state())
        self.run.prune(self.name, self.config.checkpoint.keep)

    def _latest_snapshot(self) -> Snapshot | None:
        """The newest available one; newer ones that are lost are dropped."""
        while self.snapshots and not self.snapshots[0].available():
            del self.snapshots[0]
        return self.snapshots[0] if self.snapshots else None

    def _keep_snapshot(self) -> None:
        """Write the latest snapshot as a checkpoint when the run fails."""
        saved = max(self.run.checkpoints(self.name), default=0)
        while (snapshot := self._latest_snapshot()) and snapshot.step > saved:
            try:
                with self.run.saving(self.name, snapshot.step) as folder:
                    snapshot.write(folder)
                    self._write_state(folder, snapshot.step, snapshot.state)
                return
            except RayError as error:
                self.warn(f"the snapshot after step {snapshot.step} was not kept: {error}")
                del self.snapshots[0]

    def _write_state(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        (folder / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")

    def _restore(self) -> None:
        folder = self.run.checkpoint(self.name, self.done)
        self.progress.phase(f"resuming after step {self.done}")
        run_concurrently(
            *(
                self.team.groups[role].call(TrainerApi.restore, str((folder / role).absolute()))
                for role in self.trained()
            )
        )
        self.set_state(json.loads((folder / "state.json").read_text(encoding="utf-8")))

    def _export(self) -> None:
        """Write the trained model. If that fails, its state becomes a checkpoint: a resumed run then only exports."""
        self.progress.phase("exporting")
        try:
            with atomic_directory(self.run.model(self.name)) as folder:
                self.team.export(self.trained()[0], folder)
                self._must_see(folder / "config.json")
        except Exception as error:
            if not isinstance(error, Stopped) and not (isinstance(error, WorkerError) and error.failure.survivable):
                self._keep_trained()
            raise

    def _keep_trained(self) -> None:
        if self.done in self.run.checkpoints(self.name):
            return
        try:
            self.save()
        except (DiskError, RunError, WorkerError) as error:
            self.warn(f"the trained state was not kept either: {summary(error)}")
        else:
            self.warn(f"not exported, but the trained state is kept: `troupe resume {self.run.folder}` exports it")

    def _check_folder(self) -> None:
        """Check that the driver sees files that workers write in the run's folder: checkpoints and models need it."""
        for role in self.trained():
            for name in self.team.groups[role].call(WorkerApi.mark, str(self.run.folder.absolute())).get():
                self._must_see(self.run.folder / name)
                (self.run.folder / name).unlink()

    def _must_see(self, path: Path) -> None:
        """Raise RunError if the driver does not see a worker's file: on another node the folder may be another one."""
        if not path.exists():
            raise RunError(
                f"runs: was {self.config.runs!r}, where the driver does not see the files of the workers ({path.name})"
            )
