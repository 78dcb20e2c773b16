"""Which roles share a GPU in turns; while one works, the states of the others are in host memory."""

from __future__ import annotations

from configs.schema import Role
from placement.types import GroupPlan, Plan


def time_shared(plan: Plan, role: Role) -> bool:
    """Whether several processes of the role's group share its GPUs. Never on CPU: there is no other memory to move states to."""
    planned = plan.roles[role]
    return plan.device == "cuda" and _shared(plan, plan.group(planned.group))


def describe(plan: Plan) -> str | None:
    """How roles share devices, as a sentence; None where no roles do."""
    shared = [" + ".join(group.roles) for group in plan.groups if _shared(plan, group)]
    if not shared:
        return None
    if plan.device == "cpu":
        return f"{'; '.join(shared)} take turns; on CPU each keeps its memory (there is no other memory to move it to)"
    return f"{'; '.join(shared)} take turns on their GPUs; a role that waits keeps its states in host memory"


def _shared(plan: Plan, group: GroupPlan) -> bool:
    """Whether a group has several processes on each device."""
    return len({plan.roles[role].process_roles for role in group.roles}) > 1
