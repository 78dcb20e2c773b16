"""`ray job submit` of a stage to a cluster with a job server, as a user would."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from orchestrator.run.access import private_cluster
from orchestrator.storage.metrics_file import read_metrics
from tests.support.micro import write_micro
from tests.support.nodes import listening

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
PYTHON = sys.executable
TROUPE = f"{PYTHON} -P -c 'from troupe.imports import main; main()'"
"""What the command `troupe` does."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of one node started by `ray start`, on 127.0.0.1 and with a token; gives the address of its job server."""
    port = free_port()
    options = [f"--port={free_port()}", f"--dashboard-port={port}", "--num-cpus=2", "--object-store-memory=200000000"]
    options += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    with private_cluster() as folder:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--temp-dir={folder}", *options],
            # As where Troupe is installed: the path comes after the job's working folder.
            env=os.environ
            | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_JOB_STOP_WAIT_TIME_S": "60", "PYTHONPATH": str(ROOT)},
            cwd=tmp_path_factory.mktemp("head"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}"
            below = psutil.Process(head.pid).children(recursive=True)
            assert {address for _, address, _ in listening(below)} == {"127.0.0.1"}
        finally:
            below = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(60)
            for process in below:
                if process.is_running():
                    process.kill()


@pytest.fixture(scope="module")
def client(address: str) -> JobSubmissionClient:
    end = time.monotonic() + 60
    while True:
        try:
            return JobSubmissionClient(address)
        except ConnectionError:
            assert time.monotonic() < end, "the job server does not answer"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder that is sent along: a config and its data by relative paths, and the source code."""
    folder = tmp_path_factory.mktemp("sent")
    config = write_micro(folder / "data", placement={})
    (folder / "config.yaml").write_text(config.read_text().replace(f"{folder}/", "").replace("data/runs", "runs"))
    for ignore in (".gitignore", ".rayignore", "data/.gitignore"):
        shutil.copy(ROOT / ignore, folder / ignore)
    for room in ("troupe", "configs", "placement", "workers", "orchestrator", "tests"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A working folder of somebody who has Troupe installed, and modules of the same names as Troupe's."""
    folder = tmp_path / "other"
    config = write_micro(folder, placement={})
    config.write_text(config.read_text().replace(f"{folder}/", ""))
    (folder / "workers").mkdir()
    for name in ("workers/__init__", "configs", "placement", "orchestrator"):
        (folder / f"{name}.py").write_text("raise RuntimeError('not of Troupe')\n")
    return folder


def submit(address: str, sent: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` from the folder; its output is the job's."""
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", PYTHON, "-m", "orchestrator.cli", *args],
        cwd=sent,
        env=os.environ | {"RAY_API_SERVER_ADDRESS": address, "RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1"},
        capture_output=True,
        text=True,
    )


def test_a_stage_runs_as_a_job(client: JobSubmissionClient, address: str, sent: Path, tmp_path: Path) -> None:
    done = submit(address, sent, "sft", "config.yaml", f"runs={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [job.status for job in client.list_jobs()] == [JobStatus.SUCCEEDED]
    assert "micro is finished" in done.stdout
    assert (tmp_path / "micro" / "models" / "sft" / "model.safetensors").exists()
    assert (tmp_path / "micro" / "report.html").exists()


def test_results_in_the_copy_are_refused(client: JobSubmissionClient, address: str, sent: Path) -> None:
    done = submit(address, sent, "sft", "config.yaml")
    assert done.returncode != 0
    assert "troupe: runs: was 'runs', in the job's copy of the working folder" in done.stdout


def test_a_stopped_job_leaves_a_checkpoint(client: JobSubmissionClient, other: Path, tmp_path: Path) -> None:
    command = f"{TROUPE} sft config.yaml runs={tmp_path} sft.epochs=2000"
    job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(other)})
    end = time.monotonic() + 120
    while not read_metrics(tmp_path / "micro"):
        assert time.monotonic() < end and not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        time.sleep(0.1)
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < end + 60
        time.sleep(0.1)
    assert client.get_job_status(job) == JobStatus.STOPPED
    steps = [line["step"] for line in read_metrics(tmp_path / "micro")]
    assert (tmp_path / "micro" / "checkpoints" / "sft" / str(steps[-1]) / "state.json").exists()
    assert f"stopped after step {steps[-1]} of " in client.get_job_logs(job)
