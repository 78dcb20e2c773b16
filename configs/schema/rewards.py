"""Reward sources and judges."""

from __future__ import annotations

import math
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, field_validator

from configs.annotations import DisplayName
from configs.schema.base import FunctionPath, ModelPath, Seconds, Settings


class ModelReward(Settings):
    """A trained reward model."""

    kind: Literal["model"] = "model"
    name: str = "model"
    """Name in metrics."""
    path: ModelPath | None = None
    """Folder of the model; none: the model trained by the rm stage of this run or of the run in `start_from`."""
    tokenizer: Literal["policy", "own"] = "policy"
    """policy: it scores the policy's tokens, so its tokenizer, chat template and end tokens must be the policy's (checked before
    the start). own: responses are decoded, and prompt and response are tokenized with its own tokenizer and chat template."""
    weight: float = 1.0
    """Factor in the sum of rewards."""


class FunctionSettings(Settings):
    """A Python function (prompts, answers, **columns) -> one score per response, in its own process."""

    name: str
    """Name in metrics."""
    function: FunctionPath
    """module:function, importable from the folder in which the run was started."""
    timeout: Seconds = 60.0
    """Seconds for one call; then its process is killed, and the call's responses have no score."""
    batch_size: PositiveInt | None = None
    """Responses in one call; a timeout or error concerns all of them. none: all responses of a reward worker."""
    start_timeout: Seconds = 120.0
    """Seconds for its process to start and to import the function."""

    def longest(self, responses: int) -> float:
        """Most seconds that `responses` responses may take."""
        calls = math.ceil(responses / self.batch_size) if self.batch_size else 1
        return calls * (self.start_timeout + self.timeout)


class FunctionReward(FunctionSettings):
    """A Python function (prompts, answers, **columns) -> one score per response (docs/rewards.md)."""

    kind: Literal["function"] = "function"
    weight: float = 1.0
    """Factor in the sum of rewards."""


class HttpReward(Settings):
    """An HTTP service that scores responses (docs/rewards.md)."""

    kind: Literal["http"] = "http"
    name: str
    """Name in metrics."""
    url: Annotated[
        str,
        Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$"),
        DisplayName("http:// or https:// address without user, password, query and spaces"),
    ]
    """Address for POST requests, without user, password and query."""
    token_env: (
        Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$"), DisplayName("name of an environment variable")] | None
    ) = None
    """Environment variable, on the driver and on the nodes, with the token to send as `Authorization: Bearer`."""
    timeout: Seconds = 300.0
    """Seconds for all responses of a reward worker, retries included; responses without a score by then have timed out."""
    request_timeout: Seconds = 30.0
    """Seconds for one request, from the connection to the last byte."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3
    """Further attempts after a failed connection, a timeout, or HTTP status 429 or 5xx."""
    batch_size: PositiveInt = 32
    """Responses in one request."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Most concurrent requests of each reward worker."""
    max_response_bytes: PositiveInt = 2**20
    """Largest HTTP response; a larger one is an error."""
    samples: bool = False
    """Also send a record of each response: token ids, whether it ended by itself, sample number, step."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    @field_validator("url")
    @classmethod
    def _has_a_port(cls, url: str) -> str:
        try:
            urlsplit(url).port  # noqa: B018  raises for an invalid port
        except ValueError as error:
            raise ValueError(f"was {url!r}: {error}") from None
        return url

    def longest(self, responses: int) -> float:
        """Most seconds that `responses` responses may take."""
        return self.timeout


Reward = Annotated[ModelReward | FunctionReward | HttpReward, Field(discriminator="kind")]


class Judge(FunctionSettings):
    """A function that scores responses in evaluations only, never in training."""
