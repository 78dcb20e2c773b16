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

from configs.schema import Role
from orchestrator.worker_groups.deadlines import Awaited, Deadlines, Workload, phase_of
from orchestrator.worker_groups.failures import LOST, Failure, Kind, Rank, WorkerError, named, probe_processes
from workers.process.inspection import ProcessLocation, ProcessState
from workers.process.remote_error import headline_of_traceback, summary

T = TypeVar("T")


@dataclass
class WorkerGroup:
    """All ranks of a role."""

    role: Role
    handles: list[ActorHandle]
    """Rank -> its process, which may be that of other roles too."""
    place: str
    """Name of its placement group: roles with the same place take turns."""
    deadlines: Deadlines
    collective: bool = True
    """Whether its ranks compute together, so that none can go on without the others."""
    location: dict[int, ProcessLocation] = field(default_factory=dict)
    """Rank -> its process, once it is known."""
    all_groups: list[WorkerGroup] = field(default_factory=list)
    """All groups of the team: what one reports may have happened to another."""
    replace_failed: Callable[[WorkerError], None] | None = None
    """Replaces the casualties of a role without state, so that a call can go on; none: the error is raised."""
    _setup: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.handles)

    def call(self, method: str, *args: Any) -> Call[list[Any]]:
        """The same call to every rank."""
        return self.scatter(method, [args] * len(self))

    def first(self, method: str, *args: Any) -> Any:
        """The result of a call to rank 0 alone."""
        return Call(self, method, {0: args}).get()[0]

    def scatter(
        self,
        method: str,
        args: Sequence[tuple[Any, ...]],
        keep: int = 0,
        work: Workload = Workload(),  # noqa: B008  it is frozen
        then: Callable[[list[Any]], T] | None = None,
        done: Callable[[list[Any]], Workload] | None = None,
    ) -> Call[T]:
        """args[rank] to each rank. Of the values that a rank returns, the first `keep` stay in the object store and come as
        references; the last is fetched. `work`: the most that the whole call may have to do, for its deadline; `done`: what was
        done, from the list of the ranks' results; none: all of it. `then` makes the call's result of the same list."""
        each = {rank: mine for rank, (_, mine) in enumerate(zip(self.handles, args, strict=True))}
        return Call(self, method, each, keep, work, then, done)

    def prepare(self, method: str, *args: Any) -> Call[list[Any]]:
        """The same call to every rank, which a rank that is replaced later will be told again."""
        call = self.call(method, *args)
        call.replayed_on_restart = True
        return call

    def setup_calls(self, ranks: Sequence[int]) -> list[Call[list[Any]]]:
        """The calls that tell replaced ranks all that the group was told."""
        return [self.to(ranks, method, *args) for method, args in self._setup]

    def to(self, ranks: Sequence[int], method: str, *args: Any) -> Call[list[Any]]:
        """The same call to new ranks, which are not replaced in the middle of it."""
        return Call(self, method, dict.fromkeys(ranks, args), retryable=False)

    def record_setup(self, method: str, args: tuple[Any, ...]) -> None:
        self._setup.append((method, args))

    def locations(self) -> dict[Rank, ProcessLocation]:
        return {(self.role, rank): place for rank, place in self.location.items()}


