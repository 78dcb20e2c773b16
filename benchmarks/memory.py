"""Bytes for each parameter that a whole PPO job takes, by strategy: actor, critic, reference, reward model and engine.

    python -m benchmarks.memory            # six runs of each of two sizes, one after the other
    python -m benchmarks.memory --quick    # the first and the last row alone

Each row is a slope: the peak of the proportional set size of all processes together (driver and Ray too), of a larger model
less that of a smaller one, over the difference of their parameters. What a job takes whatever the size of its model (Python,
torch, Ray) so drops out. Each run is `troupe bench` on GPT-2 shapes that differ in layers alone, as nearly all parameters of a
large model are in layers: start, load, two steps of three updates on two short answers each, weights published after both.
Actor and critic train side by side, and the highest moment is when both have all their gradients: in a single update these
may miss one another. No snapshot is taken: it would add to the full trainings and hardly to LoRA. The lighter the job, the
larger its second model, so that what varies from run to run is small beside the difference.

The last line is the ratio of the first row to the last; the exit code is 1 where it is below 9.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from placement.models import Architecture

WIDTH, HEADS, VOCABULARY = 1024, 16, 50257
SMALLER = 2
"""Layers of the smaller model."""
LORA = ["--lora-rank=8"]
SHARE = [*LORA, "--share=actor,critic,reference,reward"]
LEAST_RATIO = 9.0
GIB = 2**30
RUN = [
    *("--num_episodes=2", "--max_timesteps=1", "--update_timesteps=1", "--max_epochs=3"),
    *("--experience_batch_size=2", "--train_batch_size=2", "--lengths=4,12"),
    "publish.bucket_mib=8",  # as large beside these models as the default is beside large ones
]


class Way(NamedTuple):
    """A row: its flags of `troupe bench`, and the layers of its larger model."""

    flags: list[str]
    larger: int


WAYS = {
    "ddp float32": Way([], 16),
    "zero2": Way(["--strategy=zero2"], 8),
    "zero3_offload": Way(["--strategy=zero3_offload"], 8),
    "LoRA": Way(LORA, 16),
    "LoRA + share": Way(SHARE, 26),
    "LoRA + share + bf16": Way([*SHARE, "--precision=bfloat16"], 26),
}


def shape_of(layers: int) -> dict[str, Any]:
    shape = {"n_embd": WIDTH, "n_layer": layers, "n_head": HEADS, "n_positions": 1024, "vocab_size": VOCABULARY}
    return {"model_type": "gpt2", "initializer_range": 0.02} | shape


def parameters(layers: int) -> int:
    return Architecture.read(shape_of(layers)).parameters


def peak(layers: int, flags: list[str], folder: Path, console: Console) -> int:
    """Run `troupe bench`; bytes at its highest moment. Raises SystemExit, with what it printed, where it fails."""
    model, result = folder / "config.json", folder / "result.json"
    model.write_text(json.dumps(shape_of(layers)), encoding="utf-8")
    command = [sys.executable, "-m", "orchestrator.cli", "bench", f"--model={model}", f"--json={result}", *flags, *RUN]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        console.print(done.stdout, markup=False)
        raise SystemExit(f"{layers} layers {' '.join(flags)}: failed")
    phases: dict[str, dict[str, int]] = json.loads(result.read_text(encoding="utf-8"))["peak_bytes"]["phases"]
    console.print(
        f"{layers} layers {' '.join(flags)}, GiB at the highest moment of each phase and process:", style="dim"
    )
    for phase, sizes in phases.items():
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
        console.print(f"  {phase}: {parts}", style="dim", soft_wrap=True)
    return max(sizes["total"] for sizes in phases.values())


def measure(way: Way, console: Console) -> tuple[float, int, int]:
    """Bytes for each parameter, and the peaks of the two sizes."""
    with tempfile.TemporaryDirectory() as name:
        low, high = (peak(layers, way.flags, Path(name), console) for layers in (SMALLER, way.larger))
    return (high - low) / (parameters(way.larger) - parameters(SMALLER)), low, high


def main(quick: bool = False) -> None:
    """Measure, print the table and the ratio."""
    console = Console()
    first, *_, last = WAYS
    rows = {name: measure(WAYS[name], console) for name in ((first, last) if quick else WAYS)}
    table = Table("", box=box.SIMPLE)
    for column in ("bytes per parameter", "smaller model", "GiB", "larger model", "GiB"):
        table.add_column(column, justify="right")
    for name, (slope, low, high) in rows.items():
        sizes = [f"{parameters(layers):,}" for layers in (SMALLER, WAYS[name].larger)]
        table.add_row(name, f"{slope:.2f}", sizes[0], f"{low / GIB:.2f}", sizes[1], f"{high / GIB:.2f}")
    console.print(table)
    ratio = rows[first][0] / rows[last][0]
    console.print(f"{first} to {last}: {ratio:.2f}")
    raise SystemExit(ratio < LEAST_RATIO)


if __name__ == "__main__":
    typer.run(main)
