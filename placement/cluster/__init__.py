"""The cluster that a plan is made for: its nodes, and how Ray packs bundles onto them.

`placement.cluster.occupancy` (who holds a running cluster's resources) needs Ray, so it is imported by its own name.
"""

from placement.cluster.bin_packing import resource_text
from placement.cluster.spec import Cluster, Node

__all__ = ["Cluster", "Node", "resource_text"]
