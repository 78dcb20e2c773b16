"""Nodes: a cluster of several, simulated on this machine, and where processes of one listen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster

from orchestrator.run.access import private_cluster


@contextmanager
def simulated_cluster(head: dict[str, Any], **options: Any) -> Iterator[Cluster]:
    """The cluster with its first node, to which this process is connected; `add_node` adds others. options: of ray.init."""
    # The simulation notes its address in the folder that Ray has by default, which nothing of ours makes.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    with private_cluster() as temp:
        started = Cluster(
            initialize_head=True, head_node_args=head | {"include_dashboard": False, "temp_dir": str(temp)}
        )
        try:
            ray.init(started.address, log_to_driver=False, **options)
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


def listening(processes: Iterable[psutil.Process]) -> list[tuple[psutil.Process, str, int]]:
    """Process, address and port of all that they listen on; of those that ended meanwhile, nothing."""
    found = []
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            taken = [c.laddr for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            found += [(one, host.removeprefix("::ffff:"), port) for host, port in taken]
    return found
