"""Who may use a cluster that Troupe starts, and which clusters Troupe can join."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import ray
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._raylet import get_authentication_mode  # type: ignore[attr-defined]  # its stubs lack it
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from configs.schema import RunConfig
from orchestrator.run.ray_cluster import connected, dashboard, local_cluster
from orchestrator.run.run_dir import RunError
from placement.cluster import Cluster
from tests.support.nodes import listening
from tests.support.runs import ROOT

pytestmark = pytest.mark.slow

CALLS = {
    "CoreWorkerService/PushTask",
    "CoreWorkerService/KillActor",
    "InternalKVGcsService/InternalKVPut",
    "JobInfoGcsService/AddJob",
    "LogService/ListLogs",
    "NodeManagerService/RequestWorkerLease",
    "ObjectManagerService/Push",
    "ReporterService/GetTraceback",
}
"""By which one runs something, changes something or looks into a process: at least one of each of Ray's services."""

JOIN = """
import sys
from configs.schema import RunConfig
from orchestrator.run.ray_cluster import connected
from orchestrator.run.run_dir import RunError
try:
    config = {"name": "b", "model": {"path": "m"}, "cluster": {"address": sys.argv[1]}}
    with connected(RunConfig.model_validate(config)) as cluster:
        import ray
        print("in", ray.get(ray.remote(lambda: 42).options(num_cpus=0).remote(), timeout=60))
except RunError as error:
    print(error)
"""


def settings(address: str | None = None) -> RunConfig:
    return RunConfig.model_validate({"name": "a", "model": {"path": "unused"}, "cluster": {"address": address}})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """What a run without `cluster.address` starts; with the dashboard."""
    assert not ray.is_initialized(), "an earlier test left its Ray running"
    with connected(settings()) as started:
        yield started


def address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def listeners() -> dict[int, str]:
    """Port -> address of whatever this process and those below it listen on."""
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {port: address for _, address, port in listening(mine)}


def join(**environment: str) -> str:
    """What a process with this environment says that wants to use the cluster."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment
    command = [sys.executable, "-c", JOIN, address()]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_may_have_clusters_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray remembers what it was told of authentication when it was imported, and the first token: this cluster comes in, and
    the one of the tests below. Afterwards the environment is as before."""
    told = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "of another cluster"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with local_cluster(num_cpus=1, include_dashboard=False):
        file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote(), timeout=60) == "token"
    assert get_authentication_mode() == 0
    assert {name: os.environ[name] for name in told} == told
    assert not file.exists()


def test_a_place_for_rays_files_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    with pytest.raises(RunError, match=r"^TMPDIR: cannot write to /proc: "), connected(settings()):
        pass


def test_what_listens_there_but_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.run.access.RESPONSE_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        at = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(RunError, match=f"was '{at}', where no Ray cluster responds: "), connected(settings(at)):
            pass


def test_the_token_is_readable_by_this_user_alone(cluster: Cluster) -> None:
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert len(file.read_text()) == 64
    assert Path(ray._private.worker.global_worker.node.get_session_dir_path()).is_relative_to(file.parent)
    command_lines = [" ".join(one.cmdline()) for one in psutil.Process().children(recursive=True)]
    assert len(command_lines) > 3
    assert not any(file.read_text() in line for line in command_lines)


def test_every_port_refuses_who_has_no_token_or_a_wrong_one(cluster: Cluster) -> None:
    class Actor:
        def ready(self) -> bool:
            return True

    actor = ray.remote(Actor).options(num_cpus=0).remote()  # its process listens too
    assert ray.get(actor.ready.remote(), timeout=60)
    assert set(listeners().values()) == {"127.0.0.1"}
    refused = set()
    for port in listeners():
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for call in CALLS:
                for shown in ((), (("authorization", f"Bearer {64 * '0'}"),)):
                    ask = channel.unary_unary(f"/ray.rpc.{call}", request_serializer=bytes, response_deserializer=bytes)
                    with pytest.raises(grpc.RpcError) as error:
                        ask(b"", timeout=10, metadata=shown)
                    code = error.value.code()
                    if code == grpc.StatusCode.UNAUTHENTICATED:
                        refused.add(call)
                    else:  # another service's port, or one that speaks HTTP
                        assert code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE), (port, call)
    assert refused == CALLS


def test_the_dashboard_and_its_job_server_ask_for_the_token(cluster: Cluster) -> None:
    said = dashboard()
    assert said is not None
    url, _, file = said.removeprefix("Ray's dashboard: ").partition("; it requires the token in ")
    token = Path(file).read_text()

    def answer(path: str, shown: str | None, body: dict[str, Any] | None = None) -> int:
        headers = {"Authorization": f"Bearer {shown}"} if shown else {}
        request = urllib.request.Request(url + path, headers=headers, data=json.dumps(body).encode() if body else None)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    job = {"entrypoint": "touch /tmp/it-ran"}
    assert [answer("/api/jobs/", None, job), answer("/api/jobs/", 64 * "0", job)] == [401, 403]
    assert answer("/", None) == 200  # the page in which the token is entered
    assert answer("/api/jobs/", token) == 200


def test_who_has_the_token_comes_in_and_nobody_else(cluster: Cluster, tmp_path: Path) -> None:
    """HOME without a token of Ray's; with one that belongs to another cluster; and the right one."""
    asks = f"cluster.address: was '{address()}', a cluster"
    assert join(HOME=str(tmp_path)) == (
        f"{asks} that requires a token (RAY_AUTH_MODE=token), but there is none in {tmp_path}/.ray/auth_token, in a file "
        "named by RAY_AUTH_TOKEN_PATH, or in RAY_AUTH_TOKEN"
    )
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(64 * "0")
    assert join(HOME=str(tmp_path)).startswith(f"{asks} whose token is not the one in {tmp_path}/.ray/auth_token")
    assert join(RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"]) == "in 42"


def test_a_cluster_of_another_version_is_refused(cluster: Cluster) -> None:
    there = _internal_kv_get(CLUSTER_METADATA_KEY, namespace=b"cluster")
    other = json.dumps(json.loads(there) | {"ray_version": "2.9.0"}).encode()
    try:
        _internal_kv_put(CLUSTER_METADATA_KEY, other, overwrite=True, namespace=b"cluster")
        said = join(RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"])
    finally:
        _internal_kv_put(CLUSTER_METADATA_KEY, there, overwrite=True, namespace=b"cluster")
    assert said.startswith(f"cluster.address: was '{address()}', a cluster of Ray 2.9.0 and Python 3.")
    assert f"this process has Ray {ray.__version__}" in said