@dataclass
class Call(Generic[T]):
    """A call to a worker group: started once, waited for once."""

    group: WorkerGroup
    method: str
    args: dict[int, tuple[Any, ...]]
    """Rank -> what it is called with."""
    keep: int = 0
    work: Workload = Workload()  # noqa: RUF009  it is frozen
    """The most that it may have to do."""
    then: Callable[[list[Any]], T] | None = None
    done: Callable[[list[Any]], Workload] | None = None
    """What was done, from the list of the ranks' results; none: `work`."""
    retryable: bool = True
    replayed_on_restart: bool = False
    allowance: float = 0.0
    """Seconds that it may take on top, by deadlines of its own."""
    deadline: float = 0.0
    _began: float = 0.0
    _ended: float = 0.0
    """When the last answer came."""
    _again: bool = False
    """Whether some ranks were asked again: its time is then not that of its work."""
    _refs: dict[int, list[ObjectRef]] = field(default_factory=dict)
    _fetched: dict[int, Any] = field(default_factory=dict)
    _failed: dict[int, WorkerError] = field(default_factory=dict)

    def start(self) -> None:
        self._send(list(self.args))

    def _send(self, ranks: Sequence[int]) -> None:
        self._began = time.monotonic()
        self.deadline = self._began + self.allowance + self.group.deadlines.seconds(self.method, self.work)
        for rank in ranks:
            name = f"{self.group.role}-{rank}.{self.method}"
            call = self.group.handles[rank].call.options(num_returns=self.keep + 1, name=name)
            refs = call.remote(self.group.role, self.method, *self.args[rank])
            self._refs[rank] = list(refs) if self.keep else [refs]

    def pending(self) -> dict[ObjectRef, int]:
        """What is waited for -> the rank that owes it."""
        done = self._fetched.keys() | self._failed.keys()
        return {refs[-1]: rank for rank, refs in self._refs.items() if rank not in done}

    def awaited(self, now: float) -> Awaited:
        """What `troupe status` says of it. now: time.monotonic()."""
        role, method, epoch = self.group.role, self.method, time.time() - now
        ranks, setting = tuple(sorted(self.pending().values())), self.group.deadlines.setting(method)
        return Awaited(role, ranks, method, self._began + epoch, self.deadline + epoch, setting)

    def collect(self, rank: int) -> None:
        """Take a rank's answer, which is there. Raises WorkerError at once where it failed and cannot be replaced: the others
        may then hang."""
        try:
            self._fetched[rank] = ray.get(self._refs[rank][-1])
        except RayError as error:
            self._fail([rank], self._failure(rank, error), error)
        else:
            self._ended = time.monotonic()
            if not self.pending():
                self.group.deadlines.busy[self.group.role, self.method] += self._ended - self._began

    def late(self) -> None:
        """Its deadline has passed. Raises WorkerError where the ranks that owe an answer cannot be replaced."""
        seconds = self.deadline - self._began
        states = probe_processes(self._everyone(), stacks=self._ranks(list(self.pending().values())))
        owed = self.pending()
        answered, _ = ray.wait(list(owed), num_returns=len(owed), timeout=0)
        ranks = [rank for ref, rank in owed.items() if ref not in answered]
        if not ranks:
            return  # the last answers came while the processes were looked at
        self.group.deadlines.missed(self.method)
        text = f"{self._who(ranks)}: no answer to {self.method} in {seconds:.0f} s ({self.group.deadlines.setting(self.method)})"
        failed_ranks = _failed_ranks(states) or self._ranks(ranks)
        self._fail(ranks, self._told("hung", ranks, text, "", failed_ranks, states), None)

    def _fail(self, ranks: Sequence[int], failure: Failure, cause: Exception | None) -> None:
        error = WorkerError(failure)
        # Without casualties nobody is to be replaced, and the same call would be answered in the same way: what is lost must
        # be made again.
        mine = bool(failure.failed_ranks) and all(role == self.group.role for role, _ in failure.failed_ranks)
        if self.group.replace_failed is None or not self.retryable or not mine:
            raise error from cause
        if self.group.collective:
            ranks = list(self.pending().values())  # they wait for the one that failed
        self._failed |= dict.fromkeys(ranks, error)

    def replace_failed(self) -> None:
        """Where ranks failed and all others have answered: replace those, and ask them again."""
        if not self._failed or self.pending():
            return
        assert self.group.replace_failed is not None
        failed, self._failed = self._failed, {}
        for error in dict.fromkeys(failed.values()):
            self.group.replace_failed(error)
        self._again = True
        self._send(sorted(failed))

    def result(self) -> T:
        if self.replayed_on_restart:
            self.group.record_setup(self.method, next(iter(self.args.values())))
        results: list[Any] = []
        for rank in sorted(self.args):
            kept = self._refs[rank][:-1]
            results.append((*kept, self._fetched[rank]) if self.keep else self._fetched[rank])
        if not self._again:
            work = self.done(results) if self.done else self.work
            self.group.deadlines.observe(self.method, work, self._ended - self._began)
        return self.then(results) if self.then else results  # type: ignore[return-value]

    def get(self) -> T:
        return run_concurrently(self)[0]

    # ------------------------------------------------------------ what failed

    def _failure(self, rank: int, error: RayError) -> Failure:
        """What is behind an error that a rank reports: another that died, perhaps."""
        states = probe_processes(self._everyone())
        failed_ranks = _failed_ranks(states)
        who = f"{self._who([rank])} failed in {self.method}"
        raised = isinstance(error, RayTaskError)
        cause: Exception = error.cause if raised else error
        if isinstance(error, RayActorError) and not raised:
            kind: Kind = "died"
            text = f"{who}: its process died"
            failed_ranks = sorted({*failed_ranks, *self._ranks([rank])})
        elif failed_ranks:
            kind, text = "died", f"{who} because of {named(failed_ranks)} ({states[failed_ranks[0]].state})"
        elif isinstance(cause, LOST):
            kind, text = "lost", f"{who}: {summary(cause) if raised else 'its answer was lost'}"
        else:
            kind, text = "error", f"{who}: {_line(cause)}"
        return self._told(kind, [rank], text, str(error), failed_ranks, states, cause if raised else None)

    def _told(
        self,
        kind: Kind,
        ranks: Sequence[int],
        text: str,
        detail: str,
        failed_ranks: Sequence[Rank],
        states: dict[Rank, ProcessState],
        cause: Exception | None = None,
    ) -> Failure:
        everyone = self._everyone()
        shown = [rank for rank in failed_ranks or self._ranks(ranks) if rank in everyone]
        return Failure(
            kind,
            self.group.role,
            tuple(ranks),
            self.method,
            phase_of(self.method),
            text,
            cause,
            detail,
            tuple(failed_ranks),
            {rank: everyone[rank] for rank in shown},
            {rank: states[rank] for rank in shown},
        )

    def _everyone(self) -> dict[Rank, ProcessLocation]:
        locations: dict[Rank, ProcessLocation] = {}
        for group in self.group.all_groups or [self.group]:
            locations |= group.locations()
        return locations

    def _ranks(self, ranks: Sequence[int]) -> list[Rank]:
        return [(self.group.role, rank) for rank in ranks]

    def _who(self, ranks: Sequence[int]) -> str:
        return f"{self.group.role} rank {', '.join(map(str, ranks))}"


def _line(cause: Exception) -> str:
    """What happened, in a line. What Ray could not send or read as an object it quotes with its traceback."""
    quoted = headline_of_traceback(str(cause)) if isinstance(cause, RayError) else ""
    return quoted or summary(cause)


def _failed_ranks(states: dict[Rank, ProcessState]) -> list[Rank]:
    return [rank for rank, finding in states.items() if finding.state != "running"]


def run_concurrently(*calls: Call[Any] | None) -> list[Any]:
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
        for call in running:
            call.replace_failed()
        running = [call for call in running if call.pending()]
    return [None if call is None else call.result() for call in calls]


def _collect_next(running: list[Call[Any]]) -> None:
    """Wait for the next answer of any rank of any call."""
    owed = {ref: (call, rank) for call in running for ref, rank in call.pending().items()}
    nearest = min(running, key=lambda call: call.deadline)
    deadlines, now = nearest.group.deadlines, time.monotonic()
    deadlines.awaited = nearest.awaited(now)
    ready, _ = ray.wait(list(owed), timeout=max(nearest.deadline - now, 0.0))
    deadlines.awaited = None
    if not ready:
        nearest.late()
    for ref in ready:
        call, rank = owed[ref]
        call.collect(rank)
