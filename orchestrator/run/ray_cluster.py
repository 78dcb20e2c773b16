"""The Ray cluster of a run: an existing cluster, or one that is started on this machine and ends with the run."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from configs.schema import RunConfig

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import services
from ray.exceptions import RayError

from orchestrator.run.access import RESPONSE_TIMEOUT_S, AccessError, authenticated, private_cluster, token_location
from orchestrator.run.run_dir import RunError
from placement.cluster import Cluster

_SYSTEM_CONFIG = {"enable_worker_prestart": False, "free_objects_batch_size": 1}
"""Start no idle workers; and free each bucket of weights at once, not all of them a second later."""
_OPTIONS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "troupe"}
_RAY_ERRORS = (OSError, RuntimeError, ValueError, RayError)
"""Errors that Ray raises if it cannot start or join a cluster."""


def session_logs() -> Path:
    """Folder with the logs of Ray and of the workers on this machine."""
    return Path(ray._private.worker.global_worker.node.get_logs_dir_path())


def dashboard() -> str | None:
    """A line with the dashboard's address and the location of its token; None if the cluster has no dashboard."""
    url = ray._private.worker.global_worker.node.webui_url
    if not url:
        return None
    token = f"; it requires the token in {location}" if (location := token_location()) else ""
    return f"Ray's dashboard: http://{url}{token}"


@contextmanager
def connected(config: RunConfig) -> Iterator[Cluster]:
    """Connect to `cluster.address` or RAY_ADDRESS, or else start a cluster that only this process can use.

    Raises RunError if the cluster cannot be joined or started.
    """
    if ray.is_initialized():
        yield Cluster.of_ray()
        return
    # Ray prints a paragraph into the progress for every worker that dies, also with log_to_driver=False; a run reports more.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    address, setting = address_of(config)
    with (
        _joined(address, setting)
        if address
        else local_cluster(include_dashboard=True, dashboard_port=config.cluster.dashboard_port)
    ) as cluster:
        yield cluster


def foreseen_cluster(config: RunConfig) -> Cluster | None:
    """The cluster that `connected` would yield, if it is known before: the one that this process is connected to, or the one
    that it would start on this machine. Starts and joins nothing."""
    if ray.is_initialized():
        return Cluster.of_ray()
    return None if address_of(config)[0] else Cluster.of_new_ray()


def address_of(config: RunConfig) -> tuple[str | None, str]:
    """The address of the cluster to join, None to start one; and the setting that it comes from.

    Raises RunError if the address is not valid.
    """
    setting = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = address.rpartition(":")
    if address == "local":
        return None, setting
    if address == "auto" or (host and "/" not in host and port.isdecimal()):
        return address, setting
    if address.startswith("http"):
        problem = (
            "the address of a job server, which only `ray job submit` accepts (it also reads RAY_API_SERVER_ADDRESS)"
        )
    elif address.startswith("ray://"):
        problem = "an address of Ray Client, which Troupe does not support"
    else:
        problem = "not an address of a cluster"
    raise RunError(
        f"{setting}: was {address!r}, {problem}; must be HOST:PORT with the port of `ray start` (6379 by default), auto "
        "or local"
    )


@contextmanager
def local_cluster(**options: Any) -> Iterator[Cluster]:
    """A Ray cluster on this machine for the block; only this process and its children can use it.

    options: for ray.init. Raises RunError if it does not start.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(private_cluster())
            with _without_hangups():
                ray.init(
                    address="local",
                    dashboard_host="127.0.0.1",
                    _temp_dir=str(folder),
                    _system_config=_SYSTEM_CONFIG,
                    **_OPTIONS | options,
                )
            stack.callback(ray.shutdown)
        except AccessError as error:
            raise RunError(str(error)) from error
        except _RAY_ERRORS as error:
            ray.shutdown()
            if "occupied" in str(error):
                port = options.get("dashboard_port")
                raise RunError(f"cluster.dashboard_port: {port} is in use; leave it out to get a free port") from error
            raise RunError(f"Ray does not start on this machine: {_first_line(error)} (its files: {folder})") from error
        yield Cluster.of_ray()


@contextmanager
def _without_hangups() -> Iterator[None]:
    """Processes started in the block ignore SIGHUP, which a closed terminal sends to all its processes: the driver needs them for
    its last checkpoint. Ray does the same with SIGINT."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


@contextmanager
def _joined(address: str, setting: str) -> Iterator[Cluster]:
    """Join a running cluster for the block. setting: the source of the address."""
    try:
        host_port = _resolved(address)
        with authenticated(host_port):
            try:
                ray.init(address=host_port, **_OPTIONS)
            except _RAY_ERRORS as error:
                ray.shutdown()
                raise AccessError(f"a cluster that cannot be joined: {_first_line(error)}") from error
            try:
                yield Cluster.of_ray()
            finally:
                ray.shutdown()
    except AccessError as error:
        raise RunError(f"{setting}: was {address!r}, {error}") from error


def _resolved(address: str) -> str:
    """HOST:PORT of an address as Ray writes it. Raises AccessError if nothing responds there."""
    host, _, port = (_on_this_machine() if address == "auto" else address).rpartition(":")
    # Ray replaces 127.0.0.1 by the machine's address, where a cluster that listens only on 127.0.0.1 does not respond.
    hosts = [services.resolve_ip_for_localhost(host), *(["127.0.0.1"] if host in ("127.0.0.1", "localhost") else [])]
    errors = []
    for host in hosts:
        try:
            socket.create_connection((host, int(port)), timeout=RESPONSE_TIMEOUT_S).close()
            return f"{host}:{port}"
        except OSError as error:
            errors.append(error)
    raise AccessError(f"where no Ray cluster responds: {errors[-1]}") from errors[-1]


def _on_this_machine() -> str:
    """The address of the cluster that `ray start` started last on this machine, or else of the only cluster."""
    running = services.find_gcs_addresses()
    last = services.find_bootstrap_address(None)
    if last in running:
        return str(last)
    if len(running) != 1:
        state = f"several run: {', '.join(sorted(running))}" if running else "none runs"
        raise AccessError(f"the cluster on this machine, but {state}")
    return str(*running)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
