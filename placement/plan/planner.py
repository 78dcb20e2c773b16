"""The plan of a stage: role -> group -> bundles -> nodes, made before anything starts. It fits or says what would.

It takes settings and a cluster's description, reads the policy's config.json, and touches neither Ray nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.schema import Role, RunConfig
from configs.zero import ZERO
from placement.cluster.spec import Cluster
from placement.models.architecture import Architecture
from placement.models.shapes import NOTHING, least_cache, longest_row
from placement.plan.batch import plan_batch
from placement.plan.fit import Assignment, ClusterFit, floor_to
from placement.plan.layout import GroupSpec, partition, roles_by_process, roles_of, strategy_in, with_engines
from placement.types import GIB, PHASES, Device, GroupPlan, Plan, PlanError, Problem, RolePlan, Stage


def make_plan(config: RunConfig, stage: Stage, cluster: Cluster, taken: Mapping[Stage, Path] = NOTHING) -> Plan:
    """Place a stage's roles on a cluster. taken: see read_shapes.

    Raises:
        PlanError: the stage cannot be placed; lists every reason with its setting and what would fit.
    """
    if getattr(config, stage) is None:
        raise PlanError(stage, [Problem(stage, f"the stage has no settings; give it a section `{stage}:`")])
    roles = roles_of(config, stage)
    processes = tuple(roles_by_process(config, roles))
    shares, problems = partition(config.placement, roles, processes)
    problems += _sharing_problems(config, stage, processes)
    if not shares:
        raise PlanError(stage, problems)
    device: Device = config.device if config.device != "auto" else "cuda" if cluster.gpus else "cpu"
    problems += _quantize_problems(config, stage, device)
    if stage == "ppo":
        problems += _engine_problems(config, shares, device, cluster) + _publish_problems(config, shares, device)
        problems += _cache_problems(config, device, taken)
        if not any(problem.setting == "rollout.tensor_parallel" for problem in problems):
            shares = with_engines(shares, config.rollout.tensor_parallel)
    batch, uneven = plan_batch(config, stage, {role: share.ranks(role) for share in shares for role in share.roles})
    problems += uneven
    if device == "cuda" and not cluster.gpus:
        problems.append(Problem("device", "cuda, but the cluster has no GPU; cpu or auto would fit"))
        raise PlanError(stage, problems)
    site = ClusterFit(cluster, device, config.placement, roles, processes)
    laid = site.lay(shares)
    if laid is None:
        problems += site.misfits(shares)
    if problems or laid is None:
        raise PlanError(stage, problems)
    groups = tuple(_group(share, device, nodes, laid, cluster) for share, nodes in zip(shares, laid.nodes, strict=True))
    planned = {
        role: _role(role, process_roles, config, stage, shares, laid, device, cluster)
        for process_roles in processes
        for role in process_roles
    }
    planned = {role: planned[role] for role in roles}
    return Plan(stage, device, cluster, groups, planned, batch)


def _group(share: GroupSpec, device: Device, nodes: tuple[int, ...], laid: Assignment, cluster: Cluster) -> GroupPlan:
    request = share.request(device, laid.cpus_per_device)
    names = tuple(cluster.nodes[index].name for index in nodes)
    bundles = tuple(dict(request.bundle) for _ in range(request.count))
    return GroupPlan(share.name, share.roles, bundles, share.packing, names, share.devices_per_bundle)


def _role(
    role: Role,
    process_roles: tuple[Role, ...],
    config: RunConfig,
    stage: Stage,
    shares: Sequence[GroupSpec],
    laid: Assignment,
    device: Device,
    cluster: Cluster,
) -> RolePlan:
    share = next(share for share in shares if role in share.roles)
    bundle = share.request(device, laid.cpus_per_device).bundle
    return RolePlan(
        role,
        share.name,
        ranks=share.ranks(role),
        devices_per_rank=share.tensor_parallel if role == "rollout" else 1,
        threads=min(_threads(member, stage, shares, laid, cluster) for member in process_roles),
        cpus=floor_to(bundle["CPU"] / len(share.roles), 4),
        gpus=floor_to(bundle.get("GPU", 0.0) / len(share.roles), 4),
        strategy=strategy_in(stage, role, config),
        process_roles=process_roles,
    )


def _threads(role: Role, stage: Stage, shares: Sequence[GroupSpec], laid: Assignment, cluster: Cluster) -> int:
    """Cores of a node over the devices busy on it in the role's busiest phase; the least over the role's nodes.

    Roles of one group take turns on its devices, so each device counts once.
    """
    placed = list(zip(shares, laid.nodes, strict=True))
    own = next(nodes for share, nodes in placed if role in share.roles)
    phases = [set(phase) for phase in PHASES[stage] if role in phase]

    def busy(node: int, phase: set[Role]) -> int:
        return sum(nodes.count(node) * s.devices_per_bundle for s, nodes in placed if phase & set(s.roles))

    return min(max(1, int(cluster.nodes[node].cpus / max(busy(node, phase) for phase in phases))) for node in set(own))


def _sharing_problems(config: RunConfig, stage: Stage, processes: Sequence[tuple[Role, ...]]) -> list[Problem]:
    """Roles of one process whose strategy shards the base that they are to share."""
    problems = []
    for role in (role for process_roles in processes if len(process_roles) > 1 for role in process_roles):
        strategy = strategy_in(stage, role, config)
        if strategy and ZERO[strategy].stage == 3:
            setting = f"strategies.{role}" if role in config.strategies else "strategy"
            text = f"{strategy} shards the parameters of {role}, which `share` keeps whole for all its roles; "
            problems.append(Problem(setting, text + "zero2, zero1 or ddp would fit"))
    return problems


def _engine_problems(config: RunConfig, shares: Sequence[GroupSpec], device: Device, cluster: Cluster) -> list[Problem]:
    """What keeps an engine from its devices."""
    setting, size = "rollout.tensor_parallel", config.rollout.tensor_parallel
    problems = []
    if "rollout" in config.strategies:
        text = "the engines are not trained; rollout.tensor_parallel shards them"
        problems.append(Problem("strategies.rollout", text))
    share = next((share for share in shares if "rollout" in share.roles), None)
    if share is None or size == 1:
        return problems
    if share.devices % size:
        below, above = share.devices // size * size, -(-share.devices // size) * size
        text = f"{size} does not divide the {share.devices} devices of group {share.name}; "
        fits = " or ".join(str(fit) for fit in (below, above) if fit)
        problems.append(Problem(setting, f"{text}{share.setting} with {fits} devices would fit"))
    if device == "cuda" and len(share.roles) > 1:
        others = ", ".join(role for role in share.roles if role != "rollout")
        text = (
            f"{size}, but rollout shares its devices with {others}; an engine on several GPUs needs a group of its own "
        )
        text += "(placement.layout separate or paired); 1 would fit here"
        problems.append(Problem(setting, text))
    most = max(node.gpus for node in cluster.nodes)
    if device == "cuda" and most < size:
        text = f"{size}, but an engine must lie on one node, and no node has more than {most} GPUs; "
        text += f"at most {most} would fit"
        problems.append(Problem(setting, text))
    return problems


def _cache_problems(config: RunConfig, device: Device, taken: Mapping[Stage, Path]) -> list[Problem]:
    """A cache of keys and values that is smaller than one sequence, where a setting says its size and the policy's shape is
    known."""
    if device == "cuda" or config.model.dtype == "auto":
        return []
    try:
        policy = Architecture.of(taken.get("sft", config.model.path))
    except ValueError:
        return []
    given = config.rollout.kv_cache_gib
    needed = least_cache(config, policy, device) / config.rollout.tensor_parallel / GIB
    if given >= needed:
        return []
    text = f"{given:g}, but one sequence of {longest_row(config, 'ppo')} tokens (ppo.max_prompt_tokens + rollout.max_new_tokens)"
    return [Problem("rollout.kv_cache_gib", f"{text} needs {_rounded_up(needed):g} GiB for its keys and values")]


def _rounded_up(value: float) -> float:
    """To three digits."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / scale) * scale


