"""What a run's report says of its history: models that came from other runs, and settings that were changed on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def history(folder: Path) -> dict[str, str]:
    """Facts from a run's run.json, by their titles; empty where there is nothing to tell."""
    path = folder / "run.json"
    noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    facts = {
        "Starts from": " · ".join(_starts(noted.get("from", {}))),
        "Settings changed": " · ".join(map(_change, noted.get("changes", []))),
    }
    return {title: text for title, text in facts.items() if text}


def _starts(starts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """`ppo: a/models/sft, a/models/rm` of what a stage took from run a."""
    for stage, start in starts.items():
        models = map(Path, [start["model"], *start.get("rewards", {}).values()])
        theirs = ["/".join(path.parts[-3:]) for path in models if path.is_absolute() and path.parent.name == "models"]
        if theirs:
            yield f"{stage}: {', '.join(dict.fromkeys(theirs))}"


def _change(change: Mapping[str, Any]) -> str:
    """`ppo after step 3: seed 1 -> 2`."""
    changed = ", ".join(f"{path} {old} -> {new}" for path, (old, new) in change["settings"].items())
    return f"{change['stage']} after step {change['after']}: {changed}"
