"""The Ray cluster of a run: a running one, or one on this machine for as long as the run lasts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.schema import RunConfig

# Before Ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import ray_constants

from orchestrator.run import RunError
from placement.cluster import Cluster


def session_logs() -> Path:
    """Folder of the logs that Ray and the workers on this machine write."""
    return Path(ray._private.worker.global_worker.node.get_logs_dir_path())


@contextmanager
def connected(config: RunConfig) -> Iterator[Cluster]:
    """Connect to `cluster.address` or RAY_ADDRESS, else start a cluster that listens on this machine alone.

    Raises RunError where there is no such cluster, or the dashboard's port is taken.
    """
    if ray.is_initialized():
        yield Cluster.of_ray()
        return
    _init(config)
    try:
        yield Cluster.of_ray()
    finally:
        ray.shutdown()


def _stay_on_loopback() -> None:
    """Let what Ray starts listen on 127.0.0.1, as it does by default on systems where it supports no clusters."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray was imported


def _init(config: RunConfig) -> None:
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "troupe"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
            ray.init(
                address="local",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=config.cluster.dashboard_port,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
                **quiet,
            )
    except ConnectionError as error:
        setting = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
        raise RunError(f"{setting}: no Ray cluster at {address}: {error}") from error
    except ValueError as error:
        if "occupied" not in str(error):
            raise
        port = config.cluster.dashboard_port
        raise RunError(f"cluster.dashboard_port: {port} is taken; leave it out for one that is free") from error