def _quantize_problems(config: RunConfig, stage: Stage, device: Device) -> list[Problem]:
    """bitsandbytes computes on GPUs, and ZeRO-3 cannot cut what it made."""
    own = stage == "rm" and config.rm is not None and config.rm.model is not None
    prefix = "rm.model" if own else "model"
    model = config.rm.model if config.rm and config.rm.model and own else config.model
    if not model.quantize:
        return []
    problems = []
    if device == "cpu":
        text = f"{model.quantize} is computed on GPUs only, this run's device is cpu; null would fit"
        problems.append(Problem(f"{prefix}.quantize", text))
    sharded = [role for role in roles_of(config, stage) if (strategy_in(stage, role, config) or "").startswith("zero3")]
    if sharded:
        text = f"{model.quantize}, but {', '.join(sharded)} cut the weights by zero3, which whole numbers cannot be; "
        problems.append(Problem(f"{prefix}.quantize", f"{text}another strategy would fit (ddp, zero1, zero2)"))
    return problems


def _publish_problems(config: RunConfig, shares: Sequence[GroupSpec], device: Device) -> list[Problem]:
    """Transports that cannot work: NCCL refuses two ranks on one GPU, CUDA IPC reaches no other GPU's process."""
    transport = config.publish.transport
    shared = any({"actor", "rollout"} <= set(share.roles) for share in shares)
    if transport in ("nccl", "ipc") and device == "cpu":
        text = f"{transport} works between GPUs only, this run's device is cpu; object_store or auto would fit"
    elif transport == "ipc" and not shared:
        text = "ipc needs actor and rollout in one group, and they are apart; nccl, object_store or auto would fit"
    elif transport == "nccl" and shared:
        text = "nccl needs actor and rollout on different GPUs, and they share; ipc, object_store or auto would fit"
    else:
        return []
    return [Problem("publish.transport", text)]
