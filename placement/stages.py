"""What plan, run folder and report must know of a stage: its name, settings, roles and phases.

What a stage does is in orchestrator.algorithms; each algorithm names its spec, and a plugin's algorithm brings its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from configs.schema import FixedKL, Role, RunConfig

Phase = Literal["load", "generate", "score", "train", "weight_sync", "save"]
SUPERVISED: tuple[Phase, ...] = ("load", "train", "save")
WITH_ENGINES: tuple[Phase, ...] = ("load", "generate", "score", "train", "weight_sync", "save")


@dataclass(frozen=True)
class StageSpec:
    """A stage, as far as it is not its algorithm."""

    name: str
    """Its section of the settings, its folder of checkpoints and models, its name in metrics."""
    title: str
    """For the report: "Reward model"."""
    short_title: str
    """For the terminal: "reward model"."""
    roles: Callable[[RunConfig], tuple[Role, ...]]
    """The roles that it asks for; no other is placed."""
    trained: tuple[Role, ...]
    """Those that learn, of them the ones that it asks for; the first one's model is the stage's result."""
    concurrent: tuple[tuple[Role, ...], ...]
    """Roles that run at the same time. The phases take turns; so do the roles of one group within a phase."""
    phases: tuple[Phase, ...] = SUPERVISED
    """Phases in which its memory differs."""
    settings: tuple[str, ...] = ()
    """Sections that no other stage reads, beside its own: they may change until it has begun."""
    workers: Mapping[Role, str] = field(default_factory=dict)
    """Class of a role's workers, module:name, where it is not the usual one of the role."""
    rows: str = "rows"
    """What an optimizer step's rows are called, of a stage that trains on a dataset."""
    sequences_per_row: int = 1
    """Sequences of a row that go through the model together: 2 of a pair."""
    chats: bool = True
    """Whether its result is a language model, to talk to and to train further."""


def _ppo_roles(config: RunConfig) -> tuple[Role, ...]:
    """Without a KL penalty there is no reference, without values no critic."""
    ppo = config.ppo
    assert ppo is not None
    control = ppo.kl.controller
    penalised = not (isinstance(control, FixedKL) and control.coefficient == 0)
    asked: dict[Role, bool] = {"critic": ppo.critic, "reference": penalised}
    roles: tuple[Role, ...] = ("actor", "critic", "reference", "reward", "rollout")
    return tuple(role for role in roles if asked.get(role, True))


SFT = StageSpec(
    name="sft",
    title="Supervised fine-tuning",
    short_title="SFT",
    roles=lambda config: ("actor",),
    trained=("actor",),
    concurrent=(("actor",),),
)
REWARD_MODEL = StageSpec(
    name="rm",
    title="Reward model",
    short_title="reward model",
    roles=lambda config: ("reward",),
    trained=("reward",),
    concurrent=(("reward",),),
    workers={"reward": "workers.training.value:ValueWorker"},
    rows="pairs",
    sequences_per_row=2,
    chats=False,
)
PPO = StageSpec(
    name="ppo",
    title="PPO",
    short_title="PPO",
    roles=_ppo_roles,
    trained=("actor", "critic"),
    concurrent=(("rollout",), ("reference", "critic", "reward"), ("actor", "critic")),
    phases=WITH_ENGINES,
    settings=("rollout", "weight_sync"),
)

STAGES: dict[str, StageSpec] = {}
"""All stages by name, in the order in which a run goes through those that its settings describe."""


def register(spec: StageSpec) -> None:
    """Enter a stage. Raises ValueError where another one has its name."""
    known = STAGES.setdefault(spec.name, spec)
    if known.title != spec.title:
        raise ValueError(f"stage {spec.name}: the name is taken by {known.title!r}")


for _spec in (SFT, REWARD_MODEL, PPO):
    register(_spec)
