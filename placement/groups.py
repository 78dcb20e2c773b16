"""The plan's placement groups, made real in Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RaySystemError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from configs.schema import Role
from placement.packing import KINDS, Request, creation_order, shortage, units, written
from placement.shape import GroupPlan, Plan

PATIENCE = 5.0
"""Seconds before the groups are asked for a second time; doubled each time after."""


class PlacementError(RuntimeError):
    """A placement group was not to be had."""


def create_groups(plan: Plan, run_name: str, timeout: float) -> dict[str, PlacementGroup]:
    """Reserve the plan's groups, named `{run_name}-{group}`; on failure none stays.

    They are asked for together, the hardest to place first, as the plan laid them. What was had while others still
    held the best places can block the rest for good, so after some patience all are given back and asked for anew.

    Args:
        plan: a stage's plan.
        run_name: stands before the groups' names, which are unique in the Ray namespace.
        timeout: seconds for all of them together.

    Raises:
        PlacementError: a group was not to be had in that time, or its name is taken; names the group, the resource
            that is missing and what each node has free.
    """
    deadline, patience = time.monotonic() + timeout, PATIENCE
    order = creation_order([_request(group) for group in plan.groups])
    while True:
        until = min(deadline, time.monotonic() + patience)
        made: dict[str, PlacementGroup] = {}
        try:
            for index in order:
                made[plan.groups[index].name] = _ask(plan.groups[index], run_name)
            waiting = [name for name, group in made.items() if not group.wait(_seconds_to(until))]
            if not waiting:
                return {group.name: made[group.name] for group in plan.groups}
            if until == deadline:
                raise PlacementError(_refusal(plan, run_name, timeout, waiting, "placement.timeout"))
        except BaseException:
            for group in made.values():
                remove_placement_group(group)
            raise
        remove_groups(made)
        patience *= 2


def await_groups(plan: Plan, run_name: str, groups: Mapping[str, PlacementGroup], timeout: float) -> None:
    """Wait until every bundle has a node: those of a lost node get another, where there is room.

    Raises:
        PlacementError: some have none after `timeout` seconds; names what is missing and what each node has free.
    """
    deadline = time.monotonic() + timeout
    waiting = [name for name, group in groups.items() if not group.wait(_seconds_to(deadline))]
    if waiting:
        raise PlacementError(_refusal(plan, run_name, timeout, waiting, "recovery.node_timeout"))


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
    while held := _held(groups):
        if time.monotonic() > deadline:
            raise PlacementError(f"the bundles of {', '.join(held)} are still held {timeout:g} s after their removal")
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


def _held(groups: Mapping[str, PlacementGroup]) -> list[str]:
    """Groups of which some node still has a bundle: it is a resource there, named `CPU_group_{id}`."""
    resources = set(ray.cluster_resources())
    return [name for name, group in groups.items() if any(r.endswith(f"_group_{group.id.hex()}") for r in resources)]


def _request(group: GroupPlan) -> Request:
    return Request(group.bundles[0], len(group.bundles), group.packing)


def _refusal(plan: Plan, run_name: str, timeout: float, waiting: list[str], setting: str) -> str:
    """Which groups were not had, for want of what, and what each node has free while the others are held."""
    free, lines = _free_resources(), []
    for name in waiting:
        request = _request(plan.group(name))
        lines.append(
            f"placement group {run_name}-{name} was not to be had in {timeout:g} s ({setting}): "
            f"{request.count} x ({written(request.bundle)}), {request.packing}; "
            f"{shortage(request, [units(node) for node, _ in free.values()])}"
        )
    nodes = "".join(f"\n  {name}: free {_of(node, total)}" for name, (node, total) in free.items())
    held = [f"{run_name}-{group.name}" for group in plan.groups if group.name not in waiting]
    beside = f", beside {', '.join(held)}" if held else ""
    return "\n".join(lines) + f"\nfree on the nodes{beside}:{nodes}"


def _of(free: Mapping[str, float], total: Mapping[str, float]) -> str:
    return ", ".join(f"{free.get(kind, 0.0):g} of {total[kind]:g} {kind}" for kind in KINDS if total.get(kind))


def _free_resources() -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Alive node -> (free, total) of its resources."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    nodes = {}
    for node in [*status.active_nodes, *status.idle_nodes]:
        usage = node.resource_usage.usage
        total = {each.resource_name: each.total for each in usage}
        nodes[f"{node.ip_address}/{node.node_id[:6]}"] = {u.resource_name: u.total - u.used for u in usage}, total
    return nodes
