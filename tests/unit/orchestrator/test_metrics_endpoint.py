"""Metrics and actor names as a running Ray shows them: its Prometheus endpoint and its dashboard."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import ray
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

from configs.schema import DeadlineSettings, RecoverySettings, Role, RunConfig
from orchestrator.loggers.ray_table import TABLE
from orchestrator.run.ray_cluster import connected
from orchestrator.worker_groups.calls import WorkerGroup
from orchestrator.worker_groups.deadlines import Deadlines
from orchestrator.worker_groups.failure_policy import FailurePolicy
from orchestrator.worker_groups.failures import WorkerError
from tests.support.recording import recording
from workers.api import WorkerApi
from workers.process.inspection import ProcessLocation, location

pytestmark = pytest.mark.slow

Found = TypeVar("Found")
REPORT_SECONDS = 1.0
"""How often Ray's processes report here; by default it is every 10 s."""

FIRST = {
    "kl": 0.1,
    "reward/mean": -1.0,
    "reward/brief": -2.0,
    "grad_norm/actor": 9.0,
    "grad_norm/critic": 9.0,
    "seconds/step": 9.0,
    "seconds/generate": 9.0,
    "samples": 8.0,
    "tokens": 80.0,
    "memory_gib/actor": 1.0,
    "skipped/critic": 2.0,
    "loss/of a plugin": 3.0,
}
SECOND = FIRST | {
    "kl": math.nan,
    "reward/mean": 0.625,
    "reward/brief": 0.5,
    "grad_norm/actor": 1.5,
    "grad_norm/critic": 2.5,
    "seconds/step": 4.0,
    "seconds/generate": 0.2,
    "memory_gib/actor": 0.5,
    "skipped/critic": 0.0,
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", f"{1000 * REPORT_SECONDS:.0f}")
        with connected(config):
            yield f"http://127.0.0.1:{port}"


def shown() -> str:
    """Text of the metrics port of the only node."""
    (node,) = ray.nodes()
    return fetch(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")


def of_run(text: str, name: str, run: str) -> dict[tuple[str, ...], float]:
    """Values of a metric of a run, by the labels that are Troupe's, in the order of their names."""
    ours = ("kind", "le", "method", "metric", "phase", "role", "source", "stage")
    found = samples(text).get(f"ray_troupe_{name}", [])
    return {
        tuple(labels[key] for key in ours if key in labels): value for labels, value in found if labels["run"] == run
    }


def test_the_metrics_port_shows_a_stage_while_it_lasts(dashboard: str, tmp_path: Path) -> None:
    with recording(tmp_path, "demo", "ppo") as recorder:
        recorder.record(1, FIRST)
        recorder.record(2, SECOND)
        recorder.spent({("actor", "train_answers"): 2.5})
        text = wait_for("the last of them", lambda: t if of_run(t := shown(), "role_seconds_total", "demo") else None)
        gauges = {name: of_run(text, name, "demo") for name in ("step", "reward_mean", "gradient_norm", "kl_nats")}
        assert gauges == {
            "step": {("ppo",): 2.0},
            "reward_mean": {("ppo",): 0.625},
            "gradient_norm": {("actor", "ppo"): 1.5, ("critic", "ppo"): 2.5},
            "kl_nats": {},  # its last value is nan, and the one before is outdated
        }
        assert of_run(text, "reward_source_mean", "demo") == {("brief", "ppo"): 0.5}
        assert of_run(text, "memory_bytes", "demo") == {("actor", "ppo"): 2**29}
        assert of_run(text, "metric", "demo") == {("loss/of a plugin", "ppo"): 3.0}
        counts = {name: of_run(text, f"{name}_total", "demo") for name in ("samples", "tokens", "skipped_steps")}
        assert counts == {"samples": {("ppo",): 16}, "tokens": {("ppo",): 160}, "skipped_steps": {("critic", "ppo"): 2}}
        assert of_run(text, "role_seconds_total", "demo") == {("train_answers", "actor", "ppo"): 2.5}
        buckets = of_run(text, "step_seconds_bucket", "demo")
        assert [buckets[bound, "ppo"] for bound in ("2.5", "5.0", "10.0", "+Inf")] == [0, 1, 2, 2]
        assert of_run(text, "phase_seconds_count", "demo") == {("generate", "ppo"): 2}
        for row in TABLE:
            if f"# TYPE ray_{row.name} " in text:
                assert f"# HELP ray_{row.name} {row.help}\n" in text
                assert f"# TYPE ray_{row.name} {row.kind}\n" in text

        time.sleep(5 * REPORT_SECONDS)  # a step may take long
        assert of_run(shown(), "step", "demo") == {("ppo",): 2.0}
    gone = wait_for("the end", lambda: t if not of_run(t := shown(), "step", "demo") else None, 5 * REPORT_SECONDS)
    left = {
        name for name, found in samples(gone).items() if "troupe" in name for tags, _ in found if tags["run"] == "demo"
    }
    assert left == {f"ray_{row.name}" for row in TABLE if f"ray_{row.name}" in left and row.kind == "counter"} | {
        f"ray_troupe_{name}_seconds_{part}" for name in ("step", "phase") for part in ("bucket", "count", "sum")
    }


class Mortal:
    """The actor method that a worker group uses: `call`."""

    def call(self, role: Role, method: str) -> ProcessLocation:
        if method == "memory":
            time.sleep(600)
        return location()


def test_a_process_killed_from_outside_leaves_a_trace(dashboard: str, tmp_path: Path) -> None:
    actor = ray.remote(num_cpus=0)(Mortal).remote()
    place: ProcessLocation = ray.get(actor.call.remote("critic", "location"), timeout=90)
    group = WorkerGroup("critic", [actor], "critic", Deadlines(DeadlineSettings()), locations={0: place})
    recovery = FailurePolicy(RecoverySettings())
    with recording(tmp_path, "killed", "ppo") as recorder:
        recovery.on_failure = recorder.failed
        call = group.call(WorkerApi.memory)
        call.start()
        os.kill(place.pid, signal.SIGKILL)
        with pytest.raises(WorkerError) as caught:
            call.collect(0)
        recovery.decide(caught.value)
        for restarts in (0, 1, 0, 2):  # a team; a new process; another team, which counts from 0; two new processes
            recorder.workers([{"role": "critic", "restarts": restarts}, {"role": "actor", "restarts": 0}])

        def counted() -> str | None:
            text = shown()
            return text if of_run(text, "restarts_total", "killed") == {("critic", "ppo"): 3} else None

        text = wait_for("restarts", counted)
        assert of_run(text, "failures_total", "killed") == {("died", "critic", "ppo"): 1}


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
