"""The cluster that a plan is made for: its nodes, how bundles are packed onto them, and who occupies them."""
