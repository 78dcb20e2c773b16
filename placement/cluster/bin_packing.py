"""Where Ray would put the bundles of placement groups: a simulation of its policies that needs no running cluster.

Resources are counted in ten-thousandths, as Ray counts them, so that 5 x 0.4 CPUs fit on 2 exactly.
All bundles of a group have the same size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from placement.cluster.spec import Cluster

Packing = Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]
Resources = dict[str, int]
"""Resource -> ten-thousandths."""
KINDS = ("GPU", "CPU")


@dataclass(frozen=True)
class Request:
    """`count` equal bundles, placed by one policy."""

    bundle: Mapping[str, float]
    count: int
    packing: Packing


def units(amounts: Mapping[str, float]) -> Resources:
    return {kind: round(amounts.get(kind, 0.0) * 10_000) for kind in KINDS}


def total_resources(cluster: Cluster) -> list[Resources]:
    """All resources of each node."""
    return [units({"CPU": node.cpus, "GPU": node.gpus}) for node in cluster.nodes]


def creation_order(requests: Sequence[Request]) -> list[int]:
    """Hardest first: strict policies, then large bundles, then many. Small bundles placed first would fragment the nodes."""

    def ease(index: int) -> tuple[bool, bool, float, float, int]:
        request = requests[index]
        bundle, packing = request.bundle, request.packing
        loose = not packing.startswith("STRICT")
        return loose, packing != "STRICT_PACK", -bundle.get("GPU", 0.0), -bundle["CPU"], -request.count

    return sorted(range(len(requests)), key=ease)


def simulate(requests: Sequence[Request], cluster: Cluster) -> tuple[list[tuple[int, ...] | None], list[Resources]]:
    """For each request the node index of each bundle, or None where it does not fit; and the resources that stay free."""
    free = total_resources(cluster)
    placed: list[tuple[int, ...] | None] = [None] * len(requests)
    for index in creation_order(requests):
        placed[index] = place_bundles(requests[index], free)
    return placed, free


def place_bundles(request: Request, free: list[Resources]) -> tuple[int, ...] | None:
    """The node index of each bundle; their resources are subtracted from `free`.

    None where the bundles do not fit; `free` is then unchanged.
    """
    bundle, trial = units(request.bundle), [dict(node) for node in free]
    nodes: list[int] = []
    if request.packing == "STRICT_SPREAD" and request.count > len(free):
        return None
    while len(nodes) < request.count:
        left = request.count - len(nodes)
        batch = {"STRICT_PACK": left, "PACK": left}.get(request.packing, 1)
        unused = set(range(len(trial))).difference(nodes)
        if request.packing == "STRICT_PACK":
            best = _emptiest(trial, {kind: left * size for kind, size in bundle.items()}, unused)
        else:
            best = _emptiest(trial, bundle, unused)
            if best is None and request.packing == "SPREAD":
                best = _emptiest(trial, bundle, range(len(trial)))
        if best is None:
            return None
        count = min(batch, bundles_that_fit(trial[best], bundle))
        for kind, size in bundle.items():
            trial[best][kind] -= count * size
        nodes += [best] * count
    free[:] = trial
    return tuple(nodes)


def bundles_that_fit(free: Mapping[str, int], bundle: Mapping[str, int]) -> int:
    """How many such bundles fit into a node's free resources."""
    return min(free[kind] // size for kind, size in bundle.items() if size)


def _emptiest(free: Sequence[Resources], wanted: Resources, among: Iterable[int]) -> int | None:
    """The node that keeps the largest share of its free resources, as Ray's scorer chooses; None where `wanted` fits on none."""

    def share_left(index: int) -> float:
        return sum((free[index][kind] - size) / free[index][kind] for kind, size in wanted.items() if size)

    candidates = [index for index in among if bundles_that_fit(free[index], wanted)]
    return max(candidates, key=share_left, default=None)


def shortage(request: Request, free: Sequence[Mapping[str, int]]) -> str:
    """What is missing for a request that does not fit into `free`."""
    bundle = units(request.bundle)
    short = [
        f"{kind} is short: {amount_text(requested)} requested, {amount_text(available)} available, "
        f"{amount_text(requested - available)} missing"
        for kind in KINDS
        if (requested := request.count * bundle[kind]) > (available := sum(node[kind] for node in free))
    ]
    if short:
        return "; ".join(short)
    if request.packing == "STRICT_PACK":
        whole = {kind: request.count * size for kind, size in request.bundle.items()}
        most = {kind: max(node[kind] for node in free) / 10_000 for kind in whole}
        return f"STRICT_PACK needs {resource_text(whole)} on one node; the largest node has {resource_text(most)}"
    each = resource_text(request.bundle)
    if request.packing == "STRICT_SPREAD":
        fitting = sum(bundles_that_fit(node, bundle) > 0 for node in free)
        return f"STRICT_SPREAD needs {request.count} nodes with {each} each; {fitting} have that"
    fitting = sum(bundles_that_fit(node, bundle) for node in free)
    return f"{request.count} x ({each}) requested, each on one node; {fitting} fit on the nodes"


def amount_text(ten_thousandths: int) -> str:
    return f"{ten_thousandths / 10_000:g}"


def resource_text(resources: Mapping[str, float]) -> str:
    """`1 GPU + 0.5 CPU`."""
    return " + ".join(f"{size:g} {kind}" for kind in KINDS if (size := resources.get(kind, 0.0)) or kind in resources)
