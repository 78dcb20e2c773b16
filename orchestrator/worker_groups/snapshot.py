"""The state of the trained roles in the object store, from which lost steps are repeated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from configs.schema import Role
from orchestrator.worker_groups.failures import alive_nodes
from workers.process.state_files import write_files


@dataclass(frozen=True)
class Snapshot:
    """The training state after a step, in the object store: role -> each rank's files and their names."""

    step: int
    state: dict[str, Any]
    """The driver's part."""
    files: dict[Role, list[RankFiles]]

    def write(self, folder: Path) -> None:
        """Write it as `save` writes a checkpoint."""
        alive = alive_nodes()
        for role, ranks in self.files.items():
            for rank in ranks:
                write_files(folder / role, ray.get(rank.copy_on(alive)))

    def safe(self) -> bool:
        """Whether a node may be lost: all is where it was taken, and the copies on other nodes have arrived."""
        alive = alive_nodes()
        return all(rank.node in alive and len(rank.arrived()) == len(rank.copies) for rank in self._ranks())

    def whole(self) -> bool:
        """Whether each rank's files are on some node that lives."""
        alive = alive_nodes()
        return all(alive & rank.arrived() for rank in self._ranks())

    def _ranks(self) -> list[RankFiles]:
        return [rank for ranks in self.files.values() for rank in ranks]


@dataclass(frozen=True)
class RankFiles:
    """The state of one rank: name -> bytes."""

    names: list[str]
    node: str
    """The node that it was taken on."""
    copies: dict[str, ray.ObjectRef]
    """Node -> the files there, or on their way there."""

    def arrived(self) -> set[str]:
        """The nodes that have the files, or had them."""
        refs = list(self.copies.values())
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return {node for node, ref in self.copies.items() if ref in ready}

    def copy_on(self, nodes: set[str]) -> ray.ObjectRef:
        """A copy on one of these nodes, the first one made if it can be; any, where there is none: reading it will say that it
        is lost."""
        there = [ref for node, ref in self.copies.items() if node in nodes]
        return (there or list(self.copies.values()))[0]
