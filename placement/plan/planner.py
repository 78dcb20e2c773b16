"""The plan of a stage: role -> group -> bundles -> nodes, made before anything starts. Refuses what does not fit, with a fix.

Input: the settings, a cluster's description and the policy's config.json. Needs neither Ray nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from configs import ZERO
from configs.schema import Role, RunConfig
from placement.cluster.spec import Cluster
from placement.models.architecture import Architecture
from placement.models.shapes import NO_MODELS, longest_row, min_kv_cache, model_settings
from placement.plan.batch import plan_batch
from placement.plan.fit import Assignment, ClusterFit, floor_to
from placement.plan.layout import GroupSpec, needs_gpu, partition, roles_by_process, roles_of, strategy_in, with_engines
from placement.stages import STAGES
from placement.types import GIB, Device, GroupPlan, Plan, PlanError, Problem, RolePlan, Stage


def make_plan(config: RunConfig, stage: Stage, cluster: Cluster, reused: Mapping[Stage, Path] = NO_MODELS) -> Plan:
    """Place a stage's roles on a cluster. reused: see read_shapes.

    Raises:
        PlanError: the stage cannot be placed; lists every reason with its setting and what would fit.
    """
    if config.section(stage) is None:
        raise PlanError(stage, [Problem(stage, f"the stage has no settings; give it a section `{stage}:`")])
    roles = roles_of(config, stage)
    processes = tuple(roles_by_process(config, roles))
    specs, problems = partition(config.placement, roles, processes)
    specs = [replace(spec, needs_gpu=needs_gpu(spec, stage, config)) for spec in specs]
    problems += _sharing_problems(config, stage, processes)
    if not specs:
        raise PlanError(stage, problems)
    device: Device = config.device if config.device != "auto" else "cuda" if cluster.gpus else "cpu"
    problems += _quantize_problems(config, stage, device)
    if "rollout" in roles:
        problems += _engine_problems(config, specs, device, cluster) + _publish_problems(config, specs, device)
        problems += _cache_problems(config, device, reused)
        if not any(problem.setting == "rollout.tensor_parallel" for problem in problems):
            specs = with_engines(specs, config.rollout.tensor_parallel)
    batch, uneven = plan_batch(config, stage, {role: spec.ranks(role) for spec in specs for role in spec.roles})
    problems += uneven
    if device == "cuda" and not cluster.gpus:
        problems.append(Problem("device", "cuda, but the cluster has no GPU; cpu or auto would fit"))
        raise PlanError(stage, problems)
    fit = ClusterFit(cluster, device, config.placement, roles, processes)
    assignment = fit.assign(specs)
    if assignment is None:
        problems += fit.problems(specs)
    if problems or assignment is None:
        raise PlanError(stage, problems)
    groups = tuple(
        _group(spec, device, nodes, assignment, cluster) for spec, nodes in zip(specs, assignment.nodes, strict=True)
    )
    planned = {
        role: _role(role, process_roles, config, stage, specs, assignment, device, cluster)
        for process_roles in processes
        for role in process_roles
    }
    planned = {role: planned[role] for role in roles}
    return Plan(stage, device, cluster, groups, planned, batch)


def _group(
    spec: GroupSpec, device: Device, nodes: tuple[int, ...], assignment: Assignment, cluster: Cluster
) -> GroupPlan:
    request = spec.request(device, assignment.cpus_per_device)
    names = tuple(cluster.nodes[index].name for index in nodes)
    bundles = tuple(dict(request.bundle) for _ in range(request.count))
    return GroupPlan(spec.name, spec.roles, bundles, spec.packing, names, spec.devices_per_bundle)


def _role(
    role: Role,
    process_roles: tuple[Role, ...],
    config: RunConfig,
    stage: Stage,
    specs: Sequence[GroupSpec],
    assignment: Assignment,
    device: Device,
    cluster: Cluster,
) -> RolePlan:
    spec = next(spec for spec in specs if role in spec.roles)
    bundle = spec.request(device, assignment.cpus_per_device).bundle
    return RolePlan(
        role,
        spec.name,
        ranks=spec.ranks(role),
        devices_per_rank=spec.tensor_parallel if role == "rollout" else 1,
        threads=min(_threads(member, stage, specs, assignment, cluster) for member in process_roles),
        cpus=floor_to(bundle["CPU"] / len(spec.roles), 4),
        gpus=floor_to(bundle.get("GPU", 0.0) / len(spec.roles), 4),
        strategy=strategy_in(stage, role, config),
        process_roles=process_roles,
    )


def _threads(role: Role, stage: Stage, specs: Sequence[GroupSpec], assignment: Assignment, cluster: Cluster) -> int:
    """A node's cores divided by the devices busy on it in the role's busiest phase; the minimum over the role's nodes.

    Roles of one group take turns on its devices, so each device counts once.
    """
    placed = list(zip(specs, assignment.nodes, strict=True))
    role_nodes = next(nodes for spec, nodes in placed if role in spec.roles)
    phases = [set(phase) for phase in STAGES[stage].concurrent if role in phase]

    def busy(node: int, phase: set[Role]) -> int:
        return sum(nodes.count(node) * spec.devices_per_bundle for spec, nodes in placed if phase & set(spec.roles))

    return min(
        max(1, int(cluster.nodes[node].cpus / max(busy(node, phase) for phase in phases))) for node in set(role_nodes)
    )


def _sharing_problems(config: RunConfig, stage: Stage, processes: Sequence[tuple[Role, ...]]) -> list[Problem]:
    """Roles of one process whose strategy shards the base that they share."""
    problems = []
    for role in (role for process_roles in processes if len(process_roles) > 1 for role in process_roles):
        strategy = strategy_in(stage, role, config)
        if strategy and ZERO[strategy].stage == 3:
            setting = f"strategies.{role}" if role in config.strategies else "strategy"
            text = f"{strategy} shards the parameters of {role}, but `shared_base` needs them whole; "
            problems.append(Problem(setting, text + "zero2, zero1 or ddp would fit"))
    return problems


def _engine_problems(config: RunConfig, specs: Sequence[GroupSpec], device: Device, cluster: Cluster) -> list[Problem]:
    """Why engines cannot use the devices of their group."""
    setting, size = "rollout.tensor_parallel", config.rollout.tensor_parallel
    problems = []
    if "rollout" in config.strategies:
        text = "engines are not trained and have no strategy; rollout.tensor_parallel shards them"
        problems.append(Problem("strategies.rollout", text))
    spec = next((spec for spec in specs if "rollout" in spec.roles), None)
    if spec is None or size == 1:
        return problems
    if spec.devices % size:
        below, above = spec.devices // size * size, -(-spec.devices // size) * size
        text = f"{size} does not divide the {spec.devices} devices of group {spec.name}; "
        fits = " or ".join(str(fit) for fit in (below, above) if fit)
        problems.append(Problem(setting, f"{text}{spec.setting} with {fits} devices would fit"))
    if device == "cuda" and len(spec.roles) > 1:
        others = ", ".join(role for role in spec.roles if role != "rollout")
        text = f"{size}, but rollout shares its devices with {others}; an engine on several GPUs needs its own group "
        text += "(placement.layout separate or paired); 1 would fit here"
        problems.append(Problem(setting, text))
    most = max(node.gpus for node in cluster.nodes)
    if device == "cuda" and most < size:
        text = f"{size}, but an engine must be on one node, and no node has more than {most} GPUs; "
        text += f"at most {most} would fit"
        problems.append(Problem(setting, text))
    return problems


def _cache_problems(config: RunConfig, device: Device, reused: Mapping[Stage, Path]) -> list[Problem]:
    """A key-value cache that is smaller than one sequence, where a setting gives its size (on CPU) and the policy's shape is
    known."""
    if device == "cuda" or config.model.dtype == "auto":
        return []
    try:
        policy = Architecture.of(reused.get("sft", config.model.path))
    except ValueError:
        return []
    size = config.rollout.kv_cache_gib
    needed = min_kv_cache(config, policy, device) / config.rollout.tensor_parallel / GIB
    if size >= needed:
        return []
    text = f"{size:g}, but one sequence of {longest_row(config, 'ppo')} tokens (ppo.max_prompt_tokens + rollout.max_new_tokens)"
    return [Problem("rollout.kv_cache_gib", f"{text} needs {_rounded_up(needed):g} GiB for its keys and values")]


def _rounded_up(value: float) -> float:
    """Rounded up to three significant digits."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / scale) * scale


