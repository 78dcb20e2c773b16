"""DPO brought by a plugin: its data, roles, loss, settings, checkpoints and place in the report, without an edit of a package."""

from __future__ import annotations

import math
import os
import subprocess
import time
from pathlib import Path

import pytest

from configs import ConfigError
from orchestrator import Result, load_config, run_stages
from orchestrator.storage.metrics_file import read_metrics, repeatable
from placement import Cluster, make_plan
from tests.support.micro import write_micro
from tests.support.runs import ROOT, assert_same_model, command, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    pairs = {"path": str(folder / "pairs.jsonl")}
    dpo = {
        "train": pairs,
        "validation": pairs | {"limit": 10},
        "validate_every": 2,
        "batch_size": 12,
        "max_length": 48,
        "beta": 0.5,
        "optimizer": {"lr": 1e-3},
    }
    return write_micro(folder, plugins=["tests.plugins.dpo"], rm=None, ppo=None, dpo=dpo)


@pytest.fixture(scope="module")
def whole(config: Path, ray_here: Cluster) -> Result:
    return run_stages(load_config(config, ["name=whole", "placement.devices={actor: 2, reference: 2}"]))


def test_it_learns(whole: Result) -> None:
    first, *_, last = [line for line in read_metrics(whole.folder) if line["stage"] == "dpo"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4), "at first the actor is the reference"
    assert last["loss"] < 0.6 and last["validation/accuracy"] > 0.8
    assert whole.numbers["dpo"]["validation/loss"] == last["validation/loss"]


def test_it_places_the_roles_that_it_asks_for_and_no_other(config: Path) -> None:
    plan = make_plan(load_config(config), "dpo", Cluster.parse("1x8cpu,host=16GB"))
    assert list(plan.roles) == ["actor", "reference"]


def test_it_is_in_the_report(whole: Result) -> None:
    report = whole.report.read_text()
    assert "Direct preference optimization" in report and "validation/accuracy" in report


def test_a_wrong_setting_of_it_is_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"^dpo\.beta: was -1; must be number > 0$"):
        load_config(config, ["dpo.beta=-1"])


def test_killed_and_resumed_it_is_the_same_run(config: Path, whole: Result) -> None:
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    folder = whole.folder.parent / "killed"
    settings = ("name=killed", "placement.devices={actor: 2, reference: 2}", "checkpoint.every=1")
    begin = command("pipeline", str(config), *settings)
    process = subprocess.Popen(begin, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: process.poll() is not None or len(_steps(folder)) >= 2)
    time.sleep(0.1)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -9, output.decode()
    done = subprocess.run(command("resume", str(folder)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step" in done.stdout
    assert "DPO" in done.stdout
    assert repeatable(folder, "dpo") == repeatable(whole.folder, "dpo")
    assert_same_model(folder / "models" / "dpo", whole.models["dpo"])


def _steps(folder: Path) -> list[dict[str, object]]:
    return repeatable(folder, "dpo") if (folder / "metrics.jsonl").exists() else []
