"""What an algorithm is: the data and models that it needs, its roles, and what one step does.

    class Mine(Algorithm):
        spec = StageSpec("mine", ...)      # roles, and what plan and report must know
        Config = MySettings                # of a plugin: the section `mine:` of the settings
        def step(self, step): ...

A subclass that names a spec is entered under its name, and a run whose settings have the section goes through it. Everything
around the steps (workers, recovery, checkpoints, metrics, export) is the Runner's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from configs.extensions import add_section
from configs.schema import ModelSettings, Role, RunConfig, Settings
from orchestrator.preflight.model_checks import Head, ModelUse
from orchestrator.preflight.preflight import Input
from orchestrator.preflight.settings_checks import Check
from orchestrator.run.run_dir import Run, local
from orchestrator.worker_groups.team import Team
from placement.stages import StageSpec, register
from workers.data import Counts

ALGORITHMS: dict[str, type[Algorithm]] = {}
"""Stage -> its algorithm."""


class Context(Protocol):
    """What the Runner gives an algorithm while its stage runs."""

    team: Team
    """The worker groups; others after a restart."""
    seconds: dict[str, float]
    """Seconds of each phase since the last recorded step."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times a part of a step as `seconds/<name>`."""

    def show(self, text: str) -> None:
        """Say what goes on outside of steps, in the progress line."""

    def spent(self) -> dict[str, float]:
        """Metrics: seconds of the phases, memory of the roles."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics that are not those of a step that ends: of an evaluation before the first."""

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        """Keep sampled answers of a step in samples/<stage>.jsonl."""

    def warn(self, text: str) -> None:
        """Say something that the user should know."""

    def sparing(self, consequence: str) -> AbstractContextManager[None]:
        """For what the trained model does not depend on: an error in the block is recorded, and the stage goes on without it."""


class Algorithm(ABC):
    """One stage of a run: what is trained, on what, how."""

    spec: ClassVar[StageSpec]
    Config: ClassVar[type[Settings] | None] = None
    """Settings of its section, where Troupe's own do not have it."""
    context: Context
    """Set by the Runner."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "spec" in cls.__dict__:
            register(cls.spec)
            if cls.Config is not None:
                add_section(cls.spec.name, cls.Config)
            ALGORITHMS[cls.spec.name] = cls

    def __init__(self, run: Run) -> None:
        self.run = run
        self.data: dict[str, Any] = {}
        """Tokenised datasets by name."""
        self.counts: dict[str, Counts] = {}
        """How many of their rows were read, kept, cut and dropped."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def team(self) -> Team:
        return self.context.team

    def trained(self) -> list[Role]:
        """The roles that learn; the first one's model is the stage's result."""
        roles = self.spec.roles(self.config)
        return [role for role in self.spec.trained if role in roles]

    # ------------------------------------------------------------ before the start

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many steps there are."""

    @property
    @abstractmethod
    def learns_from(self) -> str:
        """Name of the dataset that the stage learns from."""

    @abstractmethod
    def inputs(self) -> list[Input]:
        """The datasets that it needs; the preflight reads and tokenises them."""

    @abstractmethod
    def models(self) -> list[ModelUse]:
        """The models that it needs and that are there before the run starts."""

    def text_model(self) -> tuple[str, str, ModelSettings]:
        """Setting, path and settings of the model whose tokenizer reads the data."""
        return "model", self.run.text_model(self.name), self.config.model

    def readers(self) -> list[ModelUse]:
        """The models that are to read the policy's tokens, or will be trained from these."""
        return []

    def start_use(self, heads: Iterable[Head], **needs: Any) -> ModelUse:
        """What is needed of the model that the stage starts from, or that one before it will have been trained from."""
        setting, path, settings = self.text_model()
        if path != local(settings.path):  # a finished stage's model, which has weights
            settings = settings.model_copy(update={"init": "pretrained"})
        return ModelUse(f"{setting}.path", path, settings, frozenset(heads), learns=True, **needs)

    def take(self, name: str, encoded: Any, counts: Counts) -> None:
        """Keep a dataset's token ids until they are loaded."""
        self.data[name], self.counts[name] = encoded, counts

    def data_checks(self) -> Iterable[Check]:
        """Further checks of the datasets, once all are kept; each raises an error that says what is wrong."""
        return ()

    # ------------------------------------------------------------ the stage

    @abstractmethod
    def load(self) -> None:
        """Load models and data into the workers. Done again when all of them had to be started anew."""

    def begin(self) -> None:  # noqa: B027  most have none
        """What comes before the first step."""

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Do a step; its metrics. A function of the step and of what `state`, models and optimizers hold: after a fault the
        steps since the latest snapshot are done again, and must give the same."""

    def complete(self) -> None:  # noqa: B027  most have none
        """What the trained model still needs before it is exported."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """Final numbers, for the summary; the model is exported."""

    def state(self) -> dict[str, Any]:
        """What steers the algorithm and is not a function of the step; JSON."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027  most have none
        """Take up what `state` gave."""
