"""Placement groups on a real Ray cluster of four nodes on this machine, each with eight GPUs that it only claims."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.schema import ROLES, Role, RunConfig
from placement import Cluster, Plan, PlanError, make_plan
from placement.plan.placement_groups import PlacementError, bundle_of, create_groups, remove_groups
from tests.support.nodes import simulated_cluster

pytestmark = pytest.mark.slow

NODES, GPUS, CPUS = 4, 8, 8
DATA, ADAM = {"path": "rows.jsonl"}, {"lr": 1e-4}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    node: dict[str, Any] = {"num_cpus": CPUS, "num_gpus": GPUS, "object_store_memory": 80 * 2**20}
    with simulated_cluster(node | {"_system_config": {"enable_worker_prestart": False}}) as started:
        for _ in range(NODES - 1):
            started.add_node(**node)
        yield Cluster.of_ray()


@pytest.fixture(autouse=True)
def _free(cluster: Cluster) -> Iterator[None]:
    """Wait until the workers of a removed group have ended."""
    yield
    wait_until_free(NODES * GPUS)


def plan(cluster: Cluster, placement: dict[str, Any], **settings: Any) -> Plan:
    ppo = {"prompts": DATA, "steps": 1, "actor_optimizer": ADAM, "critic_optimizer": ADAM}
    base = {"name": "run", "model": {"path": "model"}, "ppo": ppo, "placement": placement}
    return make_plan(RunConfig.model_validate(base | settings), "ppo", cluster)


class Reservation:
    """A plan's groups while a test runs."""

    def __init__(self, plan: Plan, timeout: float = 30.0) -> None:
        self.plan, self.timeout = plan, timeout

    def __enter__(self) -> dict[str, PlacementGroup]:
        self.groups = create_groups(self.plan, "run", self.timeout)
        return self.groups

    def __exit__(self, *_: object) -> None:
        remove_groups(self.groups)


class Worker:
    def where(self) -> tuple[str, tuple[int, ...]]:
        """Its node, and the GPUs that Ray gave it."""
        return ray.get_runtime_context().get_node_id(), tuple(sorted(ray.get_gpu_ids()))


def start(plan: Plan, groups: dict[str, PlacementGroup], role: Role, rank: int) -> ActorHandle:
    group, bundle = bundle_of(plan, role, rank)
    strategy = PlacementGroupSchedulingStrategy(groups[group], placement_group_bundle_index=bundle)
    planned = plan.roles[role]
    return (
        ray.remote(Worker).options(num_cpus=planned.cpus, num_gpus=planned.gpus, scheduling_strategy=strategy).remote()
    )


def where(plan: Plan, groups: dict[str, PlacementGroup], *roles: Role) -> dict[Role, list[tuple[str, tuple[int, ...]]]]:
    """Where each rank of the roles really runs."""
    actors = {role: [start(plan, groups, role, rank) for rank in range(plan.roles[role].ranks)] for role in roles}
    return {role: ray.get([actor.where.remote() for actor in ranks], timeout=60) for role, ranks in actors.items()}


def nodes_of(group: PlacementGroup) -> list[str]:
    return list(placement_group_table(group)["bundles_to_node_id"].values())


def wait_until_free(gpus: float) -> None:
    deadline = time.monotonic() + 20
    while ray.available_resources().get("GPU", 0.0) != gpus:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def test_the_cluster_is_seen(cluster: Cluster) -> None:
    assert [(node.cpus, node.gpus) for node in cluster.nodes] == [(CPUS, GPUS)] * NODES
    assert len({node.name for node in cluster.nodes}) == NODES
    assert all(node.host_memory_gb for node in cluster.nodes)


@pytest.mark.parametrize(
    "placement",
    [
        {"devices": dict.fromkeys(ROLES, 4)},
        {"devices": {"actor": 8, "critic": 8, "reference": 4, "reward": 4, "rollout": 8}},
        {"layout": "paired", "devices": {"actor": 16, "critic": 8, "rollout": 8}},
        {"layout": "colocated", "devices": {"actor": 32}},
        {"layout": "colocated", "devices": {"actor": 16}},
    ],
)
def test_groups_lie_as_planned(cluster: Cluster, placement: dict[str, Any]) -> None:
    result = plan(cluster, placement)
    with Reservation(result) as groups:
        assert [placement_group_table(group)["name"] for group in groups.values()] == [
            f"run-{group.name}" for group in result.groups
        ]
        for group in result.groups:
            lies = Counter(nodes_of(groups[group.name]))
            assert sorted(lies.values()) == sorted(Counter(group.nodes).values())
            assert groups[group.name].bundle_specs == list(group.bundles)
        asked = sum(bundle["GPU"] for group in result.groups for bundle in group.bundles)
        wait_until_free(NODES * GPUS - asked)


