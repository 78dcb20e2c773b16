"""Calls to worker groups: sent to all ranks at once, each with a deadline. Errors say which rank failed and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from configs.schema import Role
from orchestrator.worker_groups.deadlines import Awaited, Cost, Deadlines
from orchestrator.worker_groups.failures import LOST, Failure, Kind, Rank, WorkerError, named, probe_processes
from workers.api import RemoteMethod, Request, request
from workers.process.inspection import ProcessLocation, ProcessState
from workers.process.remote_error import headline_of_traceback, summary

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class WorkerGroup:
    """All ranks of a role. Methods are declared in workers.api."""

    role: Role
    handles: list[ActorHandle]
    """Rank -> its process; roles may share a process."""
    placement_group: str
    """Name. Roles in one placement group share devices: `run_concurrently` runs calls to them in turn."""
    deadlines: Deadlines
    collective: bool = True
    """Whether the ranks compute together: then none can continue without the others."""
    locations: dict[int, ProcessLocation] = field(default_factory=dict)
    """Rank -> where its process runs; ranks that have not reported it are missing."""
    all_groups: list[WorkerGroup] = field(default_factory=list)
    """All worker groups of the run: a failure in another group may cause an error in this one."""
    replace_failed: Callable[[WorkerError], None] | None = None
    """Replaces failed ranks, for roles without state, so that a call can continue. None: the error is raised."""
    _setup: list[Request[Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.handles)

    def call(self, method: Callable[Concatenate[Any, P], T], /, *args: P.args, **kwargs: P.kwargs) -> Call[list[T]]:
        """The same call to every rank. Its result: the ranks' results in a list."""
        return Call(self, dict.fromkeys(range(len(self)), request(method, *args, **kwargs)))

    def first(self, method: Callable[Concatenate[Any, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a call to rank 0 alone."""
        return Call[list[T]](self, {0: request(method, *args, **kwargs)}).get()[0]

    def to(
        self, ranks: Sequence[int], method: Callable[Concatenate[Any, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Call[list[T]]:
        """The same call to ranks that have just started. They are not replaced if they fail in it."""
        return Call(self, dict.fromkeys(ranks, request(method, *args, **kwargs)), retryable=False)

    def setup_call(
        self, method: Callable[Concatenate[Any, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Call[list[T]]:
        """The same call to every rank. It is repeated for ranks that are replaced later."""
        call = self.call(method, *args, **kwargs)
        call.replayed_on_restart = True
        return call

    @overload
    def scatter(
        self,
        requests: Sequence[Request[T]],
        cost: Cost = ...,
        stored_returns: Literal[0] = 0,
        actual_cost: Callable[[list[T]], Cost] | None = None,
    ) -> Call[list[T]]: ...

    @overload
    def scatter(
        self,
        requests: Sequence[Request[tuple[Any, T]]],
        cost: Cost = ...,
        *,
        stored_returns: Literal[1],
        actual_cost: Callable[[list[tuple[ObjectRef, T]]], Cost] | None = None,
    ) -> Call[list[tuple[ObjectRef, T]]]: ...

    def scatter(
        self,
        requests: Sequence[Request[Any]],
        cost: Cost = Cost(),  # noqa: B008  it is frozen
        stored_returns: int = 0,
        actual_cost: Callable[[list[Any]], Cost] | None = None,
    ) -> Call[Any]:
        """requests[rank] to each rank. Its result: the ranks' results in a list.

        Each rank returns `stored_returns` values that stay in the object store, as references, and one that is fetched.
        cost: upper bound of the cost of the whole call, for its deadline. actual_cost: its actual cost, computed from the
        results; none: `cost`.
        """
        by_rank = {rank: asked for rank, (_, asked) in enumerate(zip(self.handles, requests, strict=True))}
        return Call(self, by_rank, cost, stored_returns, actual_cost)

    def setup_calls(self, ranks: Sequence[int]) -> list[Call[list[Any]]]:
        """The group's setup calls so far, again for ranks that were replaced."""
        return [Call(self, dict.fromkeys(ranks, asked), retryable=False) for asked in self._setup]

    def record_setup(self, asked: Request[Any]) -> None:
        self._setup.append(asked)

    def by_rank(self) -> dict[Rank, ProcessLocation]:
        """`locations` with the role in each key."""
        return {(self.role, rank): location for rank, location in self.locations.items()}


@dataclass
class Call(Generic[T]):
    """A call of one method to ranks of a worker group. `get` runs it; `run_concurrently` runs several.

    To do something else while it runs:

        call.start()
        while not call.poll():                       # collects replies, checks for failures and deadlines; does not wait
            ...
        results = call.result()                      # waits for the missing replies

    A call lasts until its last reply is collected: rare polls make calls look long, and make later deadlines longer. Only
    `run_concurrently` keeps calls to groups that share devices from running at the same time.
    """

    group: WorkerGroup
    requests: dict[int, Request[Any]]
    """Rank -> its request; all are of the same method."""
    cost: Cost = Cost()  # noqa: RUF009  it is frozen
    """Upper bound."""
    stored_returns: int = 0
    actual_cost: Callable[[list[Any]], Cost] | None = None
    """Computes the actual cost from the list of the ranks' results; none: `cost`."""
    reduced_by: Callable[[list[Any]], Any] | None = None
    """Computes the result from the list of the ranks' results; none: the list is the result."""
    retryable: bool = True
    """Whether failed ranks without state may be replaced and called again."""
    replayed_on_restart: bool = False
    allowance: float = 0.0
    """Seconds added to the deadline, for timeouts that the method itself applies."""
    method: RemoteMethod = field(init=False)
    deadline: float = field(default=0.0, init=False)
    _began: float = field(default=0.0, init=False)
    _ended: float = field(default=0.0, init=False)
    """When the last reply came."""
    _retried: bool = field(default=False, init=False)
    """Whether some ranks were called again: the time of two attempts says nothing about the cost."""
    _recorded: bool = field(default=False, init=False)
    _refs: dict[int, list[ObjectRef]] = field(default_factory=dict, init=False)
    _fetched: dict[int, Any] = field(default_factory=dict, init=False)
    _failed: dict[int, WorkerError] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        methods = {asked.method for asked in self.requests.values()}
        if len(methods) != 1:
            names = sorted(method.name for method in methods)
            raise ValueError(f"a call to {self.group.role} needs one method, not {', '.join(names) or 'none'}")
        [self.method] = methods

    def reduce(self, function: Callable[[T], R]) -> Call[R]:
        """The same call, not started, whose result is function(list of the ranks' results)."""
        assert self.reduced_by is None
        return replace(self, reduced_by=function)  # type: ignore[return-value, arg-type]

    # ------------------------------------------------------------ start, poll, result

    def get(self) -> T:
        """Start it and wait for its result."""
        return run_concurrently(self)[0]

    def start(self) -> None:
        """Send it to its ranks. Raises RuntimeError if it was started before."""
        if self._refs:
            raise RuntimeError(f"{self.group.role}: this call of {self.method} was started before")
        self._send(list(self.requests))

    @property
    def finished(self) -> bool:
        """Whether it was started and all ranks have replied."""
        return bool(self._refs) and not self._failed and not self.pending()

    def poll(self) -> bool:
        """Collect the replies so far and replace failed ranks if possible; whether all ranks have replied.

        Raises WorkerError if a rank failed or the deadline has passed, and the call cannot continue.
        """
        self._require_started()
        while not self.finished and _take_reply([self], timeout=0.0):
            pass
        return self.finished

    def result(self) -> T:
        """Wait until all ranks have replied; the result. Raises WorkerError as `poll` does."""
        self._require_started()
        while not self.finished:
            _take_reply([self])
        results: list[Any] = []
        for rank in sorted(self.requests):
            stored = self._refs[rank][:-1]
            results.append((*stored, self._fetched[rank]) if self.stored_returns else self._fetched[rank])
        if not self._recorded:
            self._record(results)
        return self.reduced_by(results) if self.reduced_by else results  # type: ignore[return-value]

    def _require_started(self) -> None:
        if not self._refs:
            raise RuntimeError(f"{self.group.role}: this call of {self.method} was not started")

    def _record(self, results: list[Any]) -> None:
        self._recorded = True
        if self.replayed_on_restart:
            self.group.record_setup(next(iter(self.requests.values())))
        if not self._retried:
            cost = self.actual_cost(results) if self.actual_cost else self.cost
            self.group.deadlines.observe(self.method, cost, self._ended - self._began)

    def _send(self, ranks: Sequence[int]) -> None:
        self._began = time.monotonic()
        self.deadline = self._began + self.allowance + self.group.deadlines.seconds(self.method, self.cost)
        for rank in ranks:
            name = f"{self.group.role}-{rank}.{self.method}"
            call = self.group.handles[rank].call.options(num_returns=self.stored_returns + 1, name=name)
            refs = call.remote(self.group.role, self.method.name, *self.requests[rank].args)
            self._refs[rank] = list(refs) if self.stored_returns else [refs]

    def pending(self) -> dict[ObjectRef, int]:
        """Missing replies -> their ranks."""
        finished = self._fetched.keys() | self._failed.keys()
        return {refs[-1]: rank for rank, refs in self._refs.items() if rank not in finished}

    def awaited(self, now: float) -> Awaited:
        """The call as `troupe status` shows it. now: time.monotonic()."""
        role, method, epoch = self.group.role, self.method, time.time() - now
        ranks, setting = tuple(sorted(self.pending().values())), self.group.deadlines.setting(method)
        return Awaited(role, ranks, method.name, self._began + epoch, self.deadline + epoch, setting)

    def collect(self, rank: int) -> None:
        """Collect the reply of a rank that has replied. Raises WorkerError at once if the rank failed and cannot be replaced:
        the other ranks may hang then."""
        try:
            self._fetched[rank] = ray.get(self._refs[rank][-1])
        except RayError as error:
            self._fail([rank], self._failure_of(rank, error), error)
        else:
            self._ended = time.monotonic()
            if not self.pending():
                self.group.deadlines.busy[self.group.role, self.method.name] += self._ended - self._began

    def miss_deadline(self) -> None:
        """Handle a passed deadline. Raises WorkerError if the ranks that did not reply cannot be replaced."""
        seconds = self.deadline - self._began
        states = probe_processes(self._everyone(), stacks=self._ranks(list(self.pending().values())))
        pending = self.pending()
        replied, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        ranks = [rank for ref, rank in pending.items() if ref not in replied]
        if not ranks:
            return  # the last replies came while the processes were probed
        self.group.deadlines.missed(self.method)
        text = f"{self._who(ranks)}: no reply to {self.method} in {seconds:.0f} s ({self.group.deadlines.setting(self.method)})"
        failed_ranks = _failed_ranks(states) or self._ranks(ranks)
        self._fail(ranks, self._failure("hung", ranks, text, "", failed_ranks, states), None)

    def _fail(self, ranks: Sequence[int], failure: Failure, cause: Exception | None) -> None:
        error = WorkerError(failure)
        # Without failed ranks there is nothing to replace, and the same call would fail again: a lost object must first be
        # computed again.
        only_ours = bool(failure.failed_ranks) and all(role == self.group.role for role, _ in failure.failed_ranks)
        if self.group.replace_failed is None or not self.retryable or not only_ours:
            raise error from cause
        if self.group.collective:
            ranks = list(self.pending().values())  # the others wait for the failed rank
        self._failed |= dict.fromkeys(ranks, error)

    def replace_failed(self) -> None:
        """Replace the failed ranks, if any, and call them again, once all other ranks have replied."""
        if not self._failed or self.pending():
            return
        assert self.group.replace_failed is not None
        failed, self._failed = self._failed, {}
        for error in dict.fromkeys(failed.values()):
            self.group.replace_failed(error)
        self._retried = True
        self._send(sorted(failed))

    # ------------------------------------------------------------ failures

    def _failure_of(self, rank: int, error: RayError) -> Failure:
        """The failure behind an error that a rank reports: another rank may have died."""
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
            kind, text = "lost", f"{who}: {summary(cause) if raised else 'its reply was lost'}"
        else:
            kind, text = "error", f"{who}: {_line(cause)}"
        return self._failure(kind, [rank], text, str(error), failed_ranks, states, cause if raised else None)

    def _failure(
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
            self.method.name,
            self.method.phase,
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
            locations |= group.by_rank()
        return locations

    def _ranks(self, ranks: Sequence[int]) -> list[Rank]:
        return [(self.group.role, rank) for rank in ranks]

    def _who(self, ranks: Sequence[int]) -> str:
        return f"{self.group.role} rank {', '.join(map(str, ranks))}"


def _line(cause: Exception) -> str:
    """The error in one line. Ray's error quotes a traceback if Ray could not send or read an object."""
    quoted = headline_of_traceback(str(cause)) if isinstance(cause, RayError) else ""
    return quoted or summary(cause)


def _failed_ranks(states: dict[Rank, ProcessState]) -> list[Rank]:
    return [rank for rank, process in states.items() if process.state != "running"]


def run_concurrently(*calls: Call[Any] | None) -> list[Any]:
    """Run calls at the same time; calls to groups in the same placement group run in turn. Results in order; None stays None."""
    waiting = [call for call in calls if call is not None]
    running: list[Call[Any]] = []
    while waiting or running:
        busy = {call.group.placement_group for call in running}
        for call in list(waiting):
            if call.group.placement_group not in busy:
                busy.add(call.group.placement_group)
                waiting.remove(call)
                running.append(call)
                call.start()
        _take_reply(running)
        running = [call for call in running if not call.finished]
    return [None if call is None else call.result() for call in calls]


def _take_reply(running: Sequence[Call[Any]], timeout: float | None = None) -> bool:
    """Wait for the next reply to any of these calls, until the nearest deadline or for `timeout` seconds; whether one came."""
    pending = {ref: (call, rank) for call in running for ref, rank in call.pending().items()}
    nearest = min(running, key=lambda call: call.deadline)
    deadlines, now = nearest.group.deadlines, time.monotonic()
    left = max(nearest.deadline - now, 0.0)
    wait = left if timeout is None else min(left, timeout)
    deadlines.awaited = nearest.awaited(now)
    ready, _ = ray.wait(list(pending), timeout=wait)
    deadlines.awaited = None
    if not ready and wait == left:
        nearest.miss_deadline()
    for ref in ready:
        call, rank = pending[ref]
        call.collect(rank)
    for call in running:
        call.replace_failed()
    return bool(ready)
