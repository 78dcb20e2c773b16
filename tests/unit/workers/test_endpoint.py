"""Rewards over HTTP, from a real local server that answers correctly, wrongly, late or not at all."""

from __future__ import annotations

import datetime
import socket
import time
from typing import Any

import numpy as np
import pytest

from configs.schema import HttpReward
from tests.support.services import Handler, Service, good, says
from workers.rewards import http
from workers.rewards.function import RewardError, SampleRecord
from workers.rewards.http import Endpoint, check_json
from workers.rewards.result import RewardResult

SETTING = "ppo.rewards.0"
TOKEN = "a-secret-of-the-service"


# ---------------------------------------------------------------- what the service does


def slow(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.closing.wait(30)


def one_at_a_time(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(0.2)
    good(handler, body)


def trickle(handler: Handler, body: dict[str, Any]) -> None:
    """Sends bytes at short intervals and never finishes."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b" ")


def endless(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    while not handler.server.closing.is_set():
        handler.wfile.write(b"1," * 2**15)


def hang_up(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_off(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1')
    hang_up(handler, body)


def repeat_token(handler: Handler, body: dict[str, Any]) -> None:
    handler.wfile.write(f"HTTP/1.1 {handler.headers['Authorization']}\r\n\r\n".encode())
    handler.close_connection = True


def wrong_for_bb(handler: Handler, body: dict[str, Any]) -> None:
    handler.answer(*((404, b"no") if "bb" in body["answers"] else (200, b'{"scores": [1.0]}')))


# ---------------------------------------------------------------- fixtures


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.01)


def make(url: str, **settings: Any) -> Endpoint:
    return Endpoint(HttpReward.model_validate({"name": "h", "url": url} | settings), SETTING)


def score(url: str, *answers: str, columns: dict[str, list] | None = None, **settings: Any) -> RewardResult:
    return make(url, **settings).score([f"to {answer}" for answer in answers], answers, columns or {})


def without(scored: RewardResult) -> tuple[int, int]:
    return scored.timeouts, scored.errors


# ---------------------------------------------------------------- answers


def test_what_is_sent_and_what_comes_back(service: Service) -> None:
    conversation = [{"role": "user", "content": "hé"}]
    result = make(service.url).score(["one", conversation], ["a", "bb"], {"label": [1.5, None]})
    assert result.values.tolist() == [1.0, 2.0] and result.values.dtype == np.float32 and without(result) == (0, 0)
    assert service.requests == [
        {"prompts": ["one", conversation], "answers": ["a", "bb"], "columns": {"label": [1.5, None]}}
    ]
    assert service.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in service.headers[0]


def test_records_of_the_answers_are_sent_where_the_settings_say_so(service: Service) -> None:
    records = [SampleRecord([5, 6], [7, 1], True, 0, 3), SampleRecord([5], [8], False, 1, 3)]
    asked = make(service.url, samples=True, batch_size=1, concurrency=1)
    assert asked.wants_samples and not make(service.url).wants_samples
    assert without(asked.score(["one", "two"], ["a", "bb"], {}, records)) == (0, 0)
    first = {"prompt_ids": [5, 6], "answer_ids": [7, 1], "ended": True, "number": 0, "step": 3}
    assert [request["samples"] for request in service.requests] == [
        [first],
        [{"prompt_ids": [5], "answer_ids": [8], "ended": False, "number": 1, "step": 3}],
    ]


def test_objects_bring_other_numbers_beside_their_score(service: Service) -> None:
    service.plan = [says('{"scores": [{"score": 1, "acc": 0.5, "why": "text"}, 2, {"acc": 1}, {"score": "3"}]}')]
    result = score(service.url, *"abcd")
    np.testing.assert_array_equal(result.values, np.array([1, 2, np.nan, np.nan], np.float32))
    assert without(result) == (0, 2)
    assert {name: x.tolist()[::2] for name, x in result.numbers.items()} == {"acc": [0.5, 1.0]}


def test_rows_that_are_no_json_are_found_before_anything_is_sent() -> None:
    rows: list[dict[str, Any]] = [{"n": 1, "day": datetime.date(2020, 2, 1)}, {"n": float("nan"), "what": object()}]
    check_json(rows[:1], SETTING, "ppo.prompts (rows.parquet)")
    with pytest.raises(
        RewardError,
        match=r"^ppo\.rewards\.0: .* the column what of row 2 of ppo\.prompts \(rows\.parquet\) cannot be written "
        "as JSON: Unable to",
    ):
        check_json(rows, SETTING, "ppo.prompts (rows.parquet)")


def test_batches_go_several_at_a_time_and_come_back_in_order(service: Service) -> None:
    service.plan = [one_at_a_time]
    answers = ["x" * n for n in range(11)]
    result = score(service.url, *answers, columns={"n": list(range(11))}, batch_size=2, concurrency=3)
    assert result.values.tolist() == list(range(11))
    assert sorted(len(request["answers"]) for request in service.requests) == [1, 2, 2, 2, 2, 2]
    assert all([len(a) for a in request["answers"]] == request["columns"]["n"] for request in service.requests)
    assert service.most_at_once == 3


def test_a_token_comes_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", f"{TOKEN}\n")
    assert without(score(service.url, "a", token_env="SERVICE_TOKEN")) == (0, 0)
    assert service.headers[0]["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("value", [None, " ", "two\nlines", "é"])
def test_a_token_that_cannot_be_sent_is_refused(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVICE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("SERVICE_TOKEN", value)
    with pytest.raises(
        RewardError, match=r"^ppo\.rewards\.0\.token_env: the environment variable SERVICE_TOKEN"
    ) as caught:
        make("http://localhost", token_env="SERVICE_TOKEN")
    assert value is None or value.strip() == "" or value not in str(caught.value)


@pytest.mark.parametrize(
    "step", [repeat_token, says(f"bad {TOKEN}", 401), says(f'{{"scores": ["{TOKEN}"]}}'), says(TOKEN)]
)
def test_no_error_text_repeats_the_token(service: Service, monkeypatch: pytest.MonkeyPatch, step: Any) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", TOKEN)
    service.plan = [step]
    result = score(service.url, "a", token_env="SERVICE_TOKEN", retries=0)
    assert without(result) == (0, 1)
    assert result.example and TOKEN not in result.example


def test_null_and_what_is_not_finite_are_errors_of_their_sample(service: Service) -> None:
    service.plan = [says('{"scores": [1, null, NaN, 1e39, -2.5]}')]
    result = score(service.url, *"abcde")
    np.testing.assert_array_equal(result.values, np.array([1, np.nan, np.nan, np.nan, -2.5], np.float32))
    assert without(result) == (0, 3) and result.example == "gave None for an answer; one finite number is needed"


@pytest.mark.parametrize(
    ("step", "example"),
    [
        (
            says("<html>"),
            "answered with something other than scores: body: Invalid JSON: expected value at line 1 column 1",
        ),
        (says("[" * 900), "answered with something other than scores: body: Invalid JSON: recursion limit exceeded"),
        (says(""), "answered with something other than scores: body: Invalid JSON: EOF"),
        (says("[1, 2]"), "answered with something other than scores: body: Input should be an object"),
        (says("{}"), "answered with something other than scores: scores: Field required"),
        (
            says('{"scores": [1, "2"]}'),
            "answered with something other than scores: scores.1: Input should be a valid number",
        ),
        (
            says('{"scores": [1, true]}'),
            "answered with something other than scores: scores.1: Input should be a valid number",
        ),
        (says('{"scores": [1]}'), "answered with 1 scores for 2 answers"),
        (says('{"scores": [1, 2, 3]}'), "answered with 3 scores for 2 answers"),
        (says("no such page", 404), "answered with status 404"),
        (says("", 307, Location="/score"), "answered with status 307"),
        (
            says('{"scores": [1, 2]}' + " " * 1000),
            "answered with more than 1000 bytes (ppo.rewards.0.max_response_bytes)",
        ),
        (endless, "answered with more than 1000 bytes (ppo.rewards.0.max_response_bytes)"),
    ],
)
def test_a_wrong_response_is_an_error_and_not_asked_for_again(service: Service, step: Any, example: str) -> None:
    service.plan = [step, good]
    result = score(service.url, "a", "bb", max_response_bytes=1000)
    assert np.isnan(result.values).all() and without(result) == (0, 2)
    assert result.example.startswith(f"{service.url} {example}")
    assert len(service.requests) == 1


def test_only_the_batch_of_a_failed_request_is_lost(service: Service) -> None:
    service.plan = [wrong_for_bb]
    result = score(service.url, "a", "bb", "c", batch_size=1)
    np.testing.assert_array_equal(result.values, np.array([1, np.nan, 1], np.float32))
    assert without(result) == (0, 1)


def test_columns_are_sent_as_json_or_are_an_error(service: Service) -> None:
    day = datetime.date(2020, 2, 1)
    assert without(score(service.url, "a", columns={"day": [day], "x": [float("nan")]})) == (0, 0)
    assert service.requests[0]["columns"] == {"day": ["2020-02-01"], "x": [None]}
    result = score(service.url, "a", columns={"x": [object()]})
    assert (
        without(result) == (0, 1) and "accepts JSON, but the rows' columns cannot be written as JSON" in result.example
    )
    assert len(service.requests) == 1


# ---------------------------------------------------------------- failures that may pass


@pytest.mark.parametrize("step", [says("", 500), says("", 503), says("", 429), hang_up, cut_off, slow])
def test_a_passing_failure_is_asked_again(service: Service, step: Any) -> None:
    service.plan = [step, step, good]
    result = score(service.url, "a", "bb", retries=2, request_timeout=0.5)
    assert result.values.tolist() == [1.0, 2.0] and without(result) == (0, 0)
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("step", "counts", "example"),
    [
        (says("", 500), (0, 2), "answered with status 500"),
        (hang_up, (0, 2), "failed: ServerDisconnectedError"),
        (cut_off, (0, 2), "failed: ClientPayloadError"),
        (slow, (2, 0), "gave no answer in 0.3 s (ppo.rewards.0.request_timeout)"),
        (trickle, (2, 0), "gave no answer in 0.3 s (ppo.rewards.0.request_timeout)"),
    ],
)
def test_attempts_are_bounded(service: Service, step: Any, counts: tuple[int, int], example: str) -> None:
    service.plan = [step]
    result = score(service.url, "a", "bb", retries=2, request_timeout=0.3)
    assert np.isnan(result.values).all() and without(result) == counts
    assert result.example.startswith(f"{service.url} {example}")
    assert len(service.requests) == 3


def test_a_service_that_is_not_there_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = score(url, "a", retries=1)
    assert without(result) == (0, 1) and result.example.startswith(
        f"{url} failed: ClientConnectorError: Cannot connect"
    )
    result = score("http://no-such-host.invalid/", "a", retries=0)
    assert without(result) == (0, 1) and "failed: ClientConnectorDNSError" in result.example


def test_a_service_without_tls_is_an_error_where_the_url_asks_for_it(service: Service) -> None:
    result = score(service.url.replace("http:", "https:"), "a", retries=0)
    assert without(result) == (0, 1) and "failed: Client" in result.example


def test_all_attempts_end_at_the_timeout(service: Service) -> None:
    """Answers scored before the timeout keep their scores."""
    service.plan = [good, slow]
    began = time.monotonic()
    result = score(service.url, *"abc", batch_size=1, concurrency=1, timeout=1.0, request_timeout=0.3, retries=10)
    assert 1.0 <= time.monotonic() - began < 5.0
    assert result.values[0] == 1.0 and without(result) == (2, 0)
    assert result.example == f"{service.url} gave no score in 1 s (ppo.rewards.0.timeout)"


def test_pauses_grow_are_drawn_and_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full jitter: uniform between 0 and a bound that doubles up to a maximum."""
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.5)
    bounds: list[float] = []

    class Draws:
        def uniform(self, low: float, high: float) -> float:
            bounds.append(high)
            return low

    service.plan = [says("", 503)]
    asked = make(service.url, retries=7)
    asked._random = Draws()  # type: ignore[assignment]
    asked.score(["p"], ["a"], {})
    assert bounds == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/score",
        "host/score",
        "http://user:secret@host/score",
        "http://host/score?key=secret",
        "http://host/#part",
        "http://host:99999/",
        "http://ho st/",
    ],
)
def test_a_url_that_is_none_or_holds_secrets_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        make(url)
