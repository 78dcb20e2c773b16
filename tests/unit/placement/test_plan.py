"""Plans without a running cluster: arithmetic, placement and refusals."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.console import Console

from configs.schema import ROLES, Role, RunConfig
from placement import Cluster, Node, Plan, PlanError, make_plan, render
from placement.cluster.bin_packing import Packing, Request, place_bundles, total_resources, units
from placement.plan import time_shared
from placement.plan.time_sharing import describe
from placement.types import Stage

DATA, ADAM = {"path": "rows.jsonl"}, {"lr": 1e-4}
PPO = {"prompts": DATA, "steps": 3, "actor_optimizer": ADAM, "critic_optimizer": ADAM}
SUPERVISED = {"train": DATA, "optimizer": ADAM}


def config(ppo: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    base = {"name": "run", "model": {"path": "model"}, "sft": SUPERVISED, "rm": SUPERVISED, "ppo": PPO | (ppo or {})}
    return RunConfig.model_validate(base | settings)


def plan(cluster: str, stage: Stage = "ppo", **settings: Any) -> Plan:
    return make_plan(config(**settings), stage, Cluster.parse(cluster))


def problems(cluster: str, stage: Stage = "ppo", **settings: Any) -> dict[str, str]:
    with pytest.raises(PlanError) as refused:
        plan(cluster, stage, **settings)
    return {problem.setting: problem.text for problem in refused.value.problems}


# ---------------------------------------------------------------- clusters


@pytest.mark.parametrize(
    ("text", "count", "node"),
    [
        ("4x8xA100-80GB", 4, Node(64, 8, "A100", 80)),
        ("1x1xL4", 1, Node(8, 1, "L4", None)),
        ("2x8xH100-SXM-80GB,cpus=96,host=1TB", 2, Node(96, 8, "H100-SXM", 80, 1024)),
        ("2x16cpu", 2, Node(16)),
        ("1x2cpus, host=8GB", 1, Node(2, host_memory_gb=8)),
    ],
)
def test_a_cluster_is_read(text: str, count: int, node: Node) -> None:
    cluster = Cluster.parse(text)
    assert len(cluster.nodes) == count
    assert [each.name for each in cluster.nodes] == [f"node-{index}" for index in range(count)]
    assert cluster.nodes[0] == node


def test_assumed_cores_are_told() -> None:
    assert "assumed" in Cluster.parse("1x8xA100").note
    assert not Cluster.parse("1x8xA100,cpus=96").note
    assert not Cluster.parse("1x8cpu").note


@pytest.mark.parametrize(
    "text",
    [
        *["", "A100", "4x8", "4x8x80GB", "0x8xA100", "4x0xA100", "2x0cpu", "4x8xA100-80MB", "4x8xA100-0GB", "2x16xcpu"],
        *["-1x8xA100", "4x8xA100,host=much", "4x8xA100,cpus=0", "4x8xA100,cpus=2,cpus=3", "4x8xA100,", "1x2cpu,cpus=3"],
    ],
)
def test_nonsense_is_no_cluster(text: str) -> None:
    with pytest.raises(ValueError, match=r"^cluster "):
        Cluster.parse(text)


def test_this_machine_is_a_cluster() -> None:
    (node,) = Cluster.this_machine().nodes
    assert node.cpus >= 1
    assert node.host_memory_gb is not None
    assert node.host_memory_gb > 0.1


# ---------------------------------------------------------------- what a plan says


def test_two_cores_apart() -> None:
    result = plan("1x2cpu")
    assert {role: planned.threads for role, planned in result.roles.items()} == {
        "rollout": 2,
        "actor": 1,
        "critic": 1,
        "reference": 1,
        "reward": 1,
    }
    assert [group.bundles for group in result.groups] == [({"CPU": 0.4},)] * 5
    assert result.device == "cpu"
    assert {planned.cpus for planned in result.roles.values()} == {0.4}
    assert {planned.gpus for planned in result.roles.values()} == {0.0}


def test_two_cores_together() -> None:
    result = plan("1x2cpu", placement={"layout": "colocated"})
    assert {planned.threads for planned in result.roles.values()} == {2}
    assert [group.bundles for group in result.groups] == [({"CPU": 2.0},)]
    assert {planned.cpus for planned in result.roles.values()} == {0.4}


def test_roles_of_one_group_hold_a_gpu_by_turns_and_a_cpu_says_that_it_cannot() -> None:
    def described(cluster: str, layout: str) -> tuple[str, set[Role]]:
        result = plan(cluster, placement={"layout": layout})
        return describe(result) or "", {role for role in result.roles if time_shared(result, role)}

    assert described("1x8xA100-80GB", "separate") == ("", set())
    text, roles = described("1x8xA100-80GB", "paired")
    assert text.startswith("actor + reference; critic + reward take turns on their GPUs")
    assert roles == {"actor", "reference", "critic", "reward"}
    text, roles = described("1x2cpu", "colocated")
    assert text.startswith("actor + critic + reference + reward + rollout take turns; on CPU each keeps its memory")
    assert not roles


def test_threads_count_what_runs_at_the_same_time() -> None:
    placement = {"layout": "paired", "devices": {"actor": 2, "critic": 1, "rollout": 4}}
    threads = {role: planned.threads for role, planned in plan("1x16cpu", placement=placement).roles.items()}
    # generate: 4 engines. score and train: 2 devices of actor+reference, 1 of critic+reward.
    assert threads == {"actor": 5, "critic": 5, "reference": 5, "reward": 5, "rollout": 4}


def test_more_cores_asked_for_are_no_more_threads() -> None:
    asked = plan("1x2cpu", placement={"cpus_per_device": 0.1})
    assert asked.groups[0].bundles == ({"CPU": 0.1},)
    assert [role.threads for role in asked.roles.values()] == [role.threads for role in plan("1x2cpu").roles.values()]


def test_cores_are_divided_so_that_no_bundle_crosses_nodes() -> None:
    result = plan("2x16cpu")
    # With 32 / 5 = 6.4 the fifth bundle would not fit: 16 / 6.4 = 2.5 bundles on a node.
    assert {bundle["CPU"] for group in result.groups for bundle in group.bundles} == {5.33}


@pytest.mark.parametrize(("stage", "role"), [("sft", "actor"), ("rm", "reward")])
def test_supervised_stages_have_one_role(stage: Stage, role: Any) -> None:
    result = plan("1x4cpu", stage, placement={"layout": "colocated", "devices": {role: 2, "rollout": 3}})
    assert list(result.roles) == [role]
    (group,) = result.groups
    assert (group.roles, group.bundles) == ((role,), ({"CPU": 2.0},) * 2)
    assert result.roles[role].threads == 2
    assert result.batch.per_rank == {role: 16}


def test_a_run_without_a_critic() -> None:
    result = plan("1x2cpu", ppo={"critic": False, "advantage": "reinforce"})
    assert set(result.roles) == {"actor", "reference", "reward", "rollout"}
    paired = plan("1x2cpu", ppo={"critic": False, "advantage": "reinforce"}, placement={"layout": "paired"})
    assert [group.roles for group in paired.groups] == [("actor", "reference"), ("reward",), ("rollout",)]


def test_a100s() -> None:
    devices = {"actor": 8, "critic": 8, "reference": 4, "reward": 4, "rollout": 8}
    result = plan(
        "4x8xA100-80GB",
        placement={"devices": devices},
        rollout={"tensor_parallel": 4},
        strategy="zero3",
        ppo={"prompts_per_step": 128, "samples_per_prompt": 4, "mini_batches": 4},
    )
    rollout = result.roles["rollout"]
    assert (rollout.ranks, rollout.devices_per_rank, rollout.gpus, rollout.cpus) == (2, 4, 4.0, 4.0)
    assert result.group("rollout").bundles == ({"CPU": 4.0, "GPU": 4.0},) * 2
    assert result.group("actor").bundles == ({"CPU": 1.0, "GPU": 1.0},) * 8
    assert result.roles["actor"].strategy == "zero3"
    assert rollout.strategy is None
    assert (result.device, result.roles["actor"].ranks) == ("cuda", 8)
    assert result.batch.sequences == 512
    assert result.batch.per_rank == {"actor": 16, "critic": 16}


def test_roles_on_one_gpu_share_it() -> None:
    result = plan("1x2xA100", placement={"layout": "paired", "cpus_per_device": 2}, device="cpu")
    assert {planned.gpus for planned in result.roles.values()} == {0.0}
    result = plan("1x3xA100", placement={"layout": "paired", "cpus_per_device": 2})
    assert [result.roles[role].gpus for role in ROLES] == [0.5, 0.5, 0.5, 0.5, 1.0]
    assert [result.roles[role].cpus for role in ROLES] == [1.0, 1.0, 1.0, 1.0, 2.0]
    thirds = [{"roles": ["actor", "critic", "reference"]}, {"roles": ["reward", "rollout"]}]
    assert plan("1x3xA100", placement={"groups": thirds}).roles["actor"].gpus == 0.3333


def test_groups_of_ones_own() -> None:
    groups = [
        {"roles": ["rollout"], "devices": 4, "packing": "STRICT_SPREAD"},
        {"roles": ["critic", "actor"], "devices": 4, "packing": "STRICT_PACK"},
        {"roles": ["reference", "reward"], "devices": 2, "packing": "SPREAD"},
    ]
    result = plan("4x8xA100", placement={"groups": groups})
    rollout, train, score = result.groups
    assert len(set(rollout.nodes)) == 4
    assert len(set(score.nodes)) == 2
    assert (train.roles, set(train.nodes)) == (("actor", "critic"), set(train.nodes[:1]))
    # A stage that needs only some roles uses only their groups.
    sft = plan("4x8xA100", "sft", placement={"groups": groups})
    assert [(group.roles, len(group.bundles)) for group in sft.groups] == [(("actor",), 4)]


def test_the_hard_groups_are_laid_first() -> None:
    groups = [
        {"roles": ["actor", "critic"], "devices": 4},
        {"roles": ["reference", "reward"], "devices": 4},
        {"roles": ["rollout"], "devices": 8, "packing": "STRICT_PACK"},
    ]
    assert len(set(plan("2x8xA100", placement={"groups": groups}).group("rollout").nodes)) == 1


def test_the_plan_is_shown_and_is_json() -> None:
    result = plan("4x8xA100-80GB", ppo={"samples_per_prompt": 4, "mini_batches": 2})
    out = io.StringIO()
    Console(file=out, width=140).print(render(result))
    text = out.getvalue()
    for piece in ("4 nodes with 8 A100 80GB", "assumed", "1 engine", "1 x (1 GPU + 1 CPU)", "node-"):
        assert piece in text
    assert "64 prompts x 4 samples = 256 sequences in a step" in text
    assert "2 mini-batches of 128 sequences = 2 optimizer steps: 128 on the actor rank" in text
    said = json.loads(json.dumps(result.as_dict()))
    assert said["roles"]["actor"]["gpus"] == 1.0
    assert said["groups"][0]["bundles"] == [{"CPU": 1.0, "GPU": 1.0}]
    assert said["batch"]["prompts"] == 64


def test_a_plan_needs_no_heavy_library() -> None:
    code = "import placement, sys, time; print(time.process_time(), {'torch', 'ray', 'vllm'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = ran.stdout.split(maxsplit=1)
    assert heavy.strip() == "set()"
    assert float(seconds) < 1.0


# ---------------------------------------------------------------- refusals

TP = "rollout.tensor_parallel"
SPREAD = [
    {"roles": ["actor", "critic", "reference", "reward"], "devices": 3, "packing": "STRICT_SPREAD"},
    {"roles": ["rollout"]},
]
REST = {"roles": ["actor", "critic", "reference", "reward"]}
STRICT = [REST, {"roles": ["rollout"], "devices": 9, "packing": "STRICT_PACK"}]
TP2 = {"rollout": {"tensor_parallel": 2}}


@pytest.mark.parametrize(
    ("cluster", "settings", "setting", "says"),
    [
        ("1x2xA100", {}, "placement.layout", ["5 GPU are", "has 2", "3 missing", "layout=colocated"]),
        ("1x8xA100", {"placement": {"devices": {"actor": 8}}}, "placement.devices", ["12 GPU", "at most 4 devices"]),
        ("1x2cpu", {"device": "cuda"}, "device", ["no GPU", "cpu or auto would fit"]),
        ("1x2cpu", {"placement": {"cpus_per_device": 1}}, "placement.cpus_per_device", ["5 CPU", "has 2", "=0.4"]),
        ("1x8xA100,cpus=4", {}, "placement.cpus_per_device", ["5 CPU", "has 4", "=0.8"]),
        ("2x8xA100,cpus=64", {"placement": {"cpus_per_device": 25}},
         "placement.cpus_per_device", ["0 fit on the nodes", "=21.33"]),
        ("1x1cpu", {"placement": {"devices": {"actor": 64, "rollout": 64}}}, "placement.devices", ["at most"]),
        ("2x8cpu", {"placement": {"groups": SPREAD}, "ppo": {"prompts_per_step": 3}},
         "placement.groups.0.packing", ["2 have"]),
        ("2x8xA100", {"placement": {"groups": STRICT}},
         "placement.groups.1.packing", ["9 GPU", "8 GPU", "PACK or SPREAD instead"]),
        ("4x8xA100", {"placement": {"groups": [REST]}}, "placement.groups", ["no group holds rollout"]),
        ("4x8xA100", {"placement": {"groups": [REST, {"roles": ["rollout"]}], "devices": {"actor": 2}}},
         "placement.devices", ["overrides"]),
        ("4x8xA100", {"placement": {"devices": {"rollout": 8}}, "rollout": {"tensor_parallel": 3}}, TP, ["6 or 9"]),
        ("4x8xA100", TP2, TP, ["does not divide the 1", "2 devices"]),
        ("4x8xA100", {"placement": {"devices": {"rollout": 16}}, "rollout": {"tensor_parallel": 16}},
         TP, ["at most 8"]),
        ("1x8xA100", {"placement": {"layout": "colocated", "devices": {"rollout": 2}}} | TP2,
         TP, ["shares its devices with actor, critic, reference, reward"]),
        ("1x2cpu", {"weight_sync": {"transport": "nccl"}}, "weight_sync.transport", ["cpu", "object_store"]),
        ("1x8xA100", {"weight_sync": {"transport": "ipc"}}, "weight_sync.transport", ["in two", "nccl"]),
        ("1x8xA100", {"weight_sync": {"transport": "nccl"}, "placement": {"layout": "colocated"}},
         "weight_sync.transport", ["ipc"]),
        ("1x2cpu", {"model": {"path": "m", "lora": {}, "quantize": "4bit"}}, "model.quantize", ["GPUs only", "null"]),
        ("1x8xA100", {"model": {"path": "m", "lora": {}, "quantize": "8bit"}, "strategy": "zero3"},
         "model.quantize", ["actor, critic, reference", "zero2"]),
        ("1x2cpu", {"strategies": {"rollout": "zero3"}}, "strategies.rollout", ["not trained", "tensor_parallel"]),
        ("1x8cpu", {"ppo": {"prompts_per_step": 7, "mini_batches": 3}, "placement": {"devices": {"critic": 4}}},
         "ppo.prompts_per_step", ["7 sequences in 3 mini-batches of 2 or 3 leave some of 4 critic ranks idle", "10 or more"]),
        ("1x8cpu", {"ppo": {"prompts_per_step": 2}, "placement": {"devices": {"rollout": 4}}},
         "ppo.prompts_per_step", ["2 prompts", "4 engines", "4 or more would fit"]),
        ("1x8cpu", {"ppo": {"prompts_per_step": 2}, "placement": {"devices": {"reward": 4}}},
         "ppo.prompts_per_step", ["4 reward ranks", "4 or more would fit"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(cluster: str, settings: dict[str, Any], setting: str, says: list[str]) -> None:
    refused = problems(cluster, **settings)
    assert list(refused) == [setting]
    for piece in says:
        assert piece in refused[setting]


@pytest.mark.parametrize(("stage", "role", "what"), [("sft", "actor", "rows"), ("rm", "reward", "pairs")])
def test_a_supervised_batch_has_a_row_for_each_rank(stage: Stage, role: str, what: str) -> None:
    result = plan("1x8cpu", stage, placement={"devices": {role: 5}})
    assert result.batch.description == (f"32 {what} in an optimizer step: 6 or 7 on each of 5 {role} ranks",)
    assert result.batch.per_rank == {role: 7}
    few = {"train": {"path": "rows.jsonl"}, "batch_size": 4, "optimizer": {"lr": 1e-4}}
    refused = problems("1x8cpu", stage, placement={"devices": {role: 5}}, **{stage: few})
    assert refused == {
        f"{stage}.batch_size": f"4 {what} in an optimizer step leave some of 5 {role} ranks idle; 5 or more would fit"
    }


def test_what_does_not_divide_is_shared_out_all_the_same() -> None:
    ppo = {
        "prompts_per_step": 7,
        "samples_per_prompt": 3,
        "mini_batches": 4,
        "ptx": {"coefficient": 1, "batch_size": 5},
    }
    result = plan("1x16cpu", ppo=ppo, placement={"devices": {"actor": 2, "critic": 3, "reference": 4, "reward": 5}})
    assert result.batch.description == (
        "7 prompts x 3 samples = 21 sequences in a step",
        "generate: 7 prompts over 1 engine, balanced by outstanding tokens",
        "score: 21 sequences over 4 reference ranks, 3 critic ranks, 5 reward ranks, balanced by tokens",
        "train: 1 epoch x 4 mini-batches of 5 or 6 sequences = 4 optimizer steps: 2 or 3 on each of 2 actor ranks, "
        "1 or 2 on each of 3 critic ranks",
    )
    assert result.batch.per_rank == {"actor": 3, "critic": 2}
    one = plan("1x8cpu", ppo={"prompts_per_step": 3, "mini_batches": 3})
    assert "3 mini-batches of 1 sequence = 3 optimizer steps: 1 on the actor rank" in one.batch.description[-1]


def test_a_stage_without_settings() -> None:
    assert list(problems("1x8cpu", "sft", sft=None)) == ["sft"]


def test_a_stage_whose_role_is_in_no_group() -> None:
    assert list(problems("1x8cpu", "rm", placement={"groups": [{"roles": ["actor"]}]})) == ["placement.groups"]


def test_all_problems_at_once() -> None:
    refused = problems(
        "4x8xA100",
        placement={"devices": {"actor": 16, "critic": 16, "rollout": 8}},
        rollout={"tensor_parallel": 3},
        weight_sync={"transport": "ipc"},
        strategies={"rollout": "zero1"},
        ppo={"prompts_per_step": 7},
    )
    assert set(refused) == {
        "rollout.tensor_parallel",
        "weight_sync.transport",
        "strategies.rollout",
        "ppo.prompts_per_step",
        "placement.devices",
    }


def test_the_message_lists_each_problem_on_a_line() -> None:
    with pytest.raises(PlanError) as refused:
        plan("1x2cpu", device="cuda", strategies={"rollout": "zero1"})
    first, *lines = str(refused.value).splitlines()
    assert first == "stage ppo cannot be placed:"
    assert [line.split(":")[0] for line in lines] == ["  strategies.rollout", "  device"]


@pytest.mark.parametrize(
    ("prompts", "samples", "mini", "devices"),
    [(3, 1, 1, {"actor": 4}), (2, 3, 2, {"actor": 4, "critic": 3}), (5, 2, 5, {"actor": 4, "rollout": 9}),
     (3, 1, 3, {"reward": 7}), (1, 1, 1, {"rollout": 2, "critic": 3}), (1, 4, 2, {"reference": 9})],
)  # fmt: skip
def test_the_prompts_that_would_fit_do_and_fewer_do_not(
    prompts: int, samples: int, mini: int, devices: dict[str, int]
) -> None:
    def ppo(count: int) -> dict[str, int]:
        return {"prompts_per_step": count, "samples_per_prompt": samples, "mini_batches": mini}

    def fits(count: int) -> bool:
        try:
            plan("1x32cpu", ppo=ppo(count), placement={"devices": devices})
        except PlanError:
            return False
        return True

    text = problems("1x32cpu", ppo=ppo(prompts), placement={"devices": devices})["ppo.prompts_per_step"]
    said = re.search(r"; (\d+) or more would fit", text)
    assert said
    assert [count for count in range(prompts, int(said[1]) + 20) if fits(count)][:2] == [int(said[1]), int(said[1]) + 1]


# ---------------------------------------------------------------- properties

PACKINGS: st.SearchStrategy[Packing] = st.sampled_from(["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"])


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    gpus = draw(st.booleans())
    nodes = draw(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 8)), min_size=1, max_size=4))
    return Cluster(
        tuple(Node(cpus, count if gpus else 0, name=f"node-{index}") for index, (cpus, count) in enumerate(nodes))
    )


@st.composite
def partitions(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Each role in one of up to five groups; sometimes a role is missing."""
    where = draw(st.lists(st.integers(0, 5), min_size=5, max_size=5))
    named = [[role for role, group in zip(ROLES, where, strict=True) if group == index] for index in range(1, 6)]
    return [
        {"roles": roles, "devices": draw(st.integers(1, 6)), "packing": draw(PACKINGS)} for roles in named if roles
    ] or [{"roles": ["actor"]}]