def test_workers_of_a_shared_group_share_its_gpus(cluster: Cluster) -> None:
    result = plan(cluster, {"layout": "paired", "devices": {"actor": 2}})
    with Reservation(result) as groups:
        places = where(result, groups, "actor", "reference")
    for rank in range(2):
        assert places["actor"][rank] == places["reference"][rank]
    node_of, gpus_of = zip(*places["actor"], strict=True)
    assert len(set(node_of)) == 1
    assert gpus_of[0] != gpus_of[1]


def test_an_engine_lies_on_one_node(cluster: Cluster) -> None:
    placement = {"devices": {"rollout": 12, "actor": 4, "critic": 4, "reference": 4}}
    result = plan(cluster, placement, rollout={"tensor_parallel": 4})
    with Reservation(result) as groups:
        engines = where(result, groups, "rollout")["rollout"]
    assert len(engines) == 3
    assert all(len(gpus) == 4 for _, gpus in engines)
    assert len({(node, gpu) for node, gpus in engines for gpu in gpus}) == 12


def test_strict_spread_takes_as_many_nodes(cluster: Cluster) -> None:
    groups = [
        {"roles": ["actor"], "devices": 4, "packing": "STRICT_SPREAD"},
        {"roles": ["critic", "reference", "reward"], "devices": 8, "packing": "SPREAD"},
        {"roles": ["rollout"], "devices": 6, "packing": "STRICT_PACK"},
    ]
    result = plan(cluster, {"groups": groups})
    with Reservation(result) as reserved:
        actors = where(result, reserved, "actor")["actor"]
        assert len({node for node, _ in actors}) == 4
        assert len(set(nodes_of(reserved["critic+reference+reward"]))) > 1  # SPREAD is best effort in Ray
        assert len(set(nodes_of(reserved["rollout"]))) == 1


