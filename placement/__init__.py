"""What the cluster has, what each role needs, and where it goes."""

from placement.advice import with_memory
from placement.cluster import Cluster, Node
from placement.plan import Plan, PlanError, make_plan, render

__all__ = ["Cluster", "Node", "Plan", "PlanError", "make_plan", "render", "with_memory"]
