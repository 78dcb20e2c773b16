"""Failures of workers: which rank, on which node, in which method, and the state of its process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RpcError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.schema import Role
from troupe.imports import call
from workers.api import Phase
from workers.process import inspection
from workers.process.inspection import ProcessLocation, ProcessState, State

LOG_LINES = 30
PROBE_TIMEOUT = 60.0
"""Seconds to probe or kill the processes of a node."""

LOST = (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RpcError,
    WorkerCrashedError,
)
"""Ray's errors for lost processes and objects: the same call may succeed at the next attempt. Its other errors (a result that
cannot be read, no memory in the object store, an exception that could not be pickled) would come again."""

Kind = Literal["error", "died", "hung", "lost"]

Rank = tuple[Role, int]


@dataclass(frozen=True)
class Failure:
    """A call to a worker that failed."""

    kind: Kind
    """error: the worker raised. died: its process is dead. hung: it did not reply in time. lost: Ray lost its reply or its
    arguments, though all processes are alive."""
    role: Role
    ranks: tuple[int, ...]
    method: str
    phase: Phase
    text: str
    """The failure in one line."""
    cause: Exception | None = None
    """The exception that the worker raised."""
    detail: str = ""
    """Ray's message: a traceback, or why the process died."""
    failed_ranks: tuple[Rank, ...] = ()
    """Workers that must be replaced, of any role: the worker that reports the error need not be its cause."""
    locations: dict[Rank, ProcessLocation] = field(default_factory=dict)
    states: dict[Rank, ProcessState] = field(default_factory=dict)
    """Of the failed ranks; if there are none, of the ranks that raised."""

    @property
    def survivable(self) -> bool:
        """Whether the same call may succeed after failed workers are replaced. An error that a worker raised would come again."""
        return bool(self.failed_ranks) or self.kind == "lost"

    def __str__(self) -> str:
        parts = [self.text]
        if self.detail:
            parts.append(_indent(self.detail))
        for rank, process in self.states.items():
            place = self.locations[rank]
            parts.append(
                f"  {_named(rank)}: node {place.host} ({place.node[:6]}), pid {place.pid}, process {process.state}"
            )
            if process.stack:
                parts.append(f"  its stack:\n{_indent(process.stack)}")
            if process.log:
                parts.append(f"  the end of its output:\n{_indent(process.log)}")
        return "\n".join(parts)


class WorkerError(RuntimeError):
    """A worker failed, died or did not reply in time. The message has all that is known about the failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.final = False
        """Whether the failure policy decided that this error ends the run."""


def probe_processes(locations: dict[Rank, ProcessLocation], stacks: Collection[Rank] = ()) -> dict[Rank, ProcessState]:
    """Inspect workers' processes on their nodes. stacks: ranks to get Python stacks of, which takes seconds."""
    nodes = _by_node(locations)
    tasks = {
        node: on_node(
            node, inspection.inspect, [locations[rank] for rank in ranks], LOG_LINES, [rank in stacks for rank in ranks]
        )
        for node, ranks in nodes.items()
    }
    states: dict[Rank, ProcessState] = {}
    for node, ranks in nodes.items():
        try:
            states |= zip(ranks, ray.get(tasks[node], timeout=PROBE_TIMEOUT), strict=True)
        except GetTimeoutError:
            # A busy node is not lost: nothing says that its workers are not healthy.
            state: State = "running" if node in alive_nodes() else "node lost"
            note = f"(the node did not reply within {PROBE_TIMEOUT:.0f} s)"
            states |= dict.fromkeys(ranks, ProcessState(state, note))
        except RayError:  # the task cannot run there
            states |= dict.fromkeys(ranks, ProcessState("node lost"))
    return {rank: states[rank] for rank in locations}


def alive_nodes() -> set[str]:
    """Ray's ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def end(locations: dict[Rank, ProcessLocation]) -> None:
    """Kill workers' processes. ray.kill does not end a stopped process."""
    for node, ranks in _by_node(locations).items():
        try:
            ray.get(on_node(node, inspection.kill, [locations[rank] for rank in ranks]), timeout=PROBE_TIMEOUT)
        except RayError:
            continue  # the node is lost, and its processes with it


def _by_node(locations: dict[Rank, ProcessLocation]) -> dict[str, list[Rank]]:
    ranks = sorted(locations, key=lambda rank: locations[rank].node)
    return {node: list(group) for node, group in groupby(ranks, key=lambda rank: locations[rank].node)}


def on_node(node: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function of one of our modules as a Ray task on a node, whatever else runs there; reference to the result."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"name": function.__name__, "num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
    return ray.remote(call).options(**options).remote(f"{function.__module__}:{function.__name__}", *args)


def named(ranks: Sequence[Rank]) -> str:
    return ", ".join(_named(rank) for rank in ranks)


def _named(rank: Rank) -> str:
    return f"{rank[0]}-{rank[1]}"


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())
