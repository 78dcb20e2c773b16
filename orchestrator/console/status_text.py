"""The output of `troupe status`."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.console.run_summary import display_path, print_result, print_rows, stage_results
from orchestrator.number_text import age, clock
from orchestrator.run import Condition, Result, Run


def print_status(run: Run, console: Console) -> None:
    """Print what a run is doing, or how it ended and how to resume it."""
    condition, result = Condition.of(run), Result.of(run)
    if condition.state == "finished":
        print_result(result, console)
        _line(console, f"total time {clock(sum(condition.seconds.values()))}")
    else:
        _line(console, f"{run.config.name}: {_headline(condition)}", bold=len(run.config.name))
        if rows := stage_results(result):
            print_rows(rows, console)
        if condition.state in ("running", "silent"):
            _print_session(condition, console)
        else:
            _line(console, f"to resume: troupe resume {display_path(run.folder)} ({_starts_at(run, condition)})")
    _print_failures(run, console)


def _headline(condition: Condition) -> str:
    total = f"{clock(sum(condition.seconds.values()))} in total"
    if condition.state == "running":
        return f"running, {total}" if condition.seconds else "running; just started"
    if condition.state == "silent":
        return f"NO HEARTBEAT for {age(time.time() - condition.now['time'])}; {total} until then"
    if condition.state == "new":
        return "not running; no step was done"
    position = f"{_step(condition.now)}, phase {condition.now['phase']}, {age(time.time() - condition.now['time'])} ago; {total}"
    return f"not running; {condition.state}{': ' if condition.why else ''}{condition.why} ({position})"


def _print_session(condition: Condition, console: Console) -> None:
    """Print the session's position, the call that it waits for with its deadline, and its workers."""
    now = condition.now
    if not now or "ended" in now:  # of the previous session; this one has not begun a stage yet
        return
    since, driver = time.time() - now["time"], now["driver"]
    phase_time = clock(now["time"] - now["phase_began"])
    _line(console, f"{_step(now)}; phase {now['phase']} for {phase_time}; policy version {now['version']}")
    if awaited := now["awaited"]:
        _line(console, _waiting(awaited))
    _line(
        console, f"driver {driver['host']} pid {driver['pid']}{_process_state(driver)}, last heartbeat {age(since)} ago"
    )
    if now["workers"]:
        console.print(_workers(now["workers"]))


def _step(now: dict[str, Any]) -> str:
    return f"{now['stage']}: {now['step']} of {now['steps']} steps done"


def _waiting(awaited: dict[str, Any]) -> str:
    ranks = ", ".join(map(str, awaited["ranks"]))
    now = time.time()
    remaining = awaited["until"] - now
    deadline = f"ends in {clock(remaining)}" if remaining > 0 else f"ended {clock(-remaining)} ago"
    return (
        f"waiting for {awaited['role']} rank {ranks}: {awaited['method']}, for {clock(now - awaited['since'])}; "
        f"the deadline of {clock(awaited['until'] - awaited['since'])} {deadline} ({awaited['setting']})"
    )


def _process_state(driver: dict[str, Any]) -> str:
    """The state of the driver's process if it is unusual; empty on another machine."""
    if driver["host"] != socket.gethostname():
        return ""
    try:
        state = psutil.Process(driver["pid"]).status()
    except psutil.NoSuchProcess:
        return " (gone)"
    return " (stopped by a signal; `kill -CONT` continues it)" if state == psutil.STATUS_STOPPED else ""


def _starts_at(run: Run, condition: Condition) -> str:
    if not condition.left:
        return "all stages are finished"
    stage = condition.left[0]
    checkpoints = run.checkpoints(stage)
    return (
        f"from the checkpoint of {stage} after step {checkpoints[-1]}" if checkpoints else f"{stage} begins at step 1"
    )


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
        _line(console, f"{len(failures)} failures in {display_path(run.folder / 'failures')}; the last:")
        for line in failures[-1].read_text(encoding="utf-8").splitlines()[1:2]:  # after the date
            _line(console, line)


def _line(console: Console, text: str, bold: int = 0) -> None:
    """bold: number of bold characters at the beginning."""
    line = Text(text)
    line.stylize("bold", 0, bold)
    console.print(line, soft_wrap=True)
