"""What a run says before it starts: its plan in a few lines. `troupe plan` shows all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from orchestrator.algorithms.base import Algorithm
from orchestrator.run.run_dir import Run
from placement.cluster import resource_text
from placement.types import GroupPlan, Plan


def print_opening(run: Run, algorithms: Sequence[Algorithm], plans: Sequence[Plan], console: Console) -> None:
    """A line for the run; for each stage that is left its steps, its roles on their bundles and the batch arithmetic."""
    cluster, device = plans[0].cluster, plans[0].device
    head = Text.assemble((run.config.name, "bold"), f" in {run.folder}, on {device}: {cluster.describe()}")
    console.print(head, soft_wrap=True)
    if done := [stage for stage in run.stages if run.finished(stage)]:
        console.print(f"  finished before: {', '.join(done)}", soft_wrap=True)
    if taken := run.taken([algorithm.name for algorithm in algorithms]):
        owners = {stage: owner.folder for stage in taken if (owner := run.owner(stage))}
        models = ", ".join(str(folder / "models" / stage) for stage, folder in owners.items())
        console.print(Text(f"  models of other runs (start_from): {models}"), soft_wrap=True)
    for algorithm, plan in zip(algorithms, plans, strict=True):
        saved = run.checkpoints(algorithm.name)
        after = f", from the checkpoint after step {saved[-1]}" if saved else ""
        line = f"{algorithm.steps:,} steps{after} · {_roles(plan)} · {plan.batch.description[0]}"
        console.print(Text.assemble("  ", (plan.stage.ljust(5), "bold"), line), soft_wrap=True)
        if len(plan.batch.description) > 1:
            console.print(Text(f"       {plan.batch.description[-1]}"), soft_wrap=True)


def _roles(plan: Plan) -> str:
    """`actor + reference 2 x (8 CPU, 1 GPU)`: the groups, alike ones told once, and their nodes where there are several."""
    alike: dict[str, list[str]] = {}
    for group in plan.groups:
        alike.setdefault(_bundles(group, plan), []).append(" + ".join(group.roles))
    return "; ".join(
        f"{', '.join(groups)}: {'each ' if len(groups) > 1 else ''}{what}" for what, groups in alike.items()
    )


def _bundles(group: GroupPlan, plan: Plan) -> str:
    text = f"{len(group.bundles)} x ({resource_text(group.bundles[0])})"
    if len(plan.cluster.nodes) == 1:
        return text
    return f"{text} on {', '.join(f'{node} ({count})' for node, count in Counter(group.nodes).items())}"
