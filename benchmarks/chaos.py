"""PPO under random faults (kills, stops, corruption), compared with the same run without faults.

    python -m examples.movies prepare && python -m benchmarks.chaos --steps 100 --faults 30 --seed 1

The tiny recipe: SFT and reward model, then PPO twice, without and with faults. The seed determines the kind and the step of each
fault; its time within the step is random. Prints the number of faults of each kind, how many the run survived, and the seconds
lost; for the run without faults the memory growth of each process after step 20 (so at least 30 steps are needed), and the
cost of snapshots. The last line says whether metrics and final weights are equal, bit for bit. The exit status is 1 if they
are not, or if memory grew by more than 5%.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from benchmarks.adversary import damage_mark
from benchmarks.recipes import whole_recipe
from configs import RunConfig
from orchestrator.storage import read_metrics, repeatable

SETTLED, COMPARED = 20, 5
"""Memory growth: the last COMPARED steps against the COMPARED steps after step SETTLED, before which memory still grows."""
MIN_STEPS = SETTLED + 2 * COMPARED
ROLES = ("actor", "critic", "reference", "reward", "rollout")
SETTINGS = (
    "plugins=[benchmarks.adversary]",
    "checkpoint.every=5",
    "recovery.max_restarts=1000",
    "deadlines.min_timeout=15",
    "ppo.evaluation=null",
)


@dataclass
class Fault:
    """A fault to inject."""

    kind: str
    step: int
    """The fault is injected after this step."""
    at: float = 0.0
    lost: float = 0.0
    """Seconds until the next step was done, minus the duration of a step."""


@dataclass
class AttackedRun:
    """A run in its own process."""

    config: RunConfig
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def folder(self) -> Path:
        return Path(self.config.runs) / self.config.name

    def begin(self, *arguments: str) -> None:
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "orchestrator.cli", *arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def step(self) -> int:
        """The last finished PPO step."""
        return max((line["step"] for line in _steps(self.folder)), default=0)

    def pids(self, role: str) -> list[int]:
        status = json.loads((self.folder / "status.json").read_text())
        return [worker["pid"] for worker in status["workers"] if worker["role"] == role]


def main(
    steps: Annotated[int, typer.Option(min=MIN_STEPS)] = 100,
    faults: Annotated[int, typer.Option(min=1)] = 30,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 1,
    recipe: Annotated[Path, typer.Option(exists=True, dir_okay=False)] = Path("configs/movies/tiny.yaml"),
) -> None:
    """Run without and with faults, and compare."""
    console, draw = Console(), random.Random(seed)
    base = [*SETTINGS, f"ppo.steps={steps}", f"seed={seed}"]
    quiet, attacked = (whole_recipe(recipe, [*base, f"name=chaos-{seed}{kind}"]) for kind in ("-quiet", ""))
    for config in (quiet, attacked):
        shutil.rmtree(Path(config.runs) / config.name, ignore_errors=True)
    log = Path(quiet.runs) / f"chaos-{seed}.log"
    log.parent.mkdir(exist_ok=True)

    console.print(f"the run without faults (output: {log})")
    calm = AttackedRun(quiet, log)
    calm.begin("pipeline", str(recipe), *base, f"name={quiet.name}")
    if calm.process.wait():
        raise SystemExit(f"the run without faults failed: see {log}")
    grew = _growth(calm.folder)
    console.print(f"memory after step {SETTLED}: " + ", ".join(f"{role} {share:+.1%}" for role, share in grew.items()))
    console.print(f"snapshots: {_snapshots(calm.folder):.2%} of the steps' time")
    _copy_models(quiet, attacked)

    console.print(f"the same with {faults} faults")
    run = AttackedRun(attacked, log)
    plan = sorted((Fault(_draw_kind(draw), draw.randrange(1, steps)) for _ in range(faults)), key=lambda f: f.step)
    run.begin("pipeline", str(recipe), *base, f"name={attacked.name}")
    for fault in plan:
        _attack(run, fault, draw, str(recipe), [*base, f"name={attacked.name}"])
    survived = run.process.wait() == 0
    _print_table(console, run, plan, _median_step(calm.folder))
    differences = _differences(calm.folder, run.folder) if survived else ["the run did not finish"]
    for difference in differences:
        console.print(difference, markup=False)
    console.print(
        "equal to the run without faults, bit for bit" if not differences else "NOT equal to the run without faults"
    )
    raise SystemExit(1 if differences or max(grew.values()) > 0.05 else 0)


def _draw_kind(draw: random.Random) -> str:
    kinds = [f"{role} {verb}" for role in ROLES for verb in ("killed", "stopped")]
    return draw.choice([*kinds, "driver killed", "checkpoint damaged and driver killed", "weights damaged"])


def _attack(run: AttackedRun, fault: Fault, draw: random.Random, recipe: str, settings: list[str]) -> None:
    """Wait for the fault's step, inject the fault, and wait until the run has done another step."""
    _until(run, lambda: run.step() >= fault.step)
    time.sleep(draw.uniform(0.0, 2.0))
    before, fault.at = run.step(), time.monotonic()
    subject, _, verb = fault.kind.partition(" ")
    if fault.kind == "weights damaged":
        damage_mark(run.config).touch()
    elif subject in ROLES:
        _signal_one(run.pids(subject), signal.SIGKILL if verb == "killed" else signal.SIGSTOP, draw)
    else:
        run.process.kill()
        run.process.wait()
        if subject == "checkpoint":
            _damage_newest_checkpoint(run.folder, draw)
        run.begin("pipeline", recipe, *settings)
    _until(run, lambda: run.step() > before)
    fault.lost = time.monotonic() - fault.at


