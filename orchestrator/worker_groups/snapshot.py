"""Snapshots: the state of the trained roles in the object store. After a failure, lost steps are repeated from it."""

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
        """Whether a node may be lost: all nodes that it was taken on are alive, and all copies have arrived."""
        alive = alive_nodes()
        return all(rank.node in alive and len(rank.arrived()) == len(rank.copies) for rank in self._ranks())

    def available(self) -> bool:
        """Whether each rank's files are on a node that is alive."""
        alive = alive_nodes()
        return all(alive & rank.arrived() for rank in self._ranks())

    def _ranks(self) -> list[RankFiles]:
        return [rank for ranks in self.files.values() for rank in ranks]


@dataclass(frozen=True)
class RankFiles:
    """The state of one rank: name -> bytes."""

    names: list[str]
    node: str
    """The rank's node when the snapshot was taken."""
    copies: dict[str, ray.ObjectRef]
    """Node -> the files there, or still in transfer."""

    def arrived(self) -> set[str]:
        """The nodes that have received the files; some may be lost since."""
        refs = list(self.copies.values())
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return {node for node, ref in self.copies.items() if ref in ready}

    def copy_on(self, nodes: set[str]) -> ray.ObjectRef:
        """The first copy that is on one of these nodes; without one, a copy that is lost: reading it raises the error."""
        on_nodes = [ref for node, ref in self.copies.items() if node in nodes]
        return (on_nodes or list(self.copies.values()))[0]
