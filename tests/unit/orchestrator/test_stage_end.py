"""How stages end: what fails then is recorded, and a finished stage stays finished whatever its report or its summary says."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import Result, RunError, Stopped, load_config
from orchestrator.algorithms.ppo import LogProbGapError
from orchestrator.algorithms.runner import Runner
from orchestrator.api import resume
from orchestrator.run.run_dir import Run
from orchestrator.run.stop_signal import StopSignal
from orchestrator.storage.metrics_file import FILE
from placement import Cluster
from placement.types import Plan

Does = Callable[[Run], None]
Go = Callable[[Run, Does], tuple[Result, str]]


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Go:
    """Runs an SFT stage that does something in place of its own work; the result, and what was printed."""

    def go(run: Run, does: Does) -> tuple[Result, str]:
        def execute(runner: Runner, plan: Plan, stop: StopSignal) -> None:
            run.failures.where = "sft, step 3 of 9"
            does(run)

        monkeypatch.setattr(Runner, "execute", execute)
        printed = io.StringIO()
        return resume(run, Console(file=printed)), printed.getvalue()

    return go


@pytest.fixture
def run(ray_here: Cluster, micro: Path, tmp_path: Path) -> Run:
    return Run.begin(load_config(micro, [f"runs={tmp_path}"]), ["sft"])


def records(run: Run) -> dict[str, str]:
    folder = run.folder / "failures"
    return {path.name: path.read_text() for path in sorted(folder.iterdir())} if folder.exists() else {}


def test_an_exception_of_the_driver_leaves_its_traceback(run: Run, go: Go) -> None:
    def gap(run: Run) -> None:
        raise LogProbGapError("step 3: engine and trainer differ\nby much")

    with pytest.raises(LogProbGapError):
        go(run, gap)
    [(name, text)] = records(run).items()
    assert name == "0001-LogProbGapError.txt"
    assert text.splitlines()[0].endswith("  sft, step 3 of 9")
    assert text.splitlines()[1] == "LogProbGapError: step 3: engine and trainer differ"
    assert "in gap" in text
    assert (run.folder / "report.html").exists()


def test_to_be_stopped_is_no_failure(run: Run, go: Go) -> None:
    def stopped(run: Run) -> None:
        raise Stopped("stopped after step 3 of 9 of sft", 15)

    with pytest.raises(Stopped):
        go(run, stopped)
    assert records(run) == {}


def test_a_report_that_cannot_be_made_ends_nothing(run: Run, go: Go) -> None:
    def finish(run: Run) -> None:
        run.model("sft").mkdir(parents=True)
        (run.folder / FILE).write_text("no metrics\n")

    result, printed = go(run, finish)
    assert list(result.models) == ["sft"]
    assert "warning: report.html was not written: MetricsError:" in printed
    [name] = records(run)
    assert name == "0001-MetricsError.txt"


def test_nor_does_it_hide_the_error_that_ended_a_stage(run: Run, go: Go) -> None:
    def fail(run: Run) -> None:
        (run.folder / FILE).write_text("no metrics\n")
        raise RunError("runs: was elsewhere")

    with pytest.raises(RunError, match="runs: was elsewhere"):
        go(run, fail)
    assert sorted(name[5:] for name in records(run)) == ["MetricsError.txt", "RunError.txt"]


def test_a_folder_without_failures_has_no_folder_of_them(run: Run, go: Go) -> None:
    go(run, lambda run: run.model("sft").mkdir(parents=True))
    assert not (run.folder / "failures").exists()
