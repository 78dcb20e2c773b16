"""Which snapshots survive the loss of a node: objects in a real object store."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import ray

from orchestrator.worker_groups.failures import alive_nodes
from orchestrator.worker_groups.snapshot import RankFiles, Snapshot
from placement.cluster import Cluster
from tests.support.runs import wait_for
from workers.process.state_files import Files


@ray.remote(num_cpus=0)
def arrives_with(file: Path, files: Files) -> Files:
    while not file.exists():
        time.sleep(0.02)
    return files


def test_a_snapshot_is_safe_once_its_copies_have_arrived(ray_here: Cluster, tmp_path: Path) -> None:
    [here] = alive_nodes()
    files = {"state.pt": np.arange(9, dtype=np.uint8)}
    local, in_transfer = ray.put(files), arrives_with.remote(tmp_path / "go", files)
    kept = snapshot(RankFiles([*files], here, {here: local, "other": in_transfer}))
    lost = snapshot(RankFiles([*files], "lost", {"lost": local, here: in_transfer}))
    assert kept.available() and not kept.safe()
    assert not lost.available() and not lost.safe()

    (tmp_path / "go").touch()
    wait_for(kept.safe)
    assert lost.available() and not lost.safe(), "one copy is left"
    lost.write(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "actor" / "state.pt").read_bytes() == bytes(range(9))


def snapshot(rank: RankFiles) -> Snapshot:
    return Snapshot(1, {}, {"actor": [rank]})
