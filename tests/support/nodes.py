"""A simulated cluster of several nodes on this machine, and the addresses on which its processes listen."""

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
    """A cluster with one node, to which this process is connected; `add_node` adds others. options: of ray.init."""
    # The simulation writes its address to Ray's default folder, which our code does not create.
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
    """Process, address and port of each listening socket; processes that have ended are skipped."""
    listening = []
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            taken = [c.laddr for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            listening += [(one, host.removeprefix("::ffff:"), port) for host, port in taken]
    return listening
