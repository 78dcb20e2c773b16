"""Advantages, per token and per response."""

from __future__ import annotations

from typing import Literal

from configs.schema.base import Settings


class GAEAdvantage(Settings):
    """Generalised advantage estimation (Schulman et al. 2016), per token. Needs the critic."""

    kind: Literal["gae"] = "gae"


class ReinforceAdvantage(Settings):
    """Discounted rewards to go, less their mean over the step's responses (Williams 1992), per token."""

    kind: Literal["reinforce"] = "reinforce"


class AnswerAdvantageSettings(Settings):
    """Base of the settings of advantages per response, which need no critic: those of plugins."""
