"""How stages end: what fails then is recorded, and a finished stage stays finished whatever its report or its summary says."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import RunError, Stopped, load_config
from orchestrator.algorithms.ppo import LogProbGapError
from orchestrator.algorithms.runner import StageRun
from orchestrator.algorithms.supervised import SFT
from orchestrator.api import resume
from orchestrator.run.run_dir import Run
from orchestrator.run.stop_signal import StopSignal
from orchestrator.storage.metrics_file import FILE
from placement import Cluster
from placement.types import Plan
from placement.types import Stage as StageName

Classes = dict[StageName, Callable[[Run, Console], StageRun]]


def stage_that(does: Callable[[Run], None]) -> Classes:
    """An SFT stage that does this in place of its own work."""

    class Stage(SFT):
        steps = 9

        def read(self) -> None:
            """No data."""

        def execute(self, plan: Plan, stop: StopSignal) -> None:
            self.run.failures.where = "sft, step 3 of 9"
            does(self.run)

    return {"sft": Stage}


@pytest.fixture
def run(ray_here: Cluster, micro: Path, tmp_path: Path) -> Run:
    return Run.begin(load_config(micro, [f"runs={tmp_path}"]), ["sft"])


def records(run: Run) -> dict[str, str]:
    folder = run.folder / "failures"
    return {path.name: path.read_text() for path in sorted(folder.iterdir())} if folder.exists() else {}


def test_an_exception_of_the_driver_leaves_its_traceback(run: Run) -> None:
    def gap(run: Run) -> None:
        raise LogProbGapError("step 3: engine and trainer differ\nby much")

    with pytest.raises(LogProbGapError):
        resume(run, Console(file=io.StringIO()), stage_that(gap))
    [(name, text)] = records(run).items()
    assert name == "0001-LogProbGapError.txt"
    assert text.splitlines()[0].endswith("  sft, step 3 of 9")
    assert text.splitlines()[1] == "LogProbGapError: step 3: engine and trainer differ"
    assert "in gap" in text
    assert (run.folder / "report.html").exists()


def test_to_be_stopped_is_no_failure(run: Run) -> None:
    def stopped(run: Run) -> None:
        raise Stopped("stopped after step 3 of 9 of sft", 15)

    with pytest.raises(Stopped):
        resume(run, Console(file=io.StringIO()), stage_that(stopped))
    assert records(run) == {}


def test_a_report_that_cannot_be_made_ends_nothing(run: Run) -> None:
    def finish(run: Run) -> None:
        run.model("sft").mkdir(parents=True)
        (run.folder / FILE).write_text("no metrics\n")

    said = io.StringIO()
    result = resume(run, Console(file=said), stage_that(finish))
    assert list(result.models) == ["sft"]
    assert "warning: report.html was not written: MetricsError:" in said.getvalue()
    [name] = records(run)
    assert name == "0001-MetricsError.txt"


def test_nor_does_it_hide_the_error_that_ended_a_stage(run: Run) -> None:
    def fail(run: Run) -> None:
        (run.folder / FILE).write_text("no metrics\n")
        raise RunError("runs: was elsewhere")

    with pytest.raises(RunError, match="runs: was elsewhere"):
        resume(run, Console(file=io.StringIO()), stage_that(fail))
    assert sorted(name[5:] for name in records(run)) == ["MetricsError.txt", "RunError.txt"]


def test_a_folder_without_failures_has_no_folder_of_them(run: Run) -> None:
    resume(run, Console(file=io.StringIO()), stage_that(lambda run: run.model("sft").mkdir(parents=True)))
    assert not (run.folder / "failures").exists()
