"""How long a call to a worker may take: set by the config, or in proportion to the time of earlier calls of the method."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import get_args

from configs.schema import DeadlineSettings, Role
from workers.api import Phase, RemoteMethod

BACKWARD = 3.0
"""Cost of a forward and a backward pass together, in forward passes."""
_REMEMBERED = 20
"""Number of a method's latest calls that deadlines are derived from: a machine may become slower, and old calls then mislead."""


@dataclass(frozen=True)
class Cost:
    """Cost of a call in two units. The time of a call grows at most in proportion to the one that grows more."""

    tokens: float = 1.0
    """Tokens through a model, over all ranks; a trained token counts `BACKWARD` times."""
    steps: float = 1.0
    """Operations in sequence, however few tokens there are: tokens of an engine's longest response, micro-batches that are
    scored, updates of a model's weights."""

    def times(self, other: Cost) -> float:
        """How many times as long as `other` this may take, at least 1: small calls have fixed costs too. Infinite if this has
        a unit above 0 that is 0 in `other`."""
        return max(1.0, _ratio(self.tokens, other.tokens), _ratio(self.steps, other.steps))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf if a else 0.0


@dataclass(frozen=True)
class Awaited:
    """The call that the driver waits for; with several calls, the one with the earliest deadline."""

    role: Role
    ranks: tuple[int, ...]
    """Ranks that have not replied."""
    method: str
    since: float
    """Start, in seconds since the epoch."""
    until: float
    """Deadline, likewise."""
    setting: str
    """Dotted path of the setting that gives the deadline."""


class Deadlines:
    """The deadlines of a team's calls.

    A call gets `timeout_factor` times the slowest of the method's latest calls, scaled up if its cost is higher, and at least
    `min_timeout` seconds. The first call of a method, or the first with a new kind of cost, gets `initial_timeout`. If the
    config sets the time of a phase, each call of that phase gets it.
    """

    def __init__(self, settings: DeadlineSettings) -> None:
        self._settings = settings
        self._seen: dict[str, deque[tuple[Cost, float]]] = {}
        self._missed: Counter[str] = Counter()
        self.awaited: Awaited | None = None
        """The call that the driver waits for."""
        self.busy: dict[tuple[Role, str], float] = defaultdict(float)
        """Seconds that finished calls took, by role and name of the method."""

    def seconds(self, method: RemoteMethod, cost: Cost) -> float:
        """Timeout of a call that costs at most `cost`."""
        settings = self._settings
        if fixed := getattr(settings, method.phase):
            return float(fixed)
        expected = [seconds * cost.times(actual) for actual, seconds in self._seen.get(method.name, ())]
        if not (finite := [seconds for seconds in expected if math.isfinite(seconds)]):
            return settings.initial_timeout
        # A slow, healthy worker must not be killed at every attempt: the next attempt gets twice the time.
        return max(settings.min_timeout, settings.timeout_factor * max(finite)) * 2.0 ** self._missed[method.name]

    def observe(self, method: RemoteMethod, cost: Cost, seconds: float) -> None:
        """Record the seconds of a call of this cost."""
        self._seen.setdefault(method.name, deque(maxlen=_REMEMBERED)).append((cost, seconds))
        self._missed[method.name] = 0

    def missed(self, method: RemoteMethod) -> None:
        """Record that a call missed its deadline."""
        self._missed[method.name] += 1

    def taken(self) -> dict[tuple[Role, str], float]:
        """`busy` since the last call of this method."""
        taken, self.busy = self.busy, defaultdict(float)
        return taken

    def setting(self, method: RemoteMethod) -> str:
        """Dotted path of the setting that gives the deadline of a method's calls."""
        return (
            f"deadlines.{method.phase}"
            if getattr(self._settings, method.phase)
            else "deadlines.initial_timeout, .min_timeout and .timeout_factor"
        )


assert set(get_args(Phase)) <= set(DeadlineSettings.model_fields)
