"""Rewards from an HTTP service; docs/rewards.md describes the contract."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from configs.schema import HttpReward
from workers.rewards.function import RewardError, SampleRecord
from workers.rewards.result import RewardResult, in_batches

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
"""Seconds: upper bound of the pause before the second attempt, which doubles with each further attempt, and its maximum."""
_OK, _TOO_MANY_REQUESTS, _SERVER_ERRORS = 200, 429, range(500, 600)


class Request(BaseModel):
    """Body of a request: lists of equal length."""

    prompts: list[Any]
    """Text, or a list of messages with role and content."""
    answers: list[str]
    columns: dict[str, list[Any]]
    """The dataset's other columns."""
    samples: list[SampleRecord] | None = None
    """Records of the answers; the key is sent only where the settings ask for it."""


class Response(BaseModel):
    """Body of a response; other keys are ignored."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    scores: list[Annotated[float | dict[str, Any] | None, Field(union_mode="left_to_right")]]
    """One per answer. null: no score; an object: the score under `score`, and further numbers to report."""


class _Failure(Exception):
    """A request without scores."""

    def __init__(self, why: str, retryable: bool = False, timed_out: bool = False) -> None:
        """retryable: another attempt may succeed."""
        super().__init__(why)
        self.retryable = retryable
        self.timed_out = timed_out


def read_token(name: str, setting: str) -> str:
    """The token in an environment variable. Raises RewardError, which names the setting and never shows the token."""
    token = os.environ.get(name, "").strip()
    if not token:
        raise RewardError(f"{setting}: the environment variable {name} is not set")
    if not (token.isascii() and token.isprintable()):
        raise RewardError(
            f"{setting}: the environment variable {name} holds characters that are not allowed in a header"
        )
    return token


def check_json(rows: Sequence[Mapping[str, Any]], setting: str, dataset: str) -> None:
    """Check that the rows' columns can be sent to a service as JSON.

    setting: dotted path of the reward. dataset: dotted path of the rows' setting, and their file, for the error.

    Raises:
        RewardError: names the first row, counted from 1, and the column.
    """
    any_value = TypeAdapter(Any)
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            try:
                any_value.dump_json(value)
            except (PydanticSerializationError, ValueError) as error:
                raise RewardError(
                    f"{setting}: a service accepts JSON, but the column {name} of row {number} of {dataset} cannot be written as "
                    f"JSON: {error}; remove the column from the dataset, or make it text or numbers"
                ) from None


class Endpoint:
    """The service behind a `kind: http` reward."""

    def __init__(self, settings: HttpReward, setting: str) -> None:
        """setting: dotted path of the settings. Raises RewardError where the token is missing."""
        self.settings = settings
        self.setting = setting
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if settings.token_env:
            self.headers["Authorization"] = f"Bearer {read_token(settings.token_env, f'{setting}.token_env')}"
        self._random = random.Random()  # separate: pauses must not change other random draws

    @property
    def wants_samples(self) -> bool:
        """Whether requests contain records of the answers."""
        return self.settings.samples

    def score(
        self,
        prompts: Sequence[Any],
        answers: Sequence[str],
        columns: dict[str, list],
        samples: Sequence[SampleRecord] | None = None,
    ) -> RewardResult:
        """Scores of the answers, in concurrent requests. samples: records, where the service wants them."""
        requests = [
            Request(
                prompts=list(batch_prompts),
                answers=list(batch_answers),
                columns=batch_columns,
                samples=None if records is None else list(records),
            )
            for batch_prompts, batch_answers, batch_columns, records in in_batches(
                prompts, answers, columns, samples, self.settings.batch_size
            )
        ]
        return RewardResult.join(asyncio.run(self._ask_all(requests)))

    async def _ask_all(self, requests: list[Request]) -> list[RewardResult]:
        gate = asyncio.Semaphore(self.settings.concurrency)
        async with aiohttp.ClientSession(
            headers=self.headers,
            timeout=aiohttp.ClientTimeout(total=self.settings.request_timeout),
            auto_decompress=False,  # a small compressed response could become very large
        ) as session:
            return await asyncio.gather(*(self._ask(session, gate, request) for request in requests))

    async def _ask(self, session: aiohttp.ClientSession, gate: asyncio.Semaphore, request: Request) -> RewardResult:
        count = len(request.answers)
        try:
            async with asyncio.timeout(self.settings.timeout), gate:
                return await self._scores(session, request)
        except _Failure as failure:
            return RewardResult.nothing(count, f"{self.settings.url} {failure}", failure.timed_out)
        except TimeoutError:
            why = f"{self.settings.url} gave no score in {self.settings.timeout:g} s ({self.setting}.timeout)"
            return RewardResult.nothing(count, why, timed_out=True)

    async def _scores(self, session: aiohttp.ClientSession, request: Request) -> RewardResult:
        try:
            body = request.model_dump_json(exclude=None if self.wants_samples else {"samples"}).encode()
        except PydanticSerializationError as error:
            raise _Failure(f"accepts JSON, but the rows' columns cannot be written as JSON: {error}") from None
        for attempt in itertools.count():
            try:
                return _read(await self._post(session, body), len(request.answers))
            except _Failure as failure:
                if not failure.retryable or attempt == self.settings.retries:
                    raise
            await asyncio.sleep(self._random.uniform(0, min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)))
        raise AssertionError("count() does not end")

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> bytes:
        """The body of the response. No error text shows it: a service may repeat the token in it."""
        try:
            async with session.post(self.settings.url, data=body, allow_redirects=False) as response:
                if response.status != _OK:
                    retryable = response.status == _TOO_MANY_REQUESTS or response.status in _SERVER_ERRORS
                    raise _Failure(f"answered with status {response.status}", retryable)
                content = bytearray()
                async for part in response.content.iter_any():
                    content += part
                    if len(content) > self.settings.max_response_bytes:
                        response.close()
                        limit = f"{self.settings.max_response_bytes} bytes ({self.setting}.max_response_bytes)"
                        raise _Failure(f"answered with more than {limit}")
                return bytes(content)
        except TimeoutError:
            why = f"gave no answer in {self.settings.request_timeout:g} s ({self.setting}.request_timeout)"
            raise _Failure(why, retryable=True, timed_out=True) from None
        except aiohttp.ClientError as error:
            why = f": {error}" if isinstance(error, OSError) else ""  # other errors may quote the response
            raise _Failure(f"failed: {type(error).__name__}{why}", retryable=True) from None


def _read(content: bytes, count: int) -> RewardResult:
    try:
        scores = Response.model_validate_json(content).scores
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"][:2])) or "body"  # the rest names the types that were tried
        raise _Failure(f"answered with something other than scores: {where}: {first['msg']}") from None
    if len(scores) != count:
        raise _Failure(f"answered with {len(scores)} scores for {count} answers")
    names = dict.fromkeys(name for each in scores if isinstance(each, dict) for name in each if name != "score")
    numbers = {name: [_number(each.get(name)) if isinstance(each, dict) else None for each in scores] for name in names}
    return RewardResult.of(
        [_number(each.get("score")) if isinstance(each, dict) else each for each in scores],
        {name: values for name, values in numbers.items() if any(value is not None for value in values)},
    )


def _number(value: Any) -> float | None:
    """An object's value as a float; None where it is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
