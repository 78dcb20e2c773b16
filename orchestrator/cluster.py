"""The Ray cluster of a run: a running one, or one on this machine for as long as the run lasts."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.schema import RunConfig

# Before Ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import ray_constants

from orchestrator.run import RunError
from placement.cluster import Cluster

_THRIFT = {"enable_worker_prestart": False, "free_objects_batch_size": 1}
"""No processes that nobody asked for; and buckets of weights are freed one by one, not all a second later."""


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
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "troupe"}
    # Of every worker that dies Ray prints a paragraph over the progress, whatever it was told; a run says more itself.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    if address := config.cluster.address or os.environ.get("RAY_ADDRESS"):
        _join(address, "cluster.address" if config.cluster.address else "RAY_ADDRESS", quiet)
    else:
        _start(config.cluster.dashboard_port, quiet)
    try:
        yield Cluster.of_ray()
    finally:
        ray.shutdown()


def _join(address: str, setting: str, options: dict[str, Any]) -> None:
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for many minutes
        ray.init(address=address, **options)
    except OSError as error:
        raise RunError(f"{setting}: was {address!r}, where no Ray cluster answers: {error}") from error


def _start(dashboard_port: int | None, options: dict[str, Any]) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # by default Ray takes up a token file of other clusters
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    try:
        with _loopback():
            ray.init(
                address="local",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=dashboard_port,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
                _system_config=_THRIFT,
                **options,
            )
    except ValueError as error:
        if "occupied" not in str(error):
            raise
        raise RunError(
            f"cluster.dashboard_port: {dashboard_port} is taken; leave it out for one that is free"
        ) from error


@contextmanager
def _loopback() -> Iterator[None]:
    """What Ray starts here listens on 127.0.0.1, as it does by default on systems where it supports no clusters."""
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ[name] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]
