"""Which snapshots a lost node would take along: of objects in a real object store."""

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
    taken, under_way = ray.put(files), arrives_with.remote(tmp_path / "go", files)
    kept = snapshot(RankFiles([*files], here, {here: taken, "other": under_way}))
    lost = snapshot(RankFiles([*files], "lost", {"lost": taken, here: under_way}))
    assert kept.whole() and not kept.safe()
    assert not lost.whole() and not lost.safe()

    (tmp_path / "go").touch()
    wait_for(kept.safe)
    assert lost.whole() and not lost.safe(), "one copy is left"
    lost.write(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "actor" / "state.pt").read_bytes() == bytes(range(9))


def snapshot(rank: RankFiles) -> Snapshot:
    return Snapshot(1, {}, {"actor": [rank]})
