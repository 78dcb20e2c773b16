"""What the cluster has, what each role needs, and where it goes.

The subpackages export what other packages use: `from placement.plan import make_plan`. The most used names are also here.
"""

import troupe.imports  # noqa: F401  before any other import of ours
from placement.cluster import Cluster, Node
from placement.memory import PlanReport, auto_roles, resolve, with_memory
from placement.plan import make_plan
from placement.table import render
from placement.types import Plan, PlanError

__all__ = [
    "Cluster",
    "Node",
    "Plan",
    "PlanError",
    "PlanReport",
    "auto_roles",
    "make_plan",
    "render",
    "resolve",
    "with_memory",
]
