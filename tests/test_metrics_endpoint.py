"""Metrics and actor names as a running Ray shows them: its Prometheus endpoint and its dashboard."""

from __future__ import annotations

import json
import math
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import ray
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

from configs.schema import RunConfig
from orchestrator.cluster import connected
from orchestrator.metrics import Recorder

pytestmark = pytest.mark.slow

Found = TypeVar("Found")
FIRST = {"kl": 0.1, "reward/mean": -1.0, "grad_norm/actor": 9.0, "grad_norm/critic": 9.0, "seconds/generate": 9.0}
SECOND = {
    "kl": math.nan,
    "reward/mean": 0.625,
    "grad_norm/actor": 1.5,
    "grad_norm/critic": 2.5,
    "seconds/generate": 3.0,
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def fetch(url: str) -> str:
    request = urllib.request.Request(url, headers=get_auth_headers_if_auth_enabled({}))  # the dashboard wants the token
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def wait_for(what: str, look: Callable[[], Found | None], seconds: float = 90) -> Found:
    """The first thing that `look` finds; an error that names it when nothing is found in time."""
    deadline, last = time.monotonic() + seconds, "nothing found"
    while time.monotonic() < deadline:
        try:
            found = look()
        except OSError as error:
            found, last = None, repr(error)
        if found:
            return found
        time.sleep(0.5)
    raise TimeoutError(f"{what}: not there after {seconds:.0f} s ({last})")


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Prometheus text -> name -> [(labels, value)]."""
    parsed: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)", text, flags=re.MULTILINE):
        parsed.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return parsed


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of the dashboard of the cluster that a run starts on this machine."""
    port = free_port()
    config = RunConfig.model_validate(
        {"name": "demo", "model": {"path": "unused"}, "cluster": {"address": None, "dashboard_port": port}}
    )
    assert not ray.is_initialized(), "an earlier test left its Ray running"
    with connected(config):
        yield f"http://127.0.0.1:{port}"


def test_the_metrics_port_shows_the_latest_step_with_its_tags(dashboard: str, tmp_path: Path) -> None:
    with Recorder(tmp_path, "demo", "ppo") as recorder:
        recorder.record(1, FIRST)
        recorder.record(2, SECOND)
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def settled() -> dict[str, list[tuple[dict[str, str], float]]] | None:
        found = samples(fetch(url))  # The gauges are set in the order of the metrics: the last one stands for all.
        return found if [value for _, value in found.get("ray_troupe_seconds_generate", [])] == [3.0] else None

    found = wait_for("gauges on Ray's metrics port", settled)
    ((labels, value),) = found["ray_troupe_reward_mean"]
    assert value == 0.625
    assert (labels["run"], labels["stage"], labels.get("role", "")) == ("demo", "ppo", "")
    norms = {labels["role"]: value for labels, value in found["ray_troupe_grad_norm"]}
    assert norms == {"actor": 1.5, "critic": 2.5}
    assert "ray_troupe_kl" not in found  # Its last value is not a number, and the one before no longer true.


def test_the_dashboard_lists_actors_by_run_role_and_rank(dashboard: str) -> None:
    class Worker:
        def ready(self) -> bool:
            return True

    names = {"demo/actor-0", "demo/critic-0"}
    remote = ray.remote(num_cpus=0)(Worker)
    workers = [remote.options(name=name).remote() for name in sorted(names)]
    assert ray.get([worker.ready.remote() for worker in workers], timeout=90) == [True, True]

    def listed() -> list[dict[str, Any]] | None:
        actors = json.loads(fetch(f"{dashboard}/api/v0/actors?detail=1"))["data"]["result"]["result"]
        alive = [actor for actor in actors if actor["state"] == "ALIVE"]
        return alive if names <= {actor["name"] for actor in alive} else None

    for actor in wait_for("actors in the dashboard", listed):
        assert actor["class_name"].endswith("Worker")
    wait_for("the dashboard's own page", lambda: "<html" in fetch(dashboard).lower())
