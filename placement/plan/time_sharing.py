"""Which roles hold a device by turns, with their states in host memory between them."""

from __future__ import annotations

from configs.schema import Role
from placement.types import GroupPlan, Plan


def time_shared(plan: Plan, role: Role) -> bool:
    """Processes of one group on GPUs. On CPU there is no other memory to go to."""
    planned = plan.roles[role]
    return plan.device == "cuda" and _shared(plan, plan.group(planned.group))


def in_words(plan: Plan) -> str | None:
    """What roles that share devices do; none where no role does."""
    shared = [" + ".join(group.roles) for group in plan.groups if _shared(plan, group)]
    if not shared:
        return None
    if plan.device == "cpu":
        return f"{'; '.join(shared)} work by turns; on CPU each keeps what it holds (there is no other memory to move it to)"
    return f"{'; '.join(shared)} hold their GPUs by turns, and between them leave all they have there in host memory"


def _shared(plan: Plan, group: GroupPlan) -> bool:
    """Whether a group has several processes on each device."""
    return len({plan.roles[role].process_roles for role in group.roles}) > 1
