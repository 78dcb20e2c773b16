"""The Ray actor around workers. It imports their classes in its own process, so the driver never imports torch."""

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
    """The workers of one rank in one process; its name in Ray's dashboard is roles and rank.

    Usually one worker; several if roles share a frozen base (workers.models.shared_base).
    """

    def __init__(self, hosted: Sequence[tuple[str, WorkerSpec]]) -> None:
        """hosted: for each role, its kind of worker (a key of KINDS, or a class as module:name) and its spec.

        The first call raises the error of a failed start: for an actor that cannot be created, Ray only reports its death.
        """
        self.roles = [spec.role for _, spec in hosted]
        self.rank = hosted[0][1].rank
        self.workers: dict[Role, Worker] = {}
        self.time_sharing: Any = None
        self.start_error: BaseException | None = None
        try:
            self._start(hosted)
        except (Exception, SystemExit) as error:
            self.start_error = portable(error)

    def _start(self, hosted: Sequence[tuple[str, WorkerSpec]]) -> None:
        first = hosted[0][1]
        malloc.configure(first.role)
        if first.device == "cpu":
            # The GPU compiler, which torch would load if installed: 70 MB without use.
            sys.modules["triton"] = None  # type: ignore[assignment]
        for plugin in first.config.plugins:
            import_module(plugin)
        self.workers = {spec.role: _worker(kind, spec) for kind, spec in hosted}
        if len(hosted) > 1:
            base = import_module("workers.models.shared_base").SharedBase()
            for worker in self.workers.values():
                worker.base = base
        if first.time_shared:
            self.time_sharing = import_module("workers.process.time_sharing").DeviceTimeSharing(
                list(self.workers.values()), first.device
            )

    def __repr__(self) -> str:
        return f"{'+'.join(self.roles)}-{self.rank}"

    def call(self, role: Role, method: str, *args: Any) -> Any:
        """Call a method of a role's worker. Raises the worker's exception in a form that reaches the driver
        (workers.process.remote_error)."""
        error_to_raise = self.start_error
        try:
            if error_to_raise is None:
                with self.time_sharing.turn(method) if self.time_sharing else nullcontext():
                    return self._method(role, method)(*args)
        except (Exception, SystemExit) as error:
            error_to_raise = portable(error)
        finally:
            malloc.give_back()  # for other processes of the node
        assert error_to_raise is not None
        try:
            raise error_to_raise  # outside of `except`, so that the original exception is not shown again as its context
        finally:
            del error_to_raise  # its traceback holds this frame, and the tensors of all frames below

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
