"""Which families of language models Troupe trains and serves right.

    python -m benchmarks.families [--only qwen3_moe,mixtral] [--minutes 14] [--again]

Makes a tiny random model of each family and checks it (benchmarks.families.checks), each in processes of its own with a time
limit: a crash costs one family. What was found is kept in a file, so that further runs go on where the one before ended. Writes
docs/models.md; the last line is `N families: R right, S refused, 0 wrong`; exits with 1 where one is wrong.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

LIMIT = 240.0
"""Seconds for one of a family's two processes."""


def main(
    only: Annotated[str, typer.Option(help="Families, with commas between; none: all.")] = "",
    minutes: Annotated[float, typer.Option(help="Begin no further family after so many.")] = 60.0,
    again: Annotated[bool, typer.Option(help="Check anew what was found before.")] = False,
    results: Annotated[Path, typer.Option(help="File that keeps what was found.")] = Path("runs/families.json"),
    document: Annotated[Path, typer.Option(help="The table.")] = Path("docs/models.md"),
) -> None:
    started = time.monotonic()
    _prepare()
    from benchmarks.families import report
    from benchmarks.families.isolation import check
    from benchmarks.families.zoo import FAMILIES

    if unknown := {*filter(None, only.split(","))} - FAMILIES.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: no such families; there are {', '.join(FAMILIES)}")
    found = report.read(results)
    for name in [name for name in FAMILIES if not only or name in only.split(",")]:
        if (name in found and not again) or time.monotonic() - started > 60 * minutes:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = check(name, Path(scratch), LIMIT)
        report.write(results, found)
        detail = "; ".join(found[name].wrong) or "; ".join(found[name].reasons())
        print(f"{name}: {found[name].verdict} ({time.monotonic() - began:.0f} s) {detail}", flush=True)
    document.write_text(report.table(found), encoding="utf-8")
    counts = {
        verdict: sum(family.verdict == verdict for family in found.values())
        for verdict in ("right", "refused", "wrong")
    }
    print(f"{len(found)} families: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    sys.exit(counts["wrong"] > 0)


def _prepare() -> None:
    """The environment of workers, before anything heavy is imported."""
    from configs.schema import RunConfig
    from workers.process.worker import environment

    config = RunConfig.model_validate({"name": "families", "model": {"path": "model", "dtype": "float32"}})
    os.environ.update(environment(config, "rollout", "cpu", threads=1))
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules["triton"] = None  # type: ignore[assignment]  # as in a worker


if __name__ == "__main__":
    typer.run(main)
