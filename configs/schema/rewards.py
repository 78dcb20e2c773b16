"""Where rewards come from."""

from __future__ import annotations

import math
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, field_validator

from configs.annotations import Called
from configs.schema.base import FunctionPath, ModelPath, Seconds, Settings


class ModelReward(Settings):
    """A trained reward model."""

    kind: Literal["model"] = "model"
    name: str = "model"
    """Name in metrics."""
    path: ModelPath | None = None
    """Folder of the model; none: what the rm stage of this run trained, or of the run that `start_from` names."""
    tokenizer: Literal["policy", "own"] = "policy"
    """policy: it scores the policy's tokens, so its tokenizer, chat template and end tokens must be the policy's (checked before
    the start). own: answers are decoded, and prompt and answer tokenised by its own tokenizer and chat template."""
    weight: float = 1.0
    """Factor in the sum of rewards."""


class FunctionSettings(Settings):
    """A Python function (prompts, answers, **columns) -> one score per answer, in a process of its own."""

    name: str
    """Name in metrics."""
    function: FunctionPath
    """module:function, importable from the folder that the run was started in."""
    timeout: Seconds = 60.0
    """Seconds for one call; past them its process is killed, and the call's answers have no score."""
    batch_size: PositiveInt | None = None
    """Answers in one call, which share its timeout and its errors; none: all that a reward worker has."""
    start_timeout: Seconds = 120.0
    """Seconds for its process to start and import the function."""

    def longest(self, answers: int) -> float:
        """Seconds that so many answers may take at worst."""
        calls = math.ceil(answers / self.batch_size) if self.batch_size else 1
        return calls * (self.start_timeout + self.timeout)


class FunctionReward(FunctionSettings):
    """A Python function (prompts, answers, **columns) -> one score per answer (docs/rewards.md)."""

    kind: Literal["function"] = "function"
    weight: float = 1.0
    """Factor in the sum of rewards."""


class HttpReward(Settings):
    """A service that is asked over HTTP (docs/rewards.md)."""

    kind: Literal["http"] = "http"
    name: str
    """Name in metrics."""
    url: Annotated[
        str,
        Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$"),
        Called("http:// or https:// address without user, password, query and spaces"),
    ]
    """Where requests are posted, without user, password and query."""
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$"), Called("name of an environment variable")] | None = None
    """Environment variable, of the driver and of the nodes, with the token that is sent as `Authorization: Bearer`."""
    timeout: Seconds = 300.0
    """Seconds for all answers of a reward worker, retries included; what has no score by then has timed out."""
    request_timeout: Seconds = 30.0
    """Seconds for one request, from the connection to the last byte."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3
    """Further attempts after a failed connection, a timeout, or an answer 429 or 5xx."""
    batch_size: PositiveInt = 32
    """Answers in one request."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests at a time, of each reward worker."""
    max_response_bytes: PositiveInt = 2**20
    """Longest response; a longer one is an error."""
    samples: bool = False
    """Send records of the answers too: token ids, whether they ended by themselves, sample number, step."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    @field_validator("url")
    @classmethod
    def _has_a_port(cls, url: str) -> str:
        try:
            urlsplit(url).port  # noqa: B018  reads it
        except ValueError as error:
            raise ValueError(f"was {url!r}: {error}") from None
        return url

    def longest(self, answers: int) -> float:
        """Seconds that so many answers may take at worst."""
        return self.timeout


Reward = Annotated[ModelReward | FunctionReward | HttpReward, Field(discriminator="kind")]


class Judge(FunctionSettings):
    """A function that scores answers in evaluations only, never in training."""
