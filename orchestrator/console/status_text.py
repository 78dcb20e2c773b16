"""What `troupe status` prints."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.console.run_summary import achieved, print_result, print_rows, shown
from orchestrator.number_text import age, clock
from orchestrator.run.condition import Condition
from orchestrator.run.result import Result
from orchestrator.run.run_dir import Run


def print_status(run: Run, console: Console) -> None:
    """What a run is doing, or how it ended and how to go on with it."""
    found, result = Condition.of(run), Result.of(run)
    if found.state == "finished":
        print_result(result, console)
        _line(console, f"took {clock(sum(found.seconds.values()))} in all")
    else:
        _line(console, f"{run.config.name}: {_headline(found)}", bold=len(run.config.name))
        if rows := achieved(result):
            print_rows(rows, console)
        if found.state in ("running", "silent"):
            _print_session(found, console)
        else:
            _line(console, f"to go on: troupe resume {shown(run.folder)} ({_begins(run, found)})")
    _print_failures(run, console)


def _headline(found: Condition) -> str:
    took = f"{clock(sum(found.seconds.values()))} in all"
    if found.state == "running":
        return f"running, {took}" if found.seconds else "running; it has just begun"
    if found.state == "silent":
        return f"NO SIGN OF LIFE for {age(time.time() - found.now['time'])}; {took} until then"
    if found.state == "new":
        return "not running; nothing was done"
    where = f"{_step(found.now)}, phase {found.now['phase']}, {age(time.time() - found.now['time'])} ago; {took}"
    return f"not running; {found.state}{': ' if found.why else ''}{found.why} ({where})"


def _print_session(found: Condition, console: Console) -> None:
    """Where the session is, what it waits for and until when, and its workers."""
    now = found.now
    if not now or "ended" in now:  # of the session before; this one has not begun its stage
        return
    ago, driver = time.time() - now["time"], now["driver"]
    phase = clock(now["time"] - now["phase_began"])
    _line(console, f"{_step(now)}; phase {now['phase']} for {phase}; policy version {now['version']}")
    if awaited := now["awaited"]:
        _line(console, _waiting(awaited))
    _line(console, f"driver {driver['host']} pid {driver['pid']}{_process(driver)}, last sign of life {age(ago)} ago")
    if now["workers"]:
        console.print(_workers(now["workers"]))


def _step(now: dict[str, Any]) -> str:
    return f"{now['stage']}: {now['step']} of {now['steps']} steps done"


def _waiting(awaited: dict[str, Any]) -> str:
    ranks = ", ".join(map(str, awaited["ranks"]))
    now = time.time()
    left = awaited["until"] - now
    deadline = f"ends in {clock(left)}" if left > 0 else f"ended {clock(-left)} ago"
    return (
        f"waiting for {awaited['role']} rank {ranks} to answer {awaited['method']}, for {clock(now - awaited['since'])}; "
        f"the deadline of {clock(awaited['until'] - awaited['since'])} {deadline} ({awaited['setting']})"
    )


def _process(driver: dict[str, Any]) -> str:
    """What this machine knows of the driver's process, where that is not usual."""
    if driver["host"] != socket.gethostname():
        return ""
    try:
        state = psutil.Process(driver["pid"]).status()
    except psutil.NoSuchProcess:
        return " (gone)"
    return " (stopped by a signal; `kill -CONT` lets it go on)" if state == psutil.STATUS_STOPPED else ""


def _begins(run: Run, found: Condition) -> str:
    if not found.left:
        return "nothing is left to do"
    stage = found.left[0]
    saved = run.checkpoints(stage)
    return f"from the checkpoint of {stage} after step {saved[-1]}" if saved else f"{stage} begins at step 1"


def _workers(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("role", "rank", "node", "pid", "restarts"):
        table.add_column(name, justify="left" if name in ("role", "node") else "right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("role", "rank", "node", "pid", "restarts")))
    return table


def _print_failures(run: Run, console: Console) -> None:
    failures = sorted((run.folder / "failures").glob("*.txt"))
    if failures:
        _line(console, f"{len(failures)} failures in {shown(run.folder / 'failures')}; the last:")
        for line in failures[-1].read_text(encoding="utf-8").splitlines()[1:2]:  # after the date
            _line(console, line)


def _line(console: Console, text: str, bold: int = 0) -> None:
    """bold: so many characters at the beginning."""
    line = Text(text)
    line.stylize("bold", 0, bold)
    console.print(line, soft_wrap=True)
