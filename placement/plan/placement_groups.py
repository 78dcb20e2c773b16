"""The plan's placement groups, made real in Ray."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping

import ray
from ray.exceptions import RaySystemError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from configs.schema import Role
from placement.cluster.bin_packing import Request, creation_order, lay, shortage, written
from placement.cluster.occupancy import Room, free_of, held, room
from placement.types import GroupPlan, Plan

PATIENCE = 2.0
"""Seconds that Ray has to grant groups for which there is room; doubled each time that it was not enough."""
LOOKS = 1.0, 8.0
"""Seconds, about, between two looks whether there is room: the first, and the longest."""


class PlacementError(RuntimeError):
    """A placement group was not to be had."""


def create_groups(
    plan: Plan, run_name: str, timeout: float, say: Callable[[str], None] = lambda text: None
) -> dict[str, PlacementGroup]:
    """Reserve the plan's groups, named `{run_name}-{group}`: all of them or none.

    They are asked for when there is room for all on what the nodes have free, the hardest to place first, as the plan
    laid them. While there is none, nothing is held: two jobs that fit one at a time would each hold a part of what the other
    waits for. Where two ask at the same moment, and each gets a part, each gives its part back and asks again after a
    time drawn at random.

    Args:
        plan: a stage's plan.
        run_name: stands before the groups' names, which are unique in the Ray namespace.
        timeout: seconds for all of them together.
        say: called with a line that says who holds the room, when that changes.

    Raises:
        PlacementError: the groups were not to be had in that time, or a name is taken; names the group, the resource
            that is missing, who holds it, settings that would help and what each node has free.
    """
    deadline, patience, pause = time.monotonic() + timeout, PATIENCE, LOOKS[0]
    seen = said = ""
    draw = random.Random()  # of its own: jobs that share a seed must not draw alike
    while True:
        nodes = room()
        misfits = _misfits(plan, nodes)
        if not misfits:
            if groups := _try(plan, run_name, min(deadline, time.monotonic() + patience)):
                return groups
            patience *= 2
        if time.monotonic() >= deadline:
            raise PlacementError(_refusal(plan, run_name, timeout, misfits, "placement.timeout"))
        words = f"waiting for room: {_held(plan, nodes) or '; '.join(misfits.values()) or 'others ask for it too'}"
        if words == seen != said:  # what comes and goes between two looks is not worth a line
            say(words)
            said = words
        seen = words
        time.sleep(min(pause * draw.uniform(0.5, 1.5), max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, LOOKS[1])


def _try(plan: Plan, run_name: str, until: float) -> dict[str, PlacementGroup] | None:
    """All groups; or None, and none of them stays, where they are not there in time."""
    made: dict[str, PlacementGroup] = {}
    try:
        for index in creation_order([_request(group) for group in plan.groups]):
            made[plan.groups[index].name] = _ask(plan.groups[index], run_name)
        if all(group.wait(_seconds_to(until)) for group in made.values()):
            return {group.name: made[group.name] for group in plan.groups}
    except BaseException:
        for group in made.values():
            remove_placement_group(group)
        raise
    remove_groups(made)
    return None


def await_groups(plan: Plan, run_name: str, groups: Mapping[str, PlacementGroup], timeout: float) -> None:
    """Wait until every bundle has a node: those of a lost node get another, where there is room.

    Raises:
        PlacementError: some have none after `timeout` seconds; names what is missing and what each node has free.
    """
    deadline = time.monotonic() + timeout
    waiting = [name for name, group in groups.items() if not group.wait(_seconds_to(deadline))]
    if waiting:
        free = free_of(room())
        misfits = {name: shortage(_request(plan.group(name)), free) for name in waiting}
        raise PlacementError(_refusal(plan, run_name, timeout, misfits, "recovery.node_timeout"))


def remove_groups(groups: Mapping[str, PlacementGroup], timeout: float = 60.0) -> None:
    """Give the groups back, killing the workers on them, and wait until the nodes have their resources again.

    Ray lets go of a bundle some time after the group is gone. The next groups, asked for in between, would be laid
    around what is still held, and could so block one another for good.

    Raises:
        PlacementError: bundles are still held after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    for group in groups.values():
        remove_placement_group(group)
    while left := _left(groups):
        if time.monotonic() > deadline:
            raise PlacementError(f"the bundles of {', '.join(left)} are still held {timeout:g} s after their removal")
        time.sleep(0.05)


def bundle_of(plan: Plan, role: Role, rank: int) -> tuple[str, int]:
    """Where a worker goes: (name of its group, index of its bundle; the first, where an engine spans several)."""
    planned = plan.roles[role]
    if not 0 <= rank < planned.ranks:
        raise IndexError(f"{role} has ranks 0 to {planned.ranks - 1}, not {rank}")
    bundles = len(plan.group(planned.group).bundles)
    return planned.group, rank * (bundles // planned.ranks)


def _seconds_to(until: float) -> int:
    """Rounded up: Ray drops the fraction of a timeout."""
    return max(0, math.ceil(until - time.monotonic()))


def _ask(group: GroupPlan, run_name: str) -> PlacementGroup:
    name = f"{run_name}-{group.name}"
    try:
        return placement_group([dict(bundle) for bundle in group.bundles], strategy=group.packing, name=name)
    except RaySystemError as error:
        raise PlacementError(f"placement group {name}: {error}") from error


def _left(groups: Mapping[str, PlacementGroup]) -> list[str]:
    """Groups of which some node still has a bundle: it is a resource there, named `CPU_group_{id}`."""
    resources = set(ray.cluster_resources())
    return [name for name, group in groups.items() if any(r.endswith(f"_group_{group.id.hex()}") for r in resources)]


def _request(group: GroupPlan) -> Request:
    return Request(group.bundles[0], len(group.bundles), group.packing)


def _misfits(plan: Plan, nodes: Mapping[str, Room]) -> dict[str, str]:
    """Groups for which the nodes have no room beside the others -> what is missing."""
    free, misfits = free_of(nodes), {}
    for index in creation_order([_request(group) for group in plan.groups]):
        request = _request(plan.groups[index])
        if lay(request, free) is None:
            misfits[plan.groups[index].name] = shortage(request, free)
    return misfits


def _held(plan: Plan, nodes: Mapping[str, Room], but: str = "") -> str:
    """Who holds resources of the kinds that the plan needs. but: a run that is left out."""
    return held(nodes, {kind for group in plan.groups for kind, size in group.bundles[0].items() if size}, but)


def _refusal(plan: Plan, run_name: str, timeout: float, misfits: Mapping[str, str], setting: str) -> str:
    """Which groups were not had, for want of what, who holds it, what would help, and what each node has free."""
    nodes, lines = room(), []
    misfits = misfits or {group.name: "there is room, but others asked for it too" for group in plan.groups}
    for name, missing in misfits.items():
        request = _request(plan.group(name))
        lines.append(
            f"placement group {run_name}-{name} was not to be had in {timeout:g} s ({setting}): "
            f"{request.count} x ({written(request.bundle)}), {request.packing}; {missing}"
        )
    own = run_name if setting == "recovery.node_timeout" else ""
    lines += filter(None, [_held(plan, nodes, but=own)])
    lines.append(
        f"a longer {setting} waits for room; fewer placement.devices, or a smaller placement.cpus_per_device, need less of it"
    )
    fitting = [f"{run_name}-{group.name}" for group in plan.groups if group.name not in misfits]
    lines.append(f"free on the nodes{', of which ' + ', '.join(fitting) + ' would take a part' if fitting else ''}:")
    return "\n".join([*lines, *(f"  {name}: free {node}" for name, node in nodes.items())])
