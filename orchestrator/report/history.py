"""The history of a run, for its report: models of other runs, and settings that changed during the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def history(folder: Path) -> dict[str, str]:
    """Title -> text, from the run's run.json; empty if no setting changed and no model came from another run."""
    path = folder / "run.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    facts = {
        "Starts from": " · ".join(_starts(record.get("from", {}))),
        "Settings changed": " · ".join(map(_change, record.get("changes", []))),
    }
    return {title: text for title, text in facts.items() if text}


def _starts(starts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """`ppo: a/models/sft, a/models/rm` if a stage starts from models of the run a."""
    for stage, start in starts.items():
        models = map(Path, [start["model"], *start.get("rewards", {}).values()])
        external = ["/".join(path.parts[-3:]) for path in models if path.is_absolute() and path.parent.name == "models"]
        if external:
            yield f"{stage}: {', '.join(dict.fromkeys(external))}"


def _change(change: Mapping[str, Any]) -> str:
    """`ppo after step 3: seed 1 -> 2`."""
    changed = ", ".join(f"{path} {old} -> {new}" for path, (old, new) in change["settings"].items())
    return f"{change['stage']} after step {change['after']}: {changed}"
