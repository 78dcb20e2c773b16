"""The lines that a run prints before it starts: a summary of its plan. `troupe plan` prints the whole plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from orchestrator.algorithms import Algorithm
from orchestrator.run import Run
from placement.cluster import resource_text
from placement.types import GroupPlan, Plan


def print_run_header(run: Run, algorithms: Sequence[Algorithm], plans: Sequence[Plan], console: Console) -> None:
    """Print a line for the run, and for each unfinished stage its steps, roles with bundles, and batch arithmetic."""
    cluster, device = plans[0].cluster, plans[0].device
    head = Text.assemble((run.config.name, "bold"), f" in {run.folder}, on {device}: {cluster.describe()}")
    console.print(head, soft_wrap=True)
    if finished := [stage for stage in run.stages if run.finished(stage)]:
        console.print(f"  finished before: {', '.join(finished)}", soft_wrap=True)
    if external_models := run.external_models([algorithm.name for algorithm in algorithms]):
        owners = {stage: owner.folder for stage in external_models if (owner := run.owner(stage))}
        models = ", ".join(str(folder / "models" / stage) for stage, folder in owners.items())
        console.print(Text(f"  models of other runs (start_from): {models}"), soft_wrap=True)
    for algorithm, plan in zip(algorithms, plans, strict=True):
        checkpoints = run.checkpoints(algorithm.name)
        start = f", from the checkpoint after step {checkpoints[-1]}" if checkpoints else ""
        line = f"{algorithm.steps:,} steps{start} · {_roles(plan)} · {plan.batch.description[0]}"
        console.print(Text.assemble("  ", (plan.stage.ljust(5), "bold"), line), soft_wrap=True)
        if len(plan.batch.description) > 1:
            console.print(Text(f"       {plan.batch.description[-1]}"), soft_wrap=True)


def _roles(plan: Plan) -> str:
    """`actor + reference: 2 x (8 CPU, 1 GPU)`: the groups, equal ones together, and their nodes if there are several."""
    by_bundles: dict[str, list[str]] = {}
    for group in plan.groups:
        by_bundles.setdefault(_bundles(group, plan), []).append(" + ".join(group.roles))
    return "; ".join(
        f"{', '.join(groups)}: {'each ' if len(groups) > 1 else ''}{bundles}" for bundles, groups in by_bundles.items()
    )


def _bundles(group: GroupPlan, plan: Plan) -> str:
    text = f"{len(group.bundles)} x ({resource_text(group.bundles[0])})"
    if len(plan.cluster.nodes) == 1:
        return text
    return f"{text} on {', '.join(f'{node} ({count})' for node, count in Counter(group.nodes).items())}"
