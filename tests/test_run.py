"""A run's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs import RunConfig
from orchestrator.run import Run, RunError, whole_folder

HOLD = """
import sys, time
from pathlib import Path
from configs import RunConfig
from orchestrator.run import Run
with Run(RunConfig(name="a", model={"path": "m"}), Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_work_in_one_run(tmp_path: Path) -> None:
    run = Run(RunConfig.model_validate({"name": "a", "model": {"path": "m"}}), tmp_path)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is at work in this run"), run.locked():
            pass
    finally:
        other.kill()
        other.wait()
    with run.locked():  # whoever held it is dead: its lock is gone with it
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "x") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not (tmp_path / "x").exists()
    with whole_folder(tmp_path / "x") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["whole"]
