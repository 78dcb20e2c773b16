"""A node of the cluster is lost in the middle of a run: on a simulated cluster of several nodes on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from orchestrator import Result, load_config, run_stages
from orchestrator.metrics import repeatable as lines
from orchestrator.run import Run
from placement.groups import PlacementError
from tests.runs import assert_same_model, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = ("recovery.snapshot_every=1", "ppo.evaluation=null", "ppo.steps=10")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """The head has room for two of the five workers; each node added to it for three."""
    node: dict[str, Any] = {"object_store_memory": 150 * 2**20}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": {"enable_worker_prestart": False}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        started = RayCluster(initialize_head=True, head_node_args=node | head)
        try:
            ray.init(started.address, log_to_driver=False, namespace="troupe")
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


@pytest.fixture(scope="module")
def quiet(cluster: RayCluster, micro: Path) -> Result:
    """A run in which nothing is lost."""
    node = cluster.add_node(num_cpus=3, object_store_memory=150 * 2**20)
    try:
        return run_stages(load_config(micro, [*SETTINGS, "name=still"]))
    finally:
        cluster.remove_node(node)


def lose(cluster: RayCluster, node: Any, folder: Path, spare: PlacementGroup | None = None) -> threading.Thread:
    """Kill a node once PPO has done two steps; what held another node until then lets go of it."""

    def wait_and_kill() -> None:
        wait_for(lambda: len(lines(folder, "ppo")) >= 2)
        if spare is not None:
            remove_placement_group(spare)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def test_workers_of_a_lost_node_are_placed_elsewhere(cluster: RayCluster, micro: Path, quiet: Result) -> None:
    other = cluster.add_node(num_cpus=3, object_store_memory=150 * 2**20)
    spare = placement_group([{"CPU": 3}])
    assert spare.wait(30)
    node = cluster.add_node(num_cpus=3, object_store_memory=150 * 2**20)
    config = load_config(micro, [*SETTINGS, "name=moved", *after_rm(quiet)])
    folder = Path(config.runs) / "moved"
    thread = lose(cluster, node, folder, spare)
    result = run_stages(config)
    thread.join()
    cluster.remove_node(other)
    assert lines(folder, "ppo") == lines(quiet.folder, "ppo")
    assert_same_model(result.models["ppo"], quiet.models["ppo"])
    assert "process node lost" in min((folder / "failures").glob("*.txt")).read_text(), "of the first failure"


def test_without_room_the_run_waits_and_stops_with_a_checkpoint(
    cluster: RayCluster, micro: Path, quiet: Result
) -> None:
    node = cluster.add_node(num_cpus=3, object_store_memory=150 * 2**20)
    config = load_config(micro, [*SETTINGS, "name=stuck", *after_rm(quiet), "recovery.node_timeout=15"])
    folder = Path(config.runs) / "stuck"
    thread = lose(cluster, node, folder)
    with pytest.raises(PlacementError, match=r"in 15 s \(recovery\.node_timeout\): .*CPU") as error:
        run_stages(config)
    thread.join()
    assert "free on the nodes" in str(error.value)
    [step] = Run.open(folder).checkpoints("ppo")
    assert step >= 1

    node = cluster.add_node(num_cpus=3, object_store_memory=150 * 2**20)
    result = run_stages(config)
    cluster.remove_node(node)
    assert lines(folder, "ppo") == lines(quiet.folder, "ppo")
    assert_same_model(result.models["ppo"], quiet.models["ppo"])


def after_rm(quiet: Result) -> list[str]:
    """Settings of a run that is PPO alone, from the quiet run's models."""
    rewards = f"ppo.rewards=[{{kind: model, path: {quiet.models['rm']}}}]"
    return [f"model.path={quiet.models['sft']}", "sft=null", "rm=null", rewards]
