"""The Ray actor around workers: it imports their classes in its own process, so that the driver never imports torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from workers.api import is_remote
from workers.process import malloc
from workers.process.remote_error import portable

if TYPE_CHECKING:
    from configs.schema import Role
    from workers.process.worker import Worker, WorkerSpec

KINDS = {
    "policy": "workers.training.policy:PolicyWorker",
    "value": "workers.training.value:ValueWorker",
    "rewards": "workers.rewards.worker:RewardWorker",
    "rollout": "workers.rollout.engine:RolloutWorker",
}


class WorkerProcess:
    """The workers of one rank in one process, known in Ray's dashboard by their roles and rank.

    Mostly one; several are the roles that share a frozen base (see workers.models.shared_base).
    """

    def __init__(self, hosted: Sequence[tuple[str, WorkerSpec]]) -> None:
        """hosted: of each role its kind of worker (a key of KINDS, or a class, module:name) and which worker it is.

        What fails here is raised by the first call: of an actor that cannot be created Ray tells no more than that it died.
        """
        self.roles = [spec.role for _, spec in hosted]
        self.rank = hosted[0][1].rank
        self.workers: dict[Role, Worker] = {}
        self.turns: Any = None
        self.failure: BaseException | None = None
        try:
            self._begin(hosted)
        except (Exception, SystemExit) as error:
            self.failure = portable(error)

    def _begin(self, hosted: Sequence[tuple[str, WorkerSpec]]) -> None:
        first = hosted[0][1]
        malloc.suit(first.role)
        if first.device == "cpu":
            # A compiler for GPUs, which torch would load where it is installed: 70 MB for nothing.
            sys.modules["triton"] = None  # type: ignore[assignment]
        for plugin in first.config.plugins:
            import_module(plugin)
        self.workers = {spec.role: _worker(kind, spec) for kind, spec in hosted}
        if len(hosted) > 1:
            base = import_module("workers.models.shared_base").SharedBase()
            for worker in self.workers.values():
                worker.base = base
        if first.time_shared:
            self.turns = import_module("workers.process.time_sharing").DeviceTimeSharing(
                list(self.workers.values()), first.device
            )

    def __repr__(self) -> str:
        return f"{'+'.join(self.roles)}-{self.rank}"

    def call(self, role: Role, method: str, *args: Any) -> Any:
        """What a role's worker returns. Raises what it raises, in a form that reaches the driver
        (workers.process.remote_error)."""
        failure = self.failure
        try:
            if failure is None:
                with self.turns.turn(method) if self.turns else nullcontext():
                    return self._method(role, method)(*args)
        except (Exception, SystemExit) as error:
            failure = portable(error)
        finally:
            malloc.give_back()  # for the roles whose turn comes
        assert failure is not None
        try:
            raise failure  # here, where the original exception is not shown once more as its context
        finally:
            del failure  # its traceback holds this frame, and the tensors of all frames below

    def _method(self, role: Role, name: str) -> Callable[..., Any]:
        worker = self.workers[role]
        if not is_remote(type(worker), name):
            raise AttributeError(f"{type(worker).__name__} declares no remote method {name} (workers.api.remote)")
        method: Callable[..., Any] = getattr(worker, name)
        return method


def _worker(kind: str, spec: WorkerSpec) -> Worker:
    module, _, name = KINDS.get(kind, kind).partition(":")
    worker: Worker = getattr(import_module(module), name)(spec)
    return worker
