"""Bytes for each parameter that a whole PPO job takes, by strategy: actor, critic, reference, reward model and engine.

    python -m benchmarks.memory            # six runs of each of two sizes, one after the other
    python -m benchmarks.memory --quick    # the first and the last row alone

Each row is a slope: the peak of the proportional set size of all processes together (driver and Ray too), of a larger model
less that of a smaller one, over the difference of their parameters. What a job takes whatever the size of its model (Python,
torch, Ray) so drops out. Each run is `troupe bench` on GPT-2 shapes of one vocabulary: start, load, two steps of two short
answers each, the second with the optimizer's states from its beginning, weights published after both. The lighter the job, the
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

from placement.architecture import Architecture

SHAPES = {"small": (512, 8, 8), "s": (768, 12, 12), "m": (1024, 24, 16)}
"""Width, layers, heads."""
LORA = ["--lora-rank=8"]
SHARE = [*LORA, "--share=actor,critic,reference,reward"]
LEAST_RATIO = 9.0
GIB = 2**30
RUN = [
    *("--num_episodes=2", "--max_timesteps=1", "--update_timesteps=1", "--max_epochs=1"),
    *("--experience_batch_size=2", "--train_batch_size=2", "--lengths=4,12"),
    "publish.bucket_mib=8",  # as large beside these models as the default is beside large ones
]


class Way(NamedTuple):
    """A row: its flags of `troupe bench`, and the larger of its two sizes."""

    flags: list[str]
    larger: str


WAYS = {
    "ddp float32": Way([], "s"),
    "zero2": Way(["--strategy=zero2"], "s"),
    "zero3_offload": Way(["--strategy=zero3_offload"], "s"),
    "LoRA": Way(LORA, "s"),
    "LoRA + share": Way(SHARE, "m"),
    "LoRA + share + bf16": Way([*SHARE, "--precision=bfloat16"], "m"),
}


def shape_of(size: str) -> dict[str, Any]:
    width, layers, heads = SHAPES[size]
    shape = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024}
    return {"model_type": "gpt2", "vocab_size": 50257, "initializer_range": 0.02} | shape


def peak(size: str, flags: list[str], folder: Path, console: Console) -> dict[str, Any]:
    """Run `troupe bench`; what it says of memory. Raises SystemExit, with what it printed, where it fails."""
    model, result = folder / f"{size}.json", folder / "result.json"
    model.write_text(json.dumps(shape_of(size)), encoding="utf-8")
    command = [sys.executable, "-m", "orchestrator.cli", "bench", f"--model={model}", f"--json={result}", *flags, *RUN]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        console.print(done.stdout, markup=False)
        raise SystemExit(f"{size} {' '.join(flags)}: failed")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))["peak_bytes"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in (found["roles"] | found["phases"]).items())
    console.print(f"{size} {' '.join(flags)}: {found['total'] / GIB:.2f} GiB ({parts})", style="dim", soft_wrap=True)
    return found


def measure(way: Way, console: Console) -> tuple[float, int, int]:
    """Bytes for each parameter, and the peaks of the two sizes."""
    with tempfile.TemporaryDirectory() as name:
        low, high = (peak(size, way.flags, Path(name), console)["total"] for size in ("small", way.larger))
    less, more = (Architecture.read(shape_of(size)).parameters for size in ("small", way.larger))
    return (high - low) / (more - less), low, high


def main(quick: bool = False) -> None:
    """Measure, print the table and the ratio."""
    console = Console()
    first, *_, last = WAYS
    rows = {name: measure(WAYS[name], console) for name in ((first, last) if quick else WAYS)}
    table = Table("", box=box.SIMPLE)
    for column in ("bytes per parameter", "smaller model", "GiB", "larger model", "GiB"):
        table.add_column(column, justify="right")
    for name, (slope, low, high) in rows.items():
        sizes = [f"{Architecture.read(shape_of(size)).parameters:,}" for size in ("small", WAYS[name].larger)]
        table.add_row(name, f"{slope:.2f}", sizes[0], f"{low / GIB:.2f}", sizes[1], f"{high / GIB:.2f}")
    console.print(table)
    ratio = rows[first][0] / rows[last][0]
    console.print(f"{first} to {last}: {ratio:.2f}")
    raise SystemExit(ratio < LEAST_RATIO)


if __name__ == "__main__":
    typer.run(main)
