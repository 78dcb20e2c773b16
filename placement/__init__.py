"""What the cluster has, what each role needs, and where it goes."""

import troupe.imports  # noqa: F401  before any other import of ours
from placement.advice import with_memory
from placement.choice import automatic, resolve
from placement.cluster import Cluster, Node
from placement.plan import Plan, PlanError, make_plan, render

__all__ = ["Cluster", "Node", "Plan", "PlanError", "automatic", "make_plan", "render", "resolve", "with_memory"]
