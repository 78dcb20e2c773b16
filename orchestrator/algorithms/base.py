"""The interface of an algorithm: its data, models and roles, and one step.

    class Mine(Algorithm):
        spec = StageSpec("mine", ...)      # roles, and facts for plan and report
        Config = MySettings                # of a plugin: the section `mine:` of the settings
        def step(self, step): ...

A subclass with a spec is registered under the spec's name; a run whose settings have that section includes the stage. The
Runner does everything around the steps: workers, recovery, checkpoints, metrics, export.
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
    """The Runner as an algorithm sees it while its stage runs."""

    team: Team
    """The worker groups; a new team after a restart."""
    seconds: dict[str, float]
    """Seconds of each phase since the last recorded step."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a part of a step as `seconds/<name>`."""

    def show(self, text: str) -> None:
        """Show the current work outside of steps in the progress line."""

    def spent(self) -> dict[str, float]:
        """Metrics: seconds of the phases, memory of the roles."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics outside of a step, such as those of the evaluation before the first step."""

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        """Write sampled responses of a step to samples/<stage>.jsonl."""

    def warn(self, text: str) -> None:
        """Show a warning to the user."""

    def sparing(self, consequence: str) -> AbstractContextManager[None]:
        """For work that the trained model does not depend on: an error in the block is recorded, and the stage goes on."""


class Algorithm(ABC):
    """One stage of a run: what is trained, on which data, and how."""

    spec: ClassVar[StageSpec]
    Config: ClassVar[type[Settings] | None] = None
    """Settings of its section, if the section is not one of Troupe's own."""
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
        """Number of rows read, kept, cut and dropped, by dataset."""

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
        """The trained roles; the model of the first one is the result of the stage."""
        roles = self.spec.roles(self.config)
        return [role for role in self.spec.trained if role in roles]

    # ------------------------------------------------------------ before the start

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of steps."""

    @property
    @abstractmethod
    def learns_from(self) -> str:
        """Name of the training dataset."""

    @abstractmethod
    def inputs(self) -> list[Input]:
        """The datasets that it needs; the preflight reads and tokenises them."""

    @abstractmethod
    def models(self) -> list[ModelUse]:
        """The models that it needs and that exist before the run starts."""

    def text_model(self) -> tuple[str, str, ModelSettings]:
        """Setting, path and settings of the model whose tokenizer reads the data."""
        return "model", self.run.text_model(self.name), self.config.model

    def readers(self) -> list[ModelUse]:
        """The models that read the policy's tokens, or the models that those will be trained from."""
        return []

    def start_use(self, heads: Iterable[Head], **needs: Any) -> ModelUse:
        """Requirements on the starting model of the stage. If an earlier stage trains it, on that stage's starting model."""
        setting, path, settings = self.text_model()
        if path != local(settings.path):  # a finished stage's model, which has weights
            settings = settings.model_copy(update={"init": "pretrained"})
        return ModelUse(f"{setting}.path", path, settings, frozenset(heads), learns=True, **needs)

    def take(self, name: str, encoded: Any, counts: Counts) -> None:
        """Keep a dataset's token ids until they are loaded."""
        self.data[name], self.counts[name] = encoded, counts

    def data_checks(self) -> Iterable[Check]:
        """Further checks of the datasets, after all of them are tokenised; a failed check raises an error."""
        return ()

    # ------------------------------------------------------------ the stage

    @abstractmethod
    def load(self) -> None:
        """Load models and data into the workers. Repeated after a restart of all workers."""

    def begin(self) -> None:  # noqa: B027  most have none
        """Work before the first step."""

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Do a step; its metrics. It must depend only on the step, `state`, models and optimizers: after a failure the steps
        since the latest snapshot are repeated, and must have the same results."""

    def complete(self) -> None:  # noqa: B027  most have none
        """Work between the last step and the export."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """Final numbers for the summary; called after the export."""

    def state(self) -> dict[str, Any]:
        """State of the algorithm that is not a function of the step; JSON."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027  most have none
        """Restore a result of `state`."""
