"""Creates the plan's placement groups in Ray, waits for them and removes them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping

import ray
from ray.exceptions import RaySystemError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from configs.schema import Role
from placement.cluster.bin_packing import Request, creation_order, place_bundles, resource_text, shortage
from placement.cluster.occupancy import NodeResources, free_resources, holders_text, node_resources
from placement.types import GroupPlan, Plan

GRANT_TIMEOUT_S = 2.0
"""Time for Ray to grant groups for which there are free resources; doubled after each attempt that fails."""
POLL_INTERVAL_S = 1.0, 8.0
"""About the time between two checks for free resources: the first, and the longest."""


class PlacementError(RuntimeError):
    """A placement group could not be reserved."""


def create_groups(
    plan: Plan, run_name: str, timeout: float, report: Callable[[str], None] = lambda text: None
) -> dict[str, PlacementGroup]:
    """Reserve the plan's groups, named `{run_name}-{group}`: all of them or none.

    Groups are requested only when all of them fit into the nodes' free resources, the hardest to place first, as in the
    plan. Until then nothing is held: two jobs that fit only one at a time would each hold a part that the other waits for.
    Where two jobs request at the same moment and each gets a part, each releases its part and tries again after a random
    time.

    Args:
        plan: a stage's plan.
        run_name: prefix of the groups' names, which are unique in the Ray namespace.
        timeout: seconds for all groups together.
        report: called with a line about who holds the resources, whenever that changes.

    Raises:
        PlacementError: the groups could not be reserved in that time, or a name is already used; names the group, the
            missing resource, who holds it, settings that would help and the free resources of each node.
    """
    deadline, grant_timeout, pause = time.monotonic() + timeout, GRANT_TIMEOUT_S, POLL_INTERVAL_S[0]
    previous = reported = ""
    generator = random.Random()  # own generator: jobs that share a seed must not draw the same pauses
    while True:
        nodes = node_resources()
        shortages = _shortages(plan, nodes)
        if not shortages:
            if groups := _try(plan, run_name, min(deadline, time.monotonic() + grant_timeout)):
                return groups
            grant_timeout *= 2
        if time.monotonic() >= deadline:
            raise PlacementError(_refusal(plan, run_name, timeout, shortages, "placement.timeout"))
        reason = _holders(plan, nodes) or "; ".join(shortages.values()) or "other runs request them too"
        if reason == previous != reported:  # a state that lasts for one check only is not reported
            report(f"waiting for free resources: {reason}")
            reported = reason
        previous = reason
        time.sleep(min(pause * generator.uniform(0.5, 1.5), max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, POLL_INTERVAL_S[1])


def _try(plan: Plan, run_name: str, until: float) -> dict[str, PlacementGroup] | None:
    """All groups; None, with every group removed again, where Ray does not grant all of them in time."""
    created: dict[str, PlacementGroup] = {}
    try:
        for index in creation_order([_request(group) for group in plan.groups]):
            created[plan.groups[index].name] = _create(plan.groups[index], run_name)
        if all(group.wait(_seconds_to(until)) for group in created.values()):
            return {group.name: created[group.name] for group in plan.groups}
    except BaseException:
        for group in created.values():
            remove_placement_group(group)
        raise
    remove_groups(created)
    return None


def await_groups(plan: Plan, run_name: str, groups: Mapping[str, PlacementGroup], timeout: float) -> None:
    """Wait until every bundle has a node: bundles of a lost node move to another node with free resources.

    Raises:
        PlacementError: a bundle has no node after `timeout` seconds; names the missing and each node's free resources.
    """
    deadline = time.monotonic() + timeout
    waiting = [name for name, group in groups.items() if not group.wait(_seconds_to(deadline))]
    if waiting:
        free = free_resources(node_resources())
        shortages = {name: shortage(_request(plan.group(name)), free) for name in waiting}
        raise PlacementError(_refusal(plan, run_name, timeout, shortages, "recovery.node_timeout"))


def remove_groups(groups: Mapping[str, PlacementGroup], timeout: float = 60.0) -> None:
    """Remove the groups, which kills the workers on them, and wait until the nodes have their resources back.

    Ray releases a bundle some time after its group is removed. Groups requested in between would be placed around the
    bundles that are still held, and could block one another forever.

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
    """A worker's group name and bundle index (the first of its bundles, where an engine spans several)."""
    planned = plan.roles[role]
    if not 0 <= rank < planned.ranks:
        raise IndexError(f"{role} has ranks 0 to {planned.ranks - 1}, not {rank}")
    bundles = len(plan.group(planned.group).bundles)
    return planned.group, rank * (bundles // planned.ranks)


def _seconds_to(until: float) -> int:
    """Rounded up: Ray drops the fraction of a timeout."""
    return max(0, math.ceil(until - time.monotonic()))


def _create(group: GroupPlan, run_name: str) -> PlacementGroup:
    name = f"{run_name}-{group.name}"
    try:
        return placement_group([dict(bundle) for bundle in group.bundles], strategy=group.packing, name=name)
    except RaySystemError as error:
        raise PlacementError(f"placement group {name}: {error}") from error


def _left(groups: Mapping[str, PlacementGroup]) -> list[str]:
    """Groups that still have a bundle on some node: Ray lists it as a resource named `CPU_group_{id}`."""
    resources = set(ray.cluster_resources())
    return [name for name, group in groups.items() if any(r.endswith(f"_group_{group.id.hex()}") for r in resources)]


def _request(group: GroupPlan) -> Request:
    return Request(group.bundles[0], len(group.bundles), group.packing)


def _shortages(plan: Plan, nodes: Mapping[str, NodeResources]) -> dict[str, str]:
    """Groups that do not fit on the nodes beside the others -> what is missing."""
    free, shortages = free_resources(nodes), {}
    for index in creation_order([_request(group) for group in plan.groups]):
        request = _request(plan.groups[index])
        if place_bundles(request, free) is None:
            shortages[plan.groups[index].name] = shortage(request, free)
    return shortages


def _holders(plan: Plan, nodes: Mapping[str, NodeResources], exclude: str = "") -> str:
    """Who holds resources of the kinds that the plan needs. exclude: a run that is left out."""
    kinds = {kind for group in plan.groups for kind, size in group.bundles[0].items() if size}
    return holders_text(nodes, kinds, exclude)


def _refusal(plan: Plan, run_name: str, timeout: float, shortages: Mapping[str, str], setting: str) -> str:
    """The groups that could not be reserved, what is missing, who holds it, what would help, and each node's free resources."""
    nodes, lines = node_resources(), []
    contended = "there are free resources, but other runs requested them too"
    shortages = shortages or {group.name: contended for group in plan.groups}
    for name, missing in shortages.items():
        request = _request(plan.group(name))
        lines.append(
            f"placement group {run_name}-{name} could not be reserved within {timeout:g} s ({setting}): "
            f"{request.count} x ({resource_text(request.bundle)}), {request.packing}; {missing}"
        )
    own = run_name if setting == "recovery.node_timeout" else ""
    lines += filter(None, [_holders(plan, nodes, exclude=own)])
    lines.append(
        f"set a longer {setting} to wait for free resources, or fewer placement.devices or a smaller placement.cpus_per_device"
    )
    fitting = [f"{run_name}-{group.name}" for group in plan.groups if group.name not in shortages]
    lines.append(f"free on the nodes{', of which ' + ', '.join(fitting) + ' would take a part' if fitting else ''}:")
    return "\n".join([*lines, *(f"  {name}: free {node}" for name, node in nodes.items())])
