"""Nodes are lost during a run, on a simulated cluster of several nodes on one machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster as RayCluster
from ray.util.placement_group import placement_group, remove_placement_group

from orchestrator import load_config, run_stages
from orchestrator.run.run_dir import Run
from orchestrator.storage.metrics_file import repeatable as lines
from placement.plan.placement_groups import PlacementError
from tests.support.models import make_reward_model
from tests.support.nodes import simulated_cluster
from tests.support.runs import assert_same_model, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

STORE = {"object_store_memory": 150 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """The head has room for two of the five workers; each node added to it for three."""
    quick = {"enable_worker_prestart": False, "health_check_period_ms": 500}  # a lost node is detected sooner
    with simulated_cluster(STORE | {"num_cpus": 2, "_system_config": quick}, namespace="troupe") as started:
        yield started


@pytest.fixture
def settings(micro: Path, tmp_path: Path) -> list[str]:
    """PPO alone, of five workers."""
    reward = make_reward_model(micro.parent / "model", tmp_path / "reward")
    ppo = ["ppo.steps=20", "ppo.evaluation=null", f"ppo.rewards=[{{kind: model, path: {reward}}}]"]
    return ["sft=null", "rm=null", *ppo, "recovery.snapshot_every=5", "recovery.node_timeout=15"]


def room(cluster: RayCluster) -> Any:
    """Another node for three workers."""
    return cluster.add_node(num_cpus=3, **STORE)


def test_nodes_are_lost(cluster: RayCluster, micro: Path, settings: list[str]) -> None:
    """Workers of the first node move to another. After the second loss there are too few nodes: the run waits, then stops with a
    checkpoint. The resumed run has the results of a run without losses."""
    other = room(cluster)
    quiet = run_stages(load_config(micro, [*settings, "name=still"]))

    spare = placement_group([{"CPU": 3}])
    assert spare.wait(30)
    node = room(cluster)
    config = load_config(micro, [*settings, "name=moved"])
    folder = Path(config.runs) / "moved"

    def lose_both() -> None:
        """Each a step after a snapshot, so that its copy has reached the other node."""
        wait_for(lambda: len(lines(folder, "ppo")) >= 6)
        remove_placement_group(spare)
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: len(lines(folder, "ppo")) >= 11)
        cluster.remove_node(other, allow_graceful=False)

    losing = threading.Thread(target=lose_both)
    losing.start()
    with pytest.raises(PlacementError, match=r"in 15 s \(recovery\.node_timeout\): .*CPU") as error:
        run_stages(config)
    losing.join()
    assert "free on the nodes" in str(error.value)
    assert "process node lost" in min((folder / "failures").glob("*.txt")).read_text(), "of the first failure"
    [step] = Run.open(folder).checkpoints("ppo")
    assert step >= 10, "the run went on elsewhere"

    room(cluster)
    result = run_stages(config)
    assert lines(folder, "ppo") == lines(quiet.folder, "ppo")
    assert_same_model(result.models["ppo"], quiet.models["ppo"])
