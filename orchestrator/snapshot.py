"""What the trained roles have learned, in the object store: from there lost steps are done again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from configs.schema import Role
from workers.files import write_files


@dataclass(frozen=True)
class Snapshot:
    """The training state after a step, in the object store: role -> each rank's files and their names."""

    step: int
    state: dict[str, Any]
    """What the driver keeps."""
    files: dict[Role, list[RankFiles]]

    def write(self, folder: Path) -> None:
        """Write it as `save` writes a checkpoint."""
        alive = alive_nodes()
        for role, ranks in self.files.items():
            for rank in ranks:
                write_files(folder / role, ray.get(rank.copy_on(alive)))


@dataclass(frozen=True)
class RankFiles:
    """What one rank has learned: name -> bytes."""

    names: list[str]
    copies: dict[str, ray.ObjectRef]
    """Node -> the files there."""

    def copy_on(self, nodes: set[str]) -> ray.ObjectRef:
        """A copy on one of these nodes; any, where there is none: reading it will say that it is lost."""
        there = [ref for node, ref in self.copies.items() if node in nodes]
        return (there or list(self.copies.values()))[0]


def alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
