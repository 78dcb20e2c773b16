"""Whether a change leaves results as they were, bit for bit.

    python -m examples.movies prepare
    python -m benchmarks.unchanged COMMIT     # the working tree against an earlier commit, on this machine

Both run the three stages of the tests' micro model, and tiny's SFT, reward model and first 10 PPO steps. Compared are all
metrics, under their present names, but for clocks and memory; the texts of all answers that were kept; and the weights of
every stage. The last line is the number of values that differ; the exit status is 1 unless it is 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from orchestrator.storage.metrics_file import read_lines, repeatable

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "rm", "ppo")
_WRITE_MICRO = """
import sys
from pathlib import Path
try:
    from tests.support.micro import write_micro
except ModuleNotFoundError:  # before tests had folders
    from tests.micro import write_micro
write_micro(Path(sys.argv[1]))
"""


def main(commit: Annotated[str, typer.Argument(help="The commit to compare with.")]) -> None:
    with tempfile.TemporaryDirectory(prefix="troupe-unchanged-") as name:
        folder, before = Path(name), Path(name) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", before, commit], cwd=ROOT, check=True)
        try:
            (before / "data").mkdir(exist_ok=True)
            (before / "data" / "movies").symlink_to(ROOT / "data" / "movies")
            runs = [_runs(checkout, folder / side) for side, checkout in (("then", before), ("now", ROOT))]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
        differing = compared = 0
        for then, now in zip(*runs, strict=True):
            for text, same in _compare(then, now):
                compared += 1
                if not same:
                    differing += 1
                    print(f"{now.name}: {text}")
    print(f"{differing} of {compared} values differ")
    raise typer.Exit(differing > 0)


def _runs(checkout: Path, folder: Path) -> list[Path]:
    """Run both in a checkout; the runs' folders."""
    folder.mkdir()
    micro = folder / "micro"
    subprocess.run([sys.executable, "-c", _WRITE_MICRO, micro], cwd=checkout, check=True, capture_output=True)
    _pipeline(checkout, str(micro / "config.yaml"), "placement.cpus_per_device=0.4")
    _pipeline(checkout, "configs/movies/tiny.yaml", f"runs={folder}", "ppo.steps=10")
    return [micro / "runs" / "micro", folder / "movies-tiny"]


def _pipeline(checkout: Path, *args: str) -> None:
    command = [sys.executable, "-m", "troupe", "pipeline", *args]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=env, check=True, stdout=subprocess.DEVNULL)


def _compare(then: Path, now: Path) -> list[tuple[str, bool]]:
    """What was compared, and whether it is the same."""
    found: list[tuple[str, bool]] = []
    for stage in STAGES:
        lines = [{line["step"]: line for line in repeatable(folder, stage)} for folder in (then, now)]
        for step in sorted(lines[0].keys() | lines[1].keys()):
            a, b = (each.get(step, {}) for each in lines)
            found += [(f"{stage} step {step} {name}", _same(a, b, name)) for name in sorted(a.keys() | b.keys())]
        a, b = (load_file(folder / "models" / stage / "model.safetensors") for folder in (then, now))
        found += [
            (f"{stage} weights {name}", name in a and name in b and torch.equal(_bits(a[name]), _bits(b[name])))
            for name in sorted(a.keys() | b.keys())
        ]
    answers = [read_lines(folder / "samples" / "ppo.jsonl") for folder in (then, now)]
    found.append(("kept answers", json.dumps(answers[0]) == json.dumps(answers[1])))
    return found


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1).view(torch.uint8)


def _same(a: dict[str, Any], b: dict[str, Any], name: str) -> bool:
    return name in a and name in b and a[name] == b[name]


if __name__ == "__main__":
    typer.run(main)
