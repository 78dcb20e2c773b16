"""Assigns groups of roles to a cluster's nodes; where they do not fit, says what is missing and which change would fit."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from configs.schema import PlacementSettings, Role
from placement.cluster.bin_packing import (
    KINDS,
    amount_text,
    creation_order,
    place_bundles,
    shortage,
    simulate,
    total_resources,
    units,
)
from placement.cluster.spec import Cluster
from placement.plan.layout import PRESETS, GroupSpec, capped, preset, with_engines
from placement.types import Device, Problem

N = TypeVar("N", int, float)

MIN_CPUS = 0.01
"""Fewest cores of a device: cores are divided down to hundredths."""


class Assignment(NamedTuple):
    """CPU cores of each device, and for each group the node index of each bundle."""

    cpus_per_device: float
    nodes: list[tuple[int, ...]]


@dataclass(frozen=True)
class ClusterFit:
    """A cluster, and the settings that decide how a stage's roles are placed on it."""

    cluster: Cluster
    device: Device
    placement: PlacementSettings
    roles: tuple[Role, ...]
    processes: tuple[tuple[Role, ...], ...] = ()

    def assign(self, specs: list[GroupSpec]) -> Assignment | None:
        """Groups to nodes, None where they do not fit.

        Cores per device are the setting's; by default 1 beside a GPU, else the most with which everything fits.
        """
        cpus = self._cpus() or self._most_cpus(specs)
        return None if cpus is None else self._try(specs, cpus)

    def problems(self, specs: list[GroupSpec]) -> list[Problem]:
        """Why `assign` returned None: the whole cluster is too small or, where it is not, single groups do not fit."""
        requests = [spec.request(self.device, self._cpus() or MIN_CPUS) for spec in specs]
        hint = self._hint(specs)
        free, problems = total_resources(self.cluster), []
        for kind in KINDS:
            requested = [request.count * units(request.bundle)[kind] for request in requests]
            available = sum(node[kind] for node in free)
            if (missing := sum(requested) - available) > 0:
                by = ", ".join(f"{spec.name} {amount_text(n)}" for spec, n in zip(specs, requested, strict=True))
                text = f"{amount_text(sum(requested))} {kind} are requested ({by}), the cluster has "
                text += f"{amount_text(available)}: {amount_text(missing)} missing; {hint}"
                problems.append(Problem(self._setting(kind), text))
        if problems:
            return problems
        placed, free = simulate(requests, self.cluster)
        for spec, request, nodes in zip(specs, requests, placed, strict=True):
            if nodes is None:
                beside = " beside the others" if len(specs) > 1 else ""
                text = f"group {spec.name} does not fit{beside}: {shortage(request, free)}; {hint}"
                problems.append(Problem(self._setting_of(spec, specs), text))
        return problems

    def _cpus(self) -> float | None:
        return self.placement.cpus_per_device or (1.0 if self.device == "cuda" else None)

    def _try(self, specs: Sequence[GroupSpec], cpus: float) -> Assignment | None:
        requests = [spec.request(self.device, cpus) for spec in specs]
        free, placed = total_resources(self.cluster), {}
        for index in creation_order(requests):
            nodes = place_bundles(requests[index], free)
            if nodes is None:
                return None
            placed[index] = nodes
        return Assignment(cpus, [placed[index] for index in range(len(specs))])

    def _most_cpus(self, specs: Sequence[GroupSpec]) -> float | None:
        """The most cores that every device can have: some node's cores divided by a whole number, in hundredths."""
        devices = sum(spec.devices for spec in specs)
        even = self.cluster.cpus / devices
        parts = {floor_to(node.cpus / count, 2) for node in self.cluster.nodes for count in range(1, devices + 1)}
        candidates = sorted(part for part in parts if MIN_CPUS <= part <= even)
        return _last(candidates, lambda cpus: self._try(specs, cpus) is not None)

    def _hint(self, specs: list[GroupSpec]) -> str:
        """The changes with which everything fits; each is enough alone."""
        hints = []
        if self._cpus() is not None and (cpus := self._most_cpus(specs)) is not None:
            hints.append(f"placement.cpus_per_device={cpus:g}")
        if self.assign([_not_strict(spec) for spec in specs]) is not None:
            hints.append("packing PACK or SPREAD instead of the strict one")
        if self.placement.groups is None:
            hints += [f"placement.layout={layout}" for layout in PRESETS if self._preset_fits(layout, specs)]
        sizes = range(1, max(spec.devices for spec in specs))
        most = _last(sizes, lambda size: self.assign(capped(specs, size)) is not None)
        if most is not None:
            hints.append(f"at most {most} device{'s' if most > 1 else ''} in each group")
        return f"{' or '.join(hints)} would fit" if hints else "only a larger cluster would fit"

    def _preset_fits(self, layout: str, specs: list[GroupSpec]) -> bool:
        size = max(spec.tensor_parallel for spec in specs)
        groups = with_engines(preset(self.placement, layout, self.roles, self.processes), size)
        engines_fit = self.device == "cpu" or all(group.engines_fit for group in groups)
        return engines_fit and self.assign(groups) is not None

    def _setting(self, kind: str) -> str:
        if kind == "CPU" and self._cpus() is not None:
            return "placement.cpus_per_device"
        if self.placement.groups is not None:
            return "placement.groups"
        return "placement.devices" if self.placement.devices else "placement.layout"

    def _setting_of(self, spec: GroupSpec, specs: Sequence[GroupSpec]) -> str:
        if self.placement.cpus_per_device is not None and self._most_cpus(specs) is not None:
            return "placement.cpus_per_device"
        return f"{spec.setting}.packing" if spec.packing.startswith("STRICT") else spec.setting


def floor_to(value: float, digits: int) -> float:
    """Round down to `digits` decimal places, without counting float error as a loss."""
    scale: int = 10**digits
    return math.floor(round(value * scale, 6)) / scale


def _not_strict(spec: GroupSpec) -> GroupSpec:
    return replace(spec, packing="SPREAD" if spec.packing == "STRICT_SPREAD" else "PACK")


def _last(candidates: Sequence[N], fits: Callable[[N], bool]) -> N | None:
    """The last candidate that fits. Candidates ascend, and all before a fitting one fit too."""
    index = bisect_left(candidates, True, key=lambda candidate: not fits(candidate))
    return candidates[index - 1] if index else None