def drawn(draw: random.Random) -> list[dict[str, Any]]:
    """The roles in up to five groups, tight on 32 GPUs."""
    where = [draw.randrange(5) for _ in ROLES]
    return [
        {
            "roles": roles,
            "devices": draw.choice([1, 2, 4, 4, 6, 8, 8, 12, 16]),
            "packing": draw.choice(["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]),
        }
        for index in range(5)
        if (roles := [role for role, group in zip(ROLES, where, strict=True) if group == index])
    ]


def test_ray_grants_what_the_plan_accepts(cluster: Cluster) -> None:
    draw, accepted = random.Random(1), 0
    while accepted < 20:
        ppo = {"prompts": DATA, "steps": 1, "prompts_per_step": 48, "actor_optimizer": ADAM, "critic_optimizer": ADAM}
        try:
            result = plan(cluster, {"groups": drawn(draw)}, ppo=ppo)
        except PlanError:
            continue
        with Reservation(result):
            accepted += 1
        wait_until_free(NODES * GPUS)


def test_groups_are_laid_anew_when_room_comes_late(cluster: Cluster) -> None:
    groups = [
        {"roles": ["actor", "critic"], "devices": 8, "packing": "STRICT_PACK"},
        {"roles": ["reference", "reward"], "devices": 8, "packing": "SPREAD"},
        {"roles": ["rollout"], "devices": 8},
    ]
    result = plan(cluster, {"groups": groups})
    others = placement_group([{"GPU": 1.0}] * NODES, strategy="STRICT_SPREAD")
    assert others.wait(30)
    wait_until_free(NODES * (GPUS - 1))
    leave = threading.Timer(2.0, remove_placement_group, [others])
    leave.start()
    # By then the spread group is on every node, and no node has the 8 GPUs that the first group needs.
    with Reservation(result, timeout=60.0) as reserved:
        assert len(set(nodes_of(reserved["actor+critic"]))) == 1
    leave.join()


def test_a_group_that_cannot_be_had_says_what_is_missing(cluster: Cluster) -> None:
    result = plan(cluster, {"devices": {"actor": 8, "rollout": 2}, "groups": None})
    others = placement_group([{"GPU": 8.0}] * 3, name="job1-actor")
    assert others.wait(30)
    wait_until_free(8)
    started = time.monotonic()
    try:
        with pytest.raises(PlacementError) as refused:
            create_groups(result, "late", timeout=3.0)
    finally:
        remove_placement_group(others)
    assert time.monotonic() - started < 10
    text = str(refused.value)
    # actor (8) is requested first and fills the last free node; rollout comes after it.
    assert text.startswith(
        "placement group late-rollout could not be reserved within 3 s (placement.timeout): 2 x (1 GPU + 1 CPU), PACK"
    )
    assert "; GPU is short: 2 requested, 0 available, 2 missing\n" in text
    assert "\n24 GPU are held by job1\n" in text
    assert (
        "set a longer placement.timeout to wait for free resources, or fewer placement.devices or a smaller "
        "placement.cpus_per_device" in text
    )
    assert "of which late-actor would take a part:" in text
    assert text.count("free 0 of 8 GPU") == NODES - 1
    assert not any(entry["name"].startswith("late-") for entry in placement_group_table().values()), (
        "no group was requested"
    )


def test_who_waits_holds_nothing_and_says_who_does(cluster: Cluster) -> None:
    result = plan(cluster, {"devices": {"actor": 8, "critic": 4, "rollout": 8}})
    others = placement_group([{"GPU": 8.0, "CPU": 4.0}] * 2 + [{"GPU": 1.0}], name="job1-actor+critic")
    assert others.wait(30)
    actor = ray.remote(Worker).options(num_cpus=2).remote()
    ray.get(actor.where.remote(), timeout=60)
    reports: list[str] = []
    held: list[float] = []
    leave = threading.Timer(6.0, remove_placement_group, [others])

    def report(line: str) -> None:
        reports.append(line)
        held.append(NODES * GPUS - ray.available_resources()["GPU"])
        leave.start()

    groups = create_groups(result, "run", 60.0, report)
    remove_groups(groups)
    ray.kill(actor)
    leave.join()
    assert reports == [
        "waiting for free resources: 2 CPU are held by actors and tasks without a placement group, "
        "17 GPU + 8 CPU are held by job1"
    ]
    assert held == [17.0]


def test_jobs_that_fit_one_at_a_time_all_get_through(cluster: Cluster) -> None:
    """Each job needs 20 of 32 GPUs in five groups and releases them soon; all start together, several times. A state in which
    each job holds a part and all wait must not last."""
    result = plan(cluster, {"devices": dict.fromkeys(ROLES, 4)})
    begin = threading.Barrier(3, timeout=120)
    errors: list[Exception] = []

    def job(name: str) -> None:
        try:
            for _ in range(3):
                begin.wait()
                groups = create_groups(result, name, timeout=30.0)
                time.sleep(0.5)
                remove_groups(groups)
        except Exception as error:
            errors.append(error)
            begin.abort()

    jobs = [threading.Thread(target=job, args=[name]) for name in ("job1", "job2", "job3")]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert errors == []


def test_a_node_that_is_missing_is_named(cluster: Cluster) -> None:
    result = plan(cluster, {"groups": [{"roles": list(ROLES), "devices": 8, "packing": "STRICT_PACK"}]})
    others = placement_group([{"GPU": 1.0}] * NODES, strategy="STRICT_SPREAD")
    assert others.wait(30)
    wait_until_free(NODES * (GPUS - 1))
    try:
        with pytest.raises(PlacementError, match="the largest node has 7 GPU"):
            create_groups(result, "run", timeout=2.0)
    finally:
        remove_placement_group(others)


def test_a_name_that_is_taken_is_refused_and_nothing_stays(cluster: Cluster) -> None:
    result = plan(cluster, {})
    with Reservation(result):
        with pytest.raises(PlacementError, match="already exists"):
            create_groups(result, "run", timeout=5.0)
        wait_until_free(NODES * GPUS - len(ROLES))
    with Reservation(result):  # the names are free again at once
        pass


def test_ranks_find_their_bundles(cluster: Cluster) -> None:
    result = plan(cluster, {"devices": {"rollout": 4, "actor": 2}}, rollout={"tensor_parallel": 2})
    assert [bundle_of(result, "rollout", rank) for rank in range(2)] == [("rollout", 0), ("rollout", 1)]
    assert bundle_of(result, "actor", 1) == ("actor", 1)
    with pytest.raises(IndexError, match="actor has ranks 0 to 1, not 2"):
        bundle_of(result, "actor", 2)
    shared = {"layout": "colocated", "devices": {"actor": 4}}
    on_cpu = plan(cluster, shared, rollout={"tensor_parallel": 2}, device="cpu")
    assert [bundle_of(on_cpu, "rollout", rank)[1] for rank in range(2)] == [0, 2]
