"""Calls to worker groups: every rank at once, a deadline on each, and errors that say who failed at what."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.state import get_log

from configs.schema import Role

T = TypeVar("T")


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time; the message names role, rank and call and shows the end of its log."""


@dataclass(frozen=True)
class WorkerGroup:
    """All ranks of a role."""

    role: Role
    handles: tuple[ActorHandle, ...]
    place: str
    """Name of its placement group: roles with the same place take turns."""
    timeout: float
    """Seconds that a call may take."""

    def __len__(self) -> int:
        return len(self.handles)

    def call(self, method: str, *args: Any) -> Call[list[Any]]:
        """The same call to every rank."""
        return self.scatter(method, [args] * len(self))

    def first(self, method: str, *args: Any) -> Any:
        """The result of a call to rank 0 alone."""
        one = WorkerGroup(self.role, self.handles[:1], self.place, self.timeout)
        return one.call(method, *args).get()[0]

    def scatter(
        self,
        method: str,
        args: Sequence[tuple[Any, ...]],
        keep: int = 0,
        then: Callable[[list[Any]], T] | None = None,
    ) -> Call[T]:
        """args[rank] to each rank. Of the values that a rank returns, the first `keep` stay in the object store and come as
        references; the last is fetched. `then` makes the call's result of the list of the ranks' results."""
        return Call(self, method, list(args), keep, then or (lambda results: results))  # type: ignore[arg-type,return-value]


@dataclass
class Call(Generic[T]):
    """A call to a worker group: started once, waited for once."""

    group: WorkerGroup
    method: str
    args: list[tuple[Any, ...]]
    keep: int
    then: Callable[[list[Any]], T]
    deadline: float = 0.0
    _refs: list[list[ObjectRef]] = field(default_factory=list)
    _fetched: dict[int, Any] = field(default_factory=dict)

    def start(self) -> None:
        self.deadline = time.monotonic() + self.group.timeout
        for rank, (handle, args) in enumerate(zip(self.group.handles, self.args, strict=True)):
            name = f"{self.group.role}-{rank}.{self.method}"
            refs = handle.call.options(num_returns=self.keep + 1, name=name).remote(self.method, *args)
            self._refs.append(list(refs) if self.keep else [refs])

    def pending(self) -> dict[ObjectRef, int]:
        """What is waited for -> the rank that owes it."""
        return {refs[-1]: rank for rank, refs in enumerate(self._refs) if rank not in self._fetched}

    def collect(self, rank: int) -> None:
        """Take a rank's answer, which is there. Raises WorkerError at once where it failed: the others may then hang."""
        try:
            self._fetched[rank] = ray.get(self._refs[rank][-1])
        except RayError as error:
            raise self._failure(rank, error) from error

    def result(self) -> T:
        results = []
        for rank, refs in enumerate(self._refs):
            results.append((*refs[:-1], self._fetched[rank]) if self.keep else self._fetched[rank])
        return self.then(results)

    def get(self) -> T:
        return together(self)[0]

    def late(self) -> WorkerError:
        """The error of a call whose deadline has passed."""
        ranks = list(self.pending().values())
        return WorkerError(
            f"{self.group.role} rank {', '.join(map(str, ranks))}: no answer to {self.method} in {self.group.timeout:.0f} s "
            f"(cluster.call_timeout)\n" + "\n".join(self._log(rank) for rank in ranks)
        )

    def _failure(self, rank: int, error: RayError) -> WorkerError:
        who = f"{self.group.role} rank {rank} failed in {self.method}"
        if isinstance(error, RayTaskError):
            return WorkerError(f"{who}: {type(error.cause).__name__}: {error.cause}\n{_indent(str(error))}")
        what = "its process died" if isinstance(error, RayActorError) else "its answer was lost"
        return WorkerError(f"{who}: {what}\n{_indent(str(error))}\n{self._log(rank)}")

    def _log(self, rank: int) -> str:
        """The end of a rank's output, of which crashes write theirs to stderr."""
        shown = []
        actor = self.group.handles[rank]._actor_id.hex()
        cluster = ray.get_runtime_context().gcs_address  # by itself it would look for a cluster, and may find several
        for stream in ("out", "err"):
            try:
                end = "".join(get_log(address=cluster, actor_id=actor, suffix=stream, tail=30, timeout=10))
            except Exception as error:  # the log is an extra: what failed is already in the message
                end = f"(not to be had: {error})"
            shown.append(f"  the end of the std{stream} of {self.group.role} rank {rank}:\n{_indent(end)}")
        return "\n".join(shown)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())


def together(*calls: Call[Any] | None) -> list[Any]:
    """Run calls at the same time, but those to groups on the same devices in turn. Results in order; None stays None."""
    waiting = [call for call in calls if call is not None]
    running: list[Call[Any]] = []
    while waiting or running:
        busy = {call.group.place for call in running}
        for call in list(waiting):
            if call.group.place not in busy:
                busy.add(call.group.place)
                waiting.remove(call)
                running.append(call)
                call.start()
        _collect_next(running)
        running = [call for call in running if call.pending()]
    return [None if call is None else call.result() for call in calls]


def _collect_next(running: list[Call[Any]]) -> None:
    """Wait for the next answer of any rank of any call."""
    owed = {ref: (call, rank) for call in running for ref, rank in call.pending().items()}
    nearest = min(running, key=lambda call: call.deadline)
    ready, _ = ray.wait(list(owed), timeout=max(nearest.deadline - time.monotonic(), 0.0))
    if not ready:
        raise nearest.late()
    for ref in ready:
        call, rank = owed[ref]
        call.collect(rank)
