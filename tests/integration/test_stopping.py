"""Stop requests, closed terminals and closed pipes, in small processes without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import ROOT, wait_for
from tests.support.terminals import Terminal

STEPS = """
import sys, time
from pathlib import Path
from configs import RunConfig
from orchestrator.cli import _errors
from orchestrator.loggers.console import Progress
from orchestrator.run.run_dir import Run
from orchestrator.run.stop_signal import StopSignal
from orchestrator.console.terminal import hangup_safe_console, make_output_hangup_safe

folder, steps, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
make_output_hangup_safe()
run = Run(RunConfig(name="a", model={"path": "m"}), folder)
run.stages = ["sft", "rm", "ppo"]
console = hangup_safe_console()
with _errors(), StopSignal(run, console) as stop, Progress("rm", steps, console) as progress:
    for step in range(1, steps + 1):
        time.sleep(0.02)
        progress.update(step, {"loss": 1.0})
        if step % every == 0:  # the end of a part that is not interrupted
            (folder / f"saved-{step}").touch()
            stop.raise_if_requested(f"after step {step}")
print("the end")
"""


def command(folder: Path, steps: int, every: int) -> list[str]:
    return [sys.executable, "-c", STEPS, str(folder), str(steps), str(every)]


def test_a_closed_terminal_stops_the_run_after_its_step(tmp_path: Path) -> None:
    """Its later output is lost, and does not end it."""
    terminal = Terminal(command(tmp_path, 10_000, 25), ROOT)
    wait_for(lambda: (tmp_path / "saved-25").exists())
    terminal.close()
    assert terminal.process.wait(60) == 128 + signal.SIGHUP
    saved = len(list(tmp_path.glob("saved-*")))
    time.sleep(0.5)
    assert len(list(tmp_path.glob("saved-*"))) == saved >= 2


def test_ctrl_c_twice_says_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "models" / "sft").mkdir(parents=True)
    for step in (20, 40):
        (tmp_path / "checkpoints" / "rm" / str(step)).mkdir(parents=True)
    terminal = Terminal(command(tmp_path, 10_000, 10_000), ROOT)
    terminal.wait_for("rm")
    terminal.press_ctrl_c()
    terminal.wait_for("a second signal stops at once")
    terminal.press_ctrl_c()
    assert terminal.process.wait(60) == 130
    output = " ".join(terminal.shown.split())
    assert (
        "stopping at once; kept: the model of sft, the checkpoint of rm after step 40; "
        f"resume with: troupe resume {tmp_path}" in output
    )
    assert "Traceback" not in output and "Error" not in output
    terminal.close()


def test_ctrl_c_once_ends_after_the_step_though_the_terminal_is_closed_then(tmp_path: Path) -> None:
    terminal = Terminal(command(tmp_path, 10_000, 50), ROOT)
    terminal.wait_for("rm")
    terminal.press_ctrl_c()
    terminal.wait_for("a second signal stops at once")
    terminal.close()
    assert terminal.process.wait(60) == 130
    assert len(list(tmp_path.glob("saved-*"))) == 1


@pytest.mark.parametrize("reader", ["true", "head -c 1"])
def test_a_closed_pipe_does_not_end_the_run(tmp_path: Path, reader: str) -> None:
    read, write = os.pipe()
    run = subprocess.Popen(command(tmp_path, 50, 50), cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    with subprocess.Popen(reader.split(), stdin=read, stdout=subprocess.DEVNULL):
        os.close(read)
        os.close(write)
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (0, b"")
    assert (tmp_path / "saved-50").exists()


def test_nohup_is_respected(tmp_path: Path) -> None:
    """A run started by nohup goes on after a hangup."""
    run = subprocess.Popen(
        ["nohup", *command(tmp_path, 60, 20)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for(lambda: (tmp_path / "saved-20").exists())
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == 0
    assert run.stderr is not None
    run.stderr.close()
