"""From settings and a cluster to a plan: roles to groups, groups to nodes, rows to ranks.

`placement.plan.placement_groups` (the plan's groups, created in Ray) needs Ray, so it is imported by its own name.
"""

from placement.plan.auto_dtype import (
    Dtype,
    auto_dtype_settings,
    bfloat16_instructions,
    predicted_dtype,
    uses_gpu,
    with_dtype,
)
from placement.plan.fit import floor_to
from placement.plan.planner import make_plan
from placement.plan.time_sharing import time_shared

__all__ = [
    "Dtype",
    "auto_dtype_settings",
    "bfloat16_instructions",
    "floor_to",
    "make_plan",
    "predicted_dtype",
    "time_shared",
    "uses_gpu",
    "with_dtype",
]