PLACEMENTS = st.fixed_dictionaries(
    {},
    optional={
        "layout": st.sampled_from(["separate", "paired", "colocated"]),
        "devices": st.dictionaries(st.sampled_from(ROLES), st.integers(1, 8), max_size=3),
        "groups": partitions(),
        "cpus_per_device": st.sampled_from([0.25, 1.0, 3.0]),
    },
)
SETTINGS = st.fixed_dictionaries(
    {
        "placement": PLACEMENTS,
        "rollout": st.sampled_from([{}, {}, {"tensor_parallel": 2}, {"tensor_parallel": 4}]),
        "ppo": st.fixed_dictionaries(
            {
                "prompts_per_step": st.sampled_from([4, 7, 24, 60, 64]),
                "samples_per_prompt": st.sampled_from([1, 4]),
                "mini_batches": st.sampled_from([1, 2, 4]),
                "critic": st.booleans(),
                "advantage": st.just("reinforce"),
            }
        ),
    }
)


def outcome(asked: RunConfig, cluster: Cluster) -> Plan | PlanError:
    try:
        return make_plan(asked, "ppo", cluster)
    except PlanError as refused:
        return refused


def is_setting(path: str) -> bool:
    """Whether a dotted path leads to a setting of the schema."""

    def models(annotation: Any) -> list[Any]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [model for part in get_args(annotation) for model in models(part)]

    places: list[Any] = [RunConfig]
    for part in path.split("."):
        fields = [model.model_fields[part] for model in places if part in model.model_fields]
        if not fields and (part.isdigit() or part in ROLES):
            continue
        if not fields:
            return False
        places = [model for field in fields for model in models(field.annotation)]
    return True