def _signal_one(pids: list[int], number: signal.Signals, draw: random.Random) -> None:
    pid = draw.choice(pids)
    if psutil.pid_exists(pid):
        os.kill(pid, number)


def _damage_newest_checkpoint(folder: Path, draw: random.Random) -> None:
    """Flip a bit in a random file of the newest checkpoint."""
    steps = [path for path in (folder / "checkpoints" / "ppo").glob("*") if path.name.isdecimal()]
    if not steps:
        return
    files = sorted(path for path in max(steps, key=lambda path: int(path.name)).rglob("*.pt"))
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1
    path.write_bytes(content)


def _until(run: AttackedRun, condition: Callable[[], bool]) -> None:
    while not condition() and run.process.poll() is None:
        time.sleep(0.1)


def _copy_models(source: RunConfig, target: RunConfig) -> None:
    """Let the run with faults start at PPO."""
    done, folder = Path(source.runs) / source.name, Path(target.runs) / target.name
    for stage in ("sft", "rm"):
        shutil.copytree(done / "models" / stage, folder / "models" / stage)


def _steps(folder: Path) -> list[dict[str, Any]]:
    """Metrics of PPO's steps."""
    return [line for line in read_metrics(folder) if line["stage"] == "ppo" and line["step"]]


def _median_step(folder: Path) -> float:
    return statistics.median(line["seconds/step"] for line in _steps(folder))


def _growth(folder: Path) -> dict[str, float]:
    """Relative memory growth of each role and the driver: the last steps against the steps after step SETTLED."""

    def level(lines: list[dict[str, Any]], name: str) -> float:
        return statistics.median(line[name] for line in lines)

    lines = _steps(folder)
    names = [name for name in lines[0] if name.startswith("memory_gib/")]
    return {
        name.partition("/")[2]: level(lines[-COMPARED:], name) / level(lines[SETTLED : SETTLED + COMPARED], name) - 1
        for name in names
    }


def _snapshots(folder: Path) -> float:
    lines = _steps(folder)
    return sum(line.get("seconds/snapshot", 0.0) for line in lines) / sum(line["seconds/step"] for line in lines)


def _print_table(console: Console, run: AttackedRun, plan: list[Fault], step: float) -> None:
    table = Table("fault", "injected", "survived", "seconds lost, median")
    done = run.step()
    for kind in sorted({fault.kind for fault in plan}):
        mine = [fault for fault in plan if fault.kind == kind and fault.at]
        lost = [max(fault.lost - step, 0.0) for fault in mine]
        survived = sum(done > fault.step for fault in mine)
        table.add_row(kind, str(len(mine)), str(survived), f"{statistics.median(lost):.0f}" if lost else "")
    console.print(table)
    console.print(f"{len(list((run.folder / 'failures').glob('*.txt')))} failures in {run.folder / 'failures'}")


def _differences(quiet: Path, attacked: Path) -> list[str]:
    ours, theirs = (repeatable(folder, "ppo") for folder in (attacked, quiet))
    differences = [f"step {a['step']}: {_different(a, b)}" for a, b in zip(ours, theirs, strict=False) if a != b][:5]
    if len(ours) != len(theirs):
        differences.append(f"{len(ours)} lines of metrics, but {len(theirs)} in the run without faults")
    a, b = (load_file(folder / "models" / "ppo" / "model.safetensors") for folder in (attacked, quiet))
    return differences + [f"weights differ: {name}" for name in a if a[name].tobytes() != b[name].tobytes()][:5]


def _different(a: dict[str, Any], b: dict[str, Any]) -> str:
    return ", ".join(f"{name} {a.get(name)} {b.get(name)}" for name in a if a.get(name) != b.get(name))


if __name__ == "__main__":
    typer.run(main)
