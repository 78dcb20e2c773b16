"""The Ray cluster of a run: a running one, or one on this machine for as long as the run lasts."""

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

# Before Ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import services
from ray.exceptions import RayError

from orchestrator.run.access import ANSWER, AccessError, admitted, place_of_token, private_cluster
from orchestrator.run.run_dir import RunError
from placement.cluster import Cluster

_THRIFT = {"enable_worker_prestart": False, "free_objects_batch_size": 1}
"""No processes that nobody asked for; and buckets of weights are freed one by one, not all a second later."""
_OPTIONS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "troupe"}
_FAULTS = (OSError, RuntimeError, ValueError, RayError)
"""What Ray raises where it cannot start or join."""


def session_logs() -> Path:
    """Folder of the logs that Ray and the workers on this machine write."""
    return Path(ray._private.worker.global_worker.node.get_logs_dir_path())


def dashboard() -> str | None:
    """The address of the cluster's dashboard and where its token is, in words; None where it has no dashboard."""
    url = ray._private.worker.global_worker.node.webui_url
    if not url:
        return None
    entrance = f"; it asks for the token in {place}" if (place := place_of_token()) else ""
    return f"Ray's dashboard: http://{url}{entrance}"


@contextmanager
def connected(config: RunConfig) -> Iterator[Cluster]:
    """Connect to `cluster.address` or RAY_ADDRESS, else start a cluster that this process alone can use.

    Raises RunError where the cluster cannot be joined or started.
    """
    if ray.is_initialized():
        yield Cluster.of_ray()
        return
    # Of every worker that dies Ray prints a paragraph over the progress, whatever it was told; a run says more itself.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    address, setting = address_of(config)
    with (
        _joined(address, setting)
        if address
        else local_cluster(include_dashboard=True, dashboard_port=config.cluster.dashboard_port)
    ) as cluster:
        yield cluster


def foreseen_cluster(config: RunConfig) -> Cluster | None:
    """The cluster that `connected` would give, where this is known before: the one that this process is connected to, or one that
    it would start on this machine. Starts and joins nothing."""
    if ray.is_initialized():
        return Cluster.of_ray()
    return None if address_of(config)[0] else Cluster.of_new_ray()


def address_of(config: RunConfig) -> tuple[str | None, str]:
    """The address of the running cluster to join, None where one is to be started; and the setting that it comes from.

    Raises RunError where no address looks like that.
    """
    setting = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = address.rpartition(":")
    if address == "local":
        return None, setting
    if address == "auto" or (host and "/" not in host and port.isdecimal()):
        return address, setting
    if address.startswith("http"):
        what = "the address of a job server, which `ray job submit` alone understands (it also takes RAY_API_SERVER_ADDRESS)"
    elif address.startswith("ray://"):
        what = "an address of Ray Client, through which Troupe does not run"
    else:
        what = "no address of a cluster"
    raise RunError(
        f"{setting}: was {address!r}, {what}; it may be HOST:PORT with the port that `ray start` was given (6379 where it was "
        "given none), auto or local"
    )


@contextmanager
def local_cluster(**options: Any) -> Iterator[Cluster]:
    """A Ray cluster on this machine while the block lasts, which this process and its children alone can use.

    options: of ray.init. Raises RunError where it does not start.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(private_cluster())
            with _without_hangups():
                ray.init(
                    address="local",
                    dashboard_host="127.0.0.1",
                    _temp_dir=str(folder),
                    _system_config=_THRIFT,
                    **_OPTIONS | options,
                )
            stack.callback(ray.shutdown)
        except AccessError as error:
            raise RunError(str(error)) from error
        except _FAULTS as error:
            ray.shutdown()
            if "occupied" in str(error):
                port = options.get("dashboard_port")
                raise RunError(f"cluster.dashboard_port: {port} is taken; leave it out for one that is free") from error
            raise RunError(f"Ray does not start on this machine: {_first_line(error)} (its files: {folder})") from error
        yield Cluster.of_ray()


@contextmanager
def _without_hangups() -> Iterator[None]:
    """What is started in the block never sees a SIGHUP, which shells send to all processes of a terminal that is closed; the
    driver needs them for its last checkpoint. Ray does the same with SIGINT."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


@contextmanager
def _joined(address: str, setting: str) -> Iterator[Cluster]:
    """A running cluster, while the block lasts. setting: what the address comes from."""
    try:
        found = _located(address)
        with admitted(found):
            try:
                ray.init(address=found, **_OPTIONS)
            except _FAULTS as error:
                ray.shutdown()
                raise AccessError(f"a cluster that cannot be joined: {_first_line(error)}") from error
            try:
                yield Cluster.of_ray()
            finally:
                ray.shutdown()
    except AccessError as error:
        raise RunError(f"{setting}: was {address!r}, {error}") from error


def _located(address: str) -> str:
    """HOST:PORT of a cluster by Ray's words. Raises AccessError where nothing answers there."""
    host, _, port = (_on_this_machine() if address == "auto" else address).rpartition(":")
    # Ray takes 127.0.0.1 for the machine's own address, where a cluster that listens on 127.0.0.1 alone does not answer.
    hosts = [services.resolve_ip_for_localhost(host), *(["127.0.0.1"] if host in ("127.0.0.1", "localhost") else [])]
    faults = []
    for at in hosts:
        try:
            socket.create_connection((at, int(port)), timeout=ANSWER).close()
            return f"{at}:{port}"
        except OSError as error:
            faults.append(error)
    raise AccessError(f"where no Ray cluster answers: {faults[-1]}") from faults[-1]


def _on_this_machine() -> str:
    """The address of the cluster that `ray start` started here last, else of the only one."""
    running = services.find_gcs_addresses()
    last = services.find_bootstrap_address(None)
    if last in running:
        return str(last)
    if len(running) != 1:
        which = f"several run: {', '.join(sorted(running))}" if running else "none runs"
        raise AccessError(f"the cluster on this machine, but {which}")
    return str(*running)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
