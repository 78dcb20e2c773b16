"""From settings and a cluster to a plan: roles to groups, groups to nodes, rows to ranks; and the groups made in Ray."""
