"""What the cluster has, what each role needs, and where it goes."""

import troupe.imports  # noqa: F401  before any other import of ours
from placement.cluster.spec import Cluster, Node
from placement.memory.auto_strategy import automatic, resolve
from placement.memory.suggestions import PlanReport, with_memory
from placement.plan.planner import make_plan
from placement.table import render
from placement.types import Plan, PlanError

__all__ = [
    "Cluster",
    "Node",
    "Plan",
    "PlanError",
    "PlanReport",
    "automatic",
    "make_plan",
    "render",
    "resolve",
    "with_memory",
]
