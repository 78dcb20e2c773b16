"""Bytes per parameter of a whole PPO job (actor, critic, reference, reward model and engine), by strategy.

    python -m benchmarks.memory            # six runs of each of two sizes, one after the other
    python -m benchmarks.memory --quick    # only the first and the last row

Each row is a slope: (peak with a larger model - peak with a smaller model) / difference of their parameters. The peak is the
proportional set size of all processes together, driver and Ray included; memory that does not depend on the model's size (Python,
torch, Ray) cancels out. Each run is `troupe bench` on GPT-2 shapes that differ only in layers, since nearly all parameters of a
large model are in layers: start, load, two steps of three updates on two short answers each, and the weights published after
both. Actor and critic train at the same time, and memory peaks when both have all their gradients; in a single update this may
not happen. No snapshot is made: it would add much to full training and little to LoRA. Lighter jobs have a larger second model,
so that the variation between runs is small compared with the difference.

The last line is the ratio of the first row to the last; the exit code is 1 if it is below 9.
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
MIN_RATIO = 9.0
GIB = 2**30
RUN = [
    *("--num_episodes=2", "--max_timesteps=1", "--update_timesteps=1", "--max_epochs=3"),
    *("--experience_batch_size=2", "--train_batch_size=2", "--lengths=4,12"),
    "weight_sync.bucket_mib=8",  # in proportion to these models, as the default is to large models
]


class Variant(NamedTuple):
    """A row: flags for `troupe bench`, and the layers of the larger model."""

    flags: list[str]
    larger: int


VARIANTS = {
    "ddp float32": Variant([], 16),
    "zero2": Variant(["--strategy=zero2"], 8),
    "zero3_offload": Variant(["--strategy=zero3_offload"], 8),
    "LoRA": Variant(LORA, 16),
    "LoRA + share": Variant(SHARE, 26),
    "LoRA + share + bf16": Variant([*SHARE, "--precision=bfloat16"], 26),
}


def shape_of(layers: int) -> dict[str, Any]:
    shape = {"n_embd": WIDTH, "n_layer": layers, "n_head": HEADS, "n_positions": 1024, "vocab_size": VOCABULARY}
    return {"model_type": "gpt2", "initializer_range": 0.02} | shape


def parameters(layers: int) -> int:
    return Architecture.read(shape_of(layers)).parameters


def peak(layers: int, flags: list[str], folder: Path, console: Console) -> int:
    """Run `troupe bench`; returns its peak bytes. Prints its output and raises SystemExit if it fails."""
    model, result = folder / "config.json", folder / "result.json"
    model.write_text(json.dumps(shape_of(layers)), encoding="utf-8")
    command = [sys.executable, "-m", "orchestrator.cli", "bench", f"--model={model}", f"--json={result}", *flags, *RUN]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        console.print(done.stdout, markup=False)
        raise SystemExit(f"{layers} layers {' '.join(flags)}: failed")
    phases: dict[str, dict[str, int]] = json.loads(result.read_text(encoding="utf-8"))["peak_bytes"]["phases"]
    console.print(f"{layers} layers {' '.join(flags)}, peak GiB of each phase and process:", style="dim")
    for phase, sizes in phases.items():
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
        console.print(f"  {phase}: {parts}", style="dim", soft_wrap=True)
    return max(sizes["total"] for sizes in phases.values())


def measure(variant: Variant, console: Console) -> tuple[float, int, int]:
    """Bytes per parameter, and the peaks of the two sizes."""
    with tempfile.TemporaryDirectory() as name:
        low, high = (peak(layers, variant.flags, Path(name), console) for layers in (SMALLER, variant.larger))
    return (high - low) / (parameters(variant.larger) - parameters(SMALLER)), low, high


def main(quick: bool = False) -> None:
    """Measure; print the table and the ratio."""
    console = Console()
    first, *_, last = VARIANTS
    rows = {name: measure(VARIANTS[name], console) for name in ((first, last) if quick else VARIANTS)}
    table = Table("", box=box.SIMPLE)
    for column in ("bytes per parameter", "smaller model", "GiB", "larger model", "GiB"):
        table.add_column(column, justify="right")
    for name, (slope, low, high) in rows.items():
        sizes = [f"{parameters(layers):,}" for layers in (SMALLER, VARIANTS[name].larger)]
        table.add_row(name, f"{slope:.2f}", sizes[0], f"{low / GIB:.2f}", sizes[1], f"{high / GIB:.2f}")
    console.print(table)
    ratio = rows[first][0] / rows[last][0]
    console.print(f"{first} to {last}: {ratio:.2f}")
    raise SystemExit(ratio < MIN_RATIO)


if __name__ == "__main__":
    typer.run(main)