def check_accepted(result: Plan, asked: RunConfig) -> None:
    """The groups partition the roles, every bundle fits, and policies and shares are respected."""
    assert sorted(role for group in result.groups for role in group.roles) == sorted(result.roles)
    free = {node.name: units({"CPU": node.cpus, "GPU": node.gpus}) for node in result.cluster.nodes}
    for group in result.groups:
        assert len(group.nodes) == len(group.bundles)
        for name, bundle in zip(group.nodes, group.bundles, strict=True):
            for kind, size in units(bundle).items():
                free[name][kind] -= size
        assert len(set(group.nodes)) == 1 or group.packing != "STRICT_PACK"
        assert len(set(group.nodes)) == len(group.nodes) or group.packing != "STRICT_SPREAD"
    assert all(left >= 0 for node in free.values() for left in node.values())
    for group in result.groups:
        workers = [result.roles[role] for role in group.roles]
        for kind, shares in (("CPU", [each.cpus for each in workers]), ("GPU", [each.gpus for each in workers])):
            total, whole = sum(round(10_000 * share) for share in shares), round(10_000 * group.bundles[0].get(kind, 0))
            assert whole - len(shares) < total <= whole
    assert all(planned.threads >= 1 for planned in result.roles.values())
    for role, rows in result.batch.per_rank.items():
        parts = result.roles[role].ranks * result.batch.mini_batches
        assert rows == math.ceil(result.batch.sequences / parts)
        assert result.roles[role].ranks <= math.ceil(result.batch.sequences / result.batch.mini_batches), "none is idle"
    assert result.roles["rollout"].ranks * asked.rollout.tensor_parallel == sum(
        len(group.bundles) * group.devices_per_bundle for group in result.groups if "rollout" in group.roles
    )


