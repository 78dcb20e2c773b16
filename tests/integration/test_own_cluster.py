"""A run that starts its own cluster, as on a laptop: what the terminal shows, where it listens, that nothing is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from placement.cluster import Cluster
from tests.support.micro import write_micro
from tests.support.nodes import listening
from tests.support.terminals import Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


class Finished(NamedTuple):
    output: str
    errors: str
    code: int
    processes: list[psutil.Process]
    listening: dict[str, set[str]]
    """Address -> the run's processes that listened there while it ran."""
    token: tuple[Path, str]
    """Of the run's cluster: its file, and what was in it while the run went on."""


def start(config: Path, *overrides: str) -> tuple[list[str], dict[str, str]]:
    """The command `troupe sft`, and an environment without anything of Ray's."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return [sys.executable, "-m", "orchestrator.cli", "sft", str(config), *overrides], env


class Seen(NamedTuple):
    """Of a run at work."""

    processes: list[psutil.Process]
    listening: dict[str, set[str]]
    token: tuple[Path, str]


def look(process: subprocess.Popen[Any], config: Path) -> Seen:
    """What is to be seen once the first step is done."""
    metrics = config.parent / "runs" / "micro" / "metrics.jsonl"
    end = time.monotonic() + 120
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    names: dict[str, set[str]] = {}
    for one, address, _ in listening(below):
        names.setdefault(address, set()).add(one.cmdline()[0])
    file = Path(next(one.environ()["RAY_AUTH_TOKEN_PATH"] for one in below))
    return Seen(below, names, (file, file.read_text()))


def run(config: Path, *overrides: str, stop_with: int | None = None) -> Finished:
    """`troupe sft` in a process of its own; watched once its first step is done, and stopped there if asked."""
    command, env = start(config, *overrides)
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    seen = look(process, config)
    if stop_with:
        process.send_signal(stop_with)
    output, errors = process.communicate(timeout=120)
    return Finished(output, errors, process.returncode, *seen)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_micro(tmp_path, placement={})


@pytest.fixture(scope="session", autouse=True)
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, set[str]]:
    """A run whose driver was killed, and what lay in shared memory before it. Begun before the other tests of the file, since
    two of Ray's processes look for the cluster for a minute."""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    config = write_micro(tmp_path_factory.mktemp("killed"), placement={})
    return run(config, "sft.epochs=3000", "checkpoint.every=1", stop_with=signal.SIGKILL), before


def test_the_terminal_shows_the_run_and_nothing_else(config: Path) -> None:
    """Also where the dashboard's usual port is taken."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # another program holds it already, which does as well
            stack.enter_context(socket.create_server(("127.0.0.1", 8265)))
        done = run(config, "sft.epochs=40")
    assert done.code == 0, done.errors
    assert done.errors == ""
    lines = done.output.splitlines()
    shape = [
        r"sft\.(train|validation) +\d+ rows, [\d,]+ tokens, longest \d+",
        r"checked in \d+\.\d s; connecting to Ray",
        rf"micro in .*/runs/micro, on cpu: 1 node with {Cluster.of_new_ray().cpus:g} CPU cores, .*",
        r"Ray's dashboard: http://127\.0\.0\.1:\d+; it requires the token in /.*/token",
        r"  sft  120 steps · actor: 1 x \(.* CPU\) · 20 rows in an optimizer step: 20 on the actor rank",
        r"sft: starting workers",
        r"sft: loading",
        r"sft \d+/120 · .*loss \d+\.\d+ · tokens/s [\d,]+",
        r"sft 120/120 · loss \d+\.\d+ · val\. loss \d+\.\d+ · tokens/s [\d,]+",
        r"sft: exporting",
        r"",
        r"micro is finished",
        r"SFT +perplexity \d+\.\d on held-out demonstrations · 120 steps in \d:\d\d",
        r"report +/.*/runs/micro/report\.html",
        r"curves +tensorboard --logdir /.*/runs/micro/tensorboard",
        r"model +/.*/runs/micro/models/sft",
        r"chat +troupe chat /.*/runs/micro",
    ]
    strange = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in shape)]
    assert strange == []
    assert all(any(re.fullmatch(pattern, line) for line in lines) for pattern in shape)
    assert list(done.listening) == ["127.0.0.1"]
    file, token = done.token
    assert f"requires the token in {file}" in done.output
    assert not file.exists()
    run_folder = config.parent / "runs" / "micro"
    written = [path for at in (run_folder, run_folder / "logs") for path in at.resolve().rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if token.encode() in path.read_bytes()] == []
    assert token not in done.output


def test_ctrl_c_and_then_a_closed_terminal_leave_a_checkpoint_and_no_process(config: Path) -> None:
    """All processes of a terminal get its Ctrl-C, and a SIGHUP when it is closed; the run ends by itself for all that."""
    command, env = start(config, "sft.epochs=3000")
    terminal = Terminal(command, ROOT, env)
    seen = look(terminal.process, config)
    terminal.press_ctrl_c()
    terminal.wait_for(
        "stopping after this step, or in 25 s within it (recovery.stop_grace); a second signal stops at once"
    )
    terminal.close()
    os.killpg(terminal.process.pid, signal.SIGHUP)  # as a shell does
    assert terminal.process.wait(120) == 128 + signal.SIGINT
    assert "Traceback" not in terminal.shown
    [checkpoint] = (config.parent / "runs" / "micro" / "checkpoints" / "sft").iterdir()
    assert (checkpoint / "state.json").exists()
    assert not (config.parent / "runs" / "micro" / "failures").exists(), "no worker was lost"
    assert len(seen.processes) > 3
    _, alive = psutil.wait_procs(seen.processes, timeout=20)
    assert alive == []


def test_a_killed_driver_leaves_no_process_and_no_memory(killed: tuple[Finished, set[str]]) -> None:
    """Ray's processes watch the driver; the next start needs nothing that it held."""
    done, before = killed
    assert done.code == -signal.SIGKILL
    _, alive = psutil.wait_procs(done.processes, timeout=100)
    assert [process.cmdline() for process in alive] == []
    assert {path.name for path in Path("/dev/shm").iterdir()} <= before
