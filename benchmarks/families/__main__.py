"""Checks which model families Troupe trains and serves correctly.

    python -m benchmarks.families [--only qwen3_moe,mixtral] [--minutes 14] [--again]

Makes a tiny random model of each family and checks it (benchmarks.families.checks) in subprocesses with a time limit: a crash
affects one family only. The results are saved in a file, so that a further run continues there. Writes docs/models.md; the last
line is `N families: R right, S refused, 0 wrong`; the exit status is 1 if one is wrong.
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
    only: Annotated[str, typer.Option(help="Families, comma-separated; default: all.")] = "",
    minutes: Annotated[float, typer.Option(help="Start no further family after this time.")] = 60.0,
    again: Annotated[bool, typer.Option(help="Check families again that have results.")] = False,
    results: Annotated[Path, typer.Option(help="File with the results.")] = Path("runs/families.json"),
    document: Annotated[Path, typer.Option(help="Document to write.")] = Path("docs/models.md"),
) -> None:
    started = time.monotonic()
    _prepare()
    from benchmarks.families import report
    from benchmarks.families.isolation import check
    from benchmarks.families.zoo import FAMILIES

    if unknown := {*filter(None, only.split(","))} - FAMILIES.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: unknown families; must be of {', '.join(FAMILIES)}")
    families = report.read(results)
    for name in [name for name in FAMILIES if not only or name in only.split(",")]:
        if (name in families and not again) or time.monotonic() - started > 60 * minutes:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            families[name] = check(name, Path(scratch), LIMIT)
        report.write(results, families)
        detail = "; ".join(families[name].wrong) or "; ".join(families[name].reasons())
        print(f"{name}: {families[name].verdict} ({time.monotonic() - began:.0f} s) {detail}", flush=True)
    document.write_text(report.table(families), encoding="utf-8")
    counts = {
        verdict: sum(family.verdict == verdict for family in families.values())
        for verdict in ("right", "refused", "wrong")
    }
    print(f"{len(families)} families: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    sys.exit(counts["wrong"] > 0)


def _prepare() -> None:
    """Set the workers' environment variables, before torch and vLLM are imported."""
    from configs.schema import RunConfig
    from workers.process.worker import environment

    config = RunConfig.model_validate({"name": "families", "model": {"path": "model", "dtype": "float32"}})
    os.environ.update(environment(config, "rollout", "cpu", threads=1))
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules["triton"] = None  # type: ignore[assignment]  # as in a worker


if __name__ == "__main__":
    typer.run(main)