@settings(max_examples=300, deadline=None)
@given(SETTINGS, clusters())
def test_a_plan_fits_or_names_settings(asked: dict[str, Any], cluster: Cluster) -> None:
    checked = config(**asked)
    result = outcome(checked, cluster)
    if isinstance(result, Plan):
        check_accepted(result, checked)
    else:
        assert result.problems
        assert [problem.setting for problem in result.problems if not is_setting(problem.setting)] == []


@settings(max_examples=300, deadline=None)
@given(SETTINGS, clusters())
def test_what_would_fit_does(asked: dict[str, Any], cluster: Cluster) -> None:
    refused = outcome(config(**asked), cluster)
    for name, value in re.findall(r"placement\.(layout|cpus_per_device)=([\w.]+)", str(refused)):
        change = {name: value if name == "layout" else float(value)}
        idle = outcome(config(**asked | {"placement": asked["placement"] | change}), cluster)
        if isinstance(idle, PlanError):  # refused for a reason other than free resources
            assert not re.search("missing|does not fit", str(idle))


@settings(max_examples=300, deadline=None)
@given(clusters(), st.sampled_from([{"CPU": 0.4}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 2.0}]), st.data())
def test_one_group_is_laid_wherever_it_can_be(cluster: Cluster, bundle: dict[str, float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    packing = data.draw(PACKINGS)
    holds = [
        min(int(round(node.cpus / bundle["CPU"], 6)), int(node.gpus // bundle.get("GPU", 1)) if "GPU" in bundle else 99)
        for node in cluster.nodes
    ]
    possible = {
        "PACK": sum(holds) >= count,
        "SPREAD": sum(holds) >= count,
        "STRICT_PACK": max(holds) >= count,
        "STRICT_SPREAD": sum(hold > 0 for hold in holds) >= count,
    }
    free = total_resources(cluster)
    assert (place_bundles(Request(bundle, count, packing), free) is not None) == possible[packing]
    if not possible[packing]:
        assert free == total_resources(cluster)
