"""How long a call to a worker may take: as the config says, or in proportion to what the same call took before."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import get_args

from configs.schema import DeadlineSettings, Role
from workers.api import Phase, RemoteMethod

BACKWARD = 3.0
"""What a forward and a backward pass of a token cost together, in forward passes."""
_REMEMBERED = 20
"""Deadlines are derived from so many of the latest calls of a method: a machine may become slower, so that old calls mislead."""


@dataclass(frozen=True)
class Cost:
    """What a call costs, in units of two kinds. The time of a call is at most proportional to the larger of the two."""

    tokens: float = 1.0
    """Tokens through a model, over all ranks; one that is trained on counts `BACKWARD` times."""
    steps: float = 1.0
    """What comes one after the other however few tokens there are: tokens of an engine's longest answer, micro-batches that are
    scored, updates of a model's weights."""

    def times(self, other: Cost) -> float:
        """How many times as long as the other this may take, at least 1: small calls have fixed costs too. Infinite where this
        needs units of a kind of which the other needed none."""
        return max(1.0, _ratio(self.tokens, other.tokens), _ratio(self.steps, other.steps))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf if a else 0.0


@dataclass(frozen=True)
class Awaited:
    """The call that the driver waits for; of several, the one with the next deadline."""

    role: Role
    ranks: tuple[int, ...]
    """Those that have not replied."""
    method: str
    since: float
    """Seconds since the epoch, as is `until`, its deadline."""
    until: float
    setting: str
    """Dotted path of the setting that bounds it."""


class Deadlines:
    """The deadlines of a team's calls.

    A method that was called before gets `timeout_factor` times what its latest calls took, in proportion to the cost where
    that is higher than theirs was, and at least `min_timeout` seconds; a call unlike all before gets `initial_timeout`. Where
    the config sets the time of a phase, each call of that phase gets it.
    """

    def __init__(self, settings: DeadlineSettings) -> None:
        self._settings = settings
        self._seen: dict[str, deque[tuple[Cost, float]]] = {}
        self._missed: Counter[str] = Counter()
        self.awaited: Awaited | None = None
        """The call that the driver waits for now."""
        self.busy: dict[tuple[Role, str], float] = defaultdict(float)
        """Seconds that finished calls took, by role and name of the method."""

    def seconds(self, method: RemoteMethod, cost: Cost) -> float:
        """Seconds for a call that costs at most so much."""
        settings = self._settings
        if fixed := getattr(settings, method.phase):
            return float(fixed)
        expected = [seconds * cost.times(actual) for actual, seconds in self._seen.get(method.name, ())]
        if not (known := [seconds for seconds in expected if math.isfinite(seconds)]):
            return settings.initial_timeout
        # Who was slow and healthy must not be ended again and again: the next attempt gets twice the time.
        return max(settings.min_timeout, settings.timeout_factor * max(known)) * 2.0 ** self._missed[method.name]

    def observe(self, method: RemoteMethod, cost: Cost, seconds: float) -> None:
        """Record that a call of this cost took so many seconds."""
        self._seen.setdefault(method.name, deque(maxlen=_REMEMBERED)).append((cost, seconds))
        self._missed[method.name] = 0

    def missed(self, method: RemoteMethod) -> None:
        """Record that a call did not end by its deadline."""
        self._missed[method.name] += 1

    def taken(self) -> dict[tuple[Role, str], float]:
        """What `busy` holds since this was last called."""
        taken, self.busy = self.busy, defaultdict(float)
        return taken

    def setting(self, method: RemoteMethod) -> str:
        """Dotted path of the setting that bounds a call."""
        return (
            f"deadlines.{method.phase}"
            if getattr(self._settings, method.phase)
            else "deadlines.initial_timeout, .min_timeout and .timeout_factor"
        )


assert set(get_args(Phase)) <= set(DeadlineSettings.model_fields)