def _quantize_problems(config: RunConfig, stage: Stage, device: Device) -> list[Problem]:
    """bitsandbytes runs on GPUs only, and ZeRO-3 cannot shard its quantized weights."""
    prefix = "rm.model" if stage == "rm" and config.rm and config.rm.model else "model"
    model = model_settings(config, stage)
    if not model.quantize:
        return []
    problems = []
    if device == "cpu":
        text = f"{model.quantize} works on GPUs only, but this run's device is cpu; null would fit"
        problems.append(Problem(f"{prefix}.quantize", text))
    sharded = [role for role in roles_of(config, stage) if (strategy_in(stage, role, config) or "").startswith("zero3")]
    if sharded:
        text = f"{model.quantize}, but zero3 cannot shard the quantized weights of {', '.join(sharded)}; "
        problems.append(Problem(f"{prefix}.quantize", f"{text}another strategy would fit (ddp, zero1, zero2)"))
    return problems


def _publish_problems(config: RunConfig, specs: Sequence[GroupSpec], device: Device) -> list[Problem]:
    """Transports that cannot work: NCCL refuses two ranks on one GPU; CUDA IPC reaches processes on the same GPU only."""
    transport = config.weight_sync.transport
    shared = any({"actor", "rollout"} <= set(spec.roles) for spec in specs)
    if transport in ("nccl", "ipc") and device == "cpu":
        text = f"{transport} works between GPUs only, but this run's device is cpu; object_store or auto would fit"
    elif transport == "ipc" and not shared:
        text = "ipc needs actor and rollout in one group, but they are in two; nccl, object_store or auto would fit"
    elif transport == "nccl" and shared:
        text = (
            "nccl needs actor and rollout on different GPUs, but they share them; ipc, object_store or auto would fit"
        )
    else:
        return []
    return [Problem("weight_sync.transport", text)]
