"""What went wrong in a worker: which rank, on which node, in which method, and the state of its process."""

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
"""Seconds for probing, or ending, the processes of a node."""

LOST = (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RpcError,
    WorkerCrashedError,
)
"""What Ray itself loses, so that the same call may succeed another time. Its other errors (a result that cannot be read, no
memory in the object store, an exception that could not be pickled) come again."""

Kind = Literal["error", "died", "hung", "lost"]

Rank = tuple[Role, int]


@dataclass(frozen=True)
class Failure:
    """A call to a worker that failed."""

    kind: Kind
    """error: it raised. died: its process is gone. hung: it did not reply in time. lost: Ray lost its reply or its arguments,
    though all processes live."""
    role: Role
    ranks: tuple[int, ...]
    method: str
    phase: Phase
    text: str
    """What happened, in a line."""
    cause: Exception | None = None
    """What the worker raised, where it did."""
    detail: str = ""
    """Ray's message: a traceback, or why the process died."""
    failed_ranks: tuple[Rank, ...] = ()
    """Workers that must be replaced, of whatever role: another than the one that reports the error may have caused it."""
    locations: dict[Rank, ProcessLocation] = field(default_factory=dict)
    states: dict[Rank, ProcessState] = field(default_factory=dict)
    """Of the failed ranks; where there are none, of those that raised."""

    @property
    def survivable(self) -> bool:
        """Whether the same call may succeed once failed workers are replaced: an error raised by a worker itself comes again."""
        return bool(self.failed_ranks) or self.kind == "lost"

    def __str__(self) -> str:
        parts = [self.text]
        if self.detail:
            parts.append(_indent(self.detail))
        for rank, found in self.states.items():
            place = self.locations[rank]
            parts.append(
                f"  {_named(rank)}: node {place.host} ({place.node[:6]}), pid {place.pid}, process {found.state}"
            )
            if found.stack:
                parts.append(f"  its stack:\n{_indent(found.stack)}")
            if found.log:
                parts.append(f"  the end of its output:\n{_indent(found.log)}")
        return "\n".join(parts)


class WorkerError(RuntimeError):
    """A worker failed, died or did not reply in time; the message says all that could be found out."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.final = False
        """Whether it was decided that the run ends because of it."""


def probe_processes(locations: dict[Rank, ProcessLocation], stacks: Collection[Rank] = ()) -> dict[Rank, ProcessState]:
    """Examine workers' processes, on their nodes. stacks: those whose Python stacks are wanted too, which takes seconds."""
    nodes = _by_node(locations)
    tasks = {
        node: on_node(
            node, inspection.inspect, [locations[rank] for rank in ranks], LOG_LINES, [rank in stacks for rank in ranks]
        )
        for node, ranks in nodes.items()
    }
    found: dict[Rank, ProcessState] = {}
    for node, ranks in nodes.items():
        try:
            found |= zip(ranks, ray.get(tasks[node], timeout=PROBE_TIMEOUT), strict=True)
        except GetTimeoutError:
            # A node without a free moment is not lost: its workers are healthy as far as anybody knows.
            state: State = "running" if node in alive_nodes() else "node lost"
            found |= dict.fromkeys(
                ranks, ProcessState(state, f"(the node could not be looked at in {PROBE_TIMEOUT:.0f} s)")
            )
        except RayError:  # the task cannot be run there
            found |= dict.fromkeys(ranks, ProcessState("node lost"))
    return {rank: found[rank] for rank in locations}


def alive_nodes() -> set[str]:
    """Ray's ids of the nodes that live."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def end(locations: dict[Rank, ProcessLocation]) -> None:
    """Kill workers' processes, which Ray cannot do with a stopped one."""
    for node, ranks in _by_node(locations).items():
        try:
            ray.get(on_node(node, inspection.kill, [locations[rank] for rank in ranks]), timeout=PROBE_TIMEOUT)
        except RayError:
            continue  # with the node they are gone too


def _by_node(locations: dict[Rank, ProcessLocation]) -> dict[str, list[Rank]]:
    ranks = sorted(locations, key=lambda rank: locations[rank].node)
    return {node: list(group) for node, group in groupby(ranks, key=lambda rank: locations[rank].node)}


def on_node(node: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function of a module of ours as a Ray task on a node, beside whatever else runs there; the result's reference."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"name": function.__name__, "num_cpus": 0, "max_retries": 0, "scheduling_strategy": where}
    return ray.remote(call).options(**options).remote(f"{function.__module__}:{function.__name__}", *args)


def named(ranks: Sequence[Rank]) -> str:
    return ", ".join(_named(rank) for rank in ranks)


def _named(rank: Rank) -> str:
    return f"{rank[0]}-{rank[1]}"


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())
