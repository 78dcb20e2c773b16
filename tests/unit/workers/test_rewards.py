"""Rewards from functions, services and models, and that no error among them goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from configs.schema import PPOSettings, Role, RunConfig
from orchestrator.algorithms.ppo import reward_metrics
from orchestrator.evaluation.evaluate import combined, weighted_sum
from orchestrator.preflight.settings_checks import column_checks
from orchestrator.worker_groups.calls import WorkerGroup, run_concurrently
from placement import Cluster
from tests.support import chat_templates, reward_functions
from tests.support.hosts import DEADLINES
from tests.support.models import VOCABULARY, make_model, make_tokenizer
from tests.support.services import Service, says
from workers import api
from workers.api import RewardsApi, WorkerApi
from workers.data import Codec, Prompt, Row, load_tokenizer
from workers.data.samples import RolloutBatch, Sample, SampleRefs
from workers.data.step_inputs import ScoringRequest
from workers.process.worker import WorkerSpec, environment
from workers.process.worker_process import WorkerProcess
from workers.rewards.function import RewardError, check_columns, find_function
from workers.rewards.function_process import FunctionProcess
from workers.rewards.result import RewardResult
from workers.rewards.worker import RewardWorker

FUNCTIONS = "tests.support.reward_functions"
PROMPTS = ["one", "two", "three", "four"]
ANSWERS = ["a", "bb", "", "dddd"]


# ---------------------------------------------------------------- workers


def run_config(*sources: dict[str, Any], judges: tuple[str, ...] = ()) -> RunConfig:
    data, adam = {"path": "rows.jsonl"}, {"lr": 1e-4}
    ppo: dict[str, Any] = {"prompts": data, "steps": 1, "actor_optimizer": adam, "critic_optimizer": adam}
    if judges:
        ppo["evaluation"] = {"prompts": data, "judges": [{"name": j, "function": f"{FUNCTIONS}:{j}"} for j in judges]}
    return RunConfig.model_validate(
        {"name": "r", "model": {"path": "m", "dtype": "float32"}, "ppo": ppo | {"rewards": list(sources)}}
    )


def function(name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"kind": "function", "name": name, "function": f"{FUNCTIONS}:{name}", "weight": weight}


def model(name: str, path: Path) -> dict[str, Any]:
    return {"kind": "model", "name": name, "path": str(path)}


def spec(config: RunConfig, role: Role = "reward", rank: int = 0, world: int = 1) -> WorkerSpec:
    return WorkerSpec(config, role, rank, world, "cpu", 1)


def answers_of(tokenizer: Any) -> RolloutBatch:
    """PROMPTS and ANSWERS as an engine writes them; each answer ends with eos."""
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    answers = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ANSWERS]
    return RolloutBatch.of([Sample.of(p, a) for p, a in zip(prompts, answers, strict=True)])


def request(prompts: np.ndarray, step: int = 3) -> ScoringRequest:
    """A request to score the answers to these rows; all but the last ended by themselves."""
    return ScoringRequest("prompts", prompts, np.zeros_like(prompts), prompts < 3, step)


ROWS = [
    Row("one", columns={"label": 1.0}),
    Row("two", columns={"label": 2.0, "note": "well"}),
    Row("three", columns={"label": 3.0}),
    Row("four", columns={"label": 4.0, "other": 1}),
]
Scores = Callable[..., dict[str, RewardResult]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "llama", seed=1)


@pytest.fixture
def scores(ray_here: Cluster, folder: Path) -> Iterator[Scores]:
    """scores(sources, rows, prompts, judges): the results of a reward worker in this process for ANSWERS."""

    def get(
        *sources: dict[str, Any],
        rows: list[Row] = ROWS,
        prompts: tuple[int, ...] = (0, 1, 2, 3),
        judges: tuple[str, ...] = (),
    ) -> dict[str, RewardResult]:
        worker = RewardWorker(spec(run_config(*sources, judges=judges)))
        workers.append(worker)
        worker.load(str(folder), {s["name"]: s["path"] for s in sources if s["kind"] == "model"})
        worker.add_rows("prompts", rows)
        chunk = answers_of(worker.codec.tokenizer)
        refs = SampleRefs.of([ray.put(chunk)], [np.arange(len(chunk.ids))], len(chunk.ids)).take(np.array(prompts))
        micro = [np.arange(len(prompts))[:2], np.arange(len(prompts))[2:]]
        names = [s["name"] for s in sources] + list(judges)
        return worker.scores(request(np.array(prompts)), refs, micro, names)

    workers: list[RewardWorker] = []
    yield get
    for source in (source for worker in workers for source in worker.sources.values()):
        if isinstance(source, FunctionProcess):
            source.close()


def test_a_function_gets_prompts_and_answers_as_text(scores: Scores) -> None:
    results = scores(function("length"), judges=("vowels",))
    assert results["length"].values.tolist() == [1, 2, 0, 4]  # without eos
    assert results["vowels"].values.tolist() == [2, 1, 2, 2]
    assert {scored.values.dtype for scored in results.values()} == {np.dtype(np.float32)}


def test_columns_of_the_rows_reach_the_function(scores: Scores) -> None:
    """Also a column that only some rows have, even where no row of this rank's answers has it."""
    columns = {"label", "note"}
    rows = [Row(row.prompt, columns={k: v for k, v in row.columns.items() if k in columns}) for row in ROWS]
    assert scores(function("by_label"), rows=rows)["by_label"].values.tolist() == [1.0, 2.5, 3.0, 4.0]
    assert scores(function("by_label"), rows=rows, prompts=(3, 0, 0))["by_label"].values.tolist() == [4.0, 1.0, 1.0]


def test_each_source_says_which_answers_it_has_no_score_for(scores: Scores, service: Service) -> None:
    """A function that fails, one that times out, a service and a judge that score some; the other results are complete."""
    service.plan = [says('{"scores": [1, null, 3, 4]}')]
    late = function("sleep_at_bb") | {"timeout": 1.0, "batch_size": 1}
    http = {"kind": "http", "name": "service", "url": service.url}
    results = scores(function("length"), function("broken"), late, http, judges=("nothing_for_some",))
    assert service.requests[0]["columns"] == {
        "label": [1.0, 2.0, 3.0, 4.0],
        "note": [None, "well", None, None],
        "other": [None, None, None, 1],
    }
    assert {name: (scored.timeouts, scored.errors) for name, scored in results.items()} == {
        "length": (0, 0),
        "broken": (0, 4),
        "sleep_at_bb": (1, 0),
        "service": (0, 1),
        "nothing_for_some": (0, 1),
    }
    for name in ("sleep_at_bb", "service", "nothing_for_some"):
        assert np.isnan(results[name].values).tolist() == [False, True, False, False]
    assert results["broken"].example == "ZeroDivisionError: of the reward's own"


def test_a_function_that_lacks_a_column_is_an_error(scores: Scores) -> None:
    result = scores(function("by_label"), rows=[Row(prompt) for prompt in PROMPTS])["by_label"]
    assert result.errors == 4 and "missing 2 required positional arguments" in result.example
    lines = result.faults[0].detail.splitlines()
    assert lines[:3] == [
        "row 1 of prompts, answer 1: 'a'",
        "row 2 of prompts, answer 1: 'bb'",
        "row 3 of prompts, answer 1: ''",
    ], "the first of its answers"
    assert "Traceback" in lines[3]


def test_a_function_gets_records_of_the_answers(scores: Scores) -> None:
    """Token ids as the engine wrote them, each with its end token."""
    result = scores(function("by_sample"), prompts=(0, 2, 3))["by_sample"]
    assert result.values.tolist() == [3, 3, 3], "the step"
    assert {name: x.tolist() for name, x in result.numbers.items()} == {
        "prompt": [len(PROMPTS[i]) for i in (0, 2, 3)],
        "answer": [len(ANSWERS[i]) + 1 for i in (0, 2, 3)],
        "last": [1, 1, 1],
        "ended": [1, 1, 0],
        "number": [0, 0, 0],
    }


def test_a_source_that_raises_in_the_worker_takes_no_other_along(scores: Scores) -> None:
    """A column that cannot be sent to the function's process."""
    rows = [Row(prompt, columns={"what": lambda: None}) for prompt in PROMPTS]
    result = scores(function("length"), rows=rows)["length"]
    assert result.errors == 4 and "pickle" in result.example and "function_process.py" in result.faults[0].detail


THINKING = "<think>two and two</think>4"


@pytest.mark.parametrize("special", [True, False])
def test_only_end_and_pad_tokens_are_cut_from_an_answer(special: bool) -> None:
    """A format reward sees the tags, whether a model's tokenizer flags them as special or not."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    codec = Codec(tokenizer, chat_template=False)
    ids = [*tokenizer(THINKING)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert codec.answer_text(ids) == THINKING


def test_a_format_reward_sees_the_format(scores: Scores, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr("tests.unit.workers.test_rewards.ANSWERS", [THINKING, "4", THINKING, ""])
    assert scores(function("thinks"))["thinks"].values.tolist() == [1, 0, 1, 0]


def test_a_source_that_cannot_be_had_is_refused_when_the_worker_loads(
    scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RewardError, match=r"^ppo\.rewards\.1\.function: cannot import 'tests.support.reward_functions:no_such'"
    ):
        scores(function("length"), function("no_such"))
    with pytest.raises(RewardError, match=r"^ppo\.evaluation\.judges\.0\.function: cannot import"):
        scores(function("length"), judges=("no_such",))
    monkeypatch.delenv("SERVICE_TOKEN", raising=False)
    with pytest.raises(
        RewardError, match=r"^ppo\.rewards\.0\.token_env: the environment variable SERVICE_TOKEN is not set"
    ):
        scores({"kind": "http", "name": "service", "url": "http://localhost", "token_env": "SERVICE_TOKEN"})


def test_a_score_of_a_model_that_is_not_finite_is_an_error_of_its_answer(
    scores: Scores, folder: Path, tmp_path: Path
) -> None:
    """A model whose embedding of `d` has overflowed."""
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    [d] = make_tokenizer()("d")["input_ids"]
    with torch.no_grad():
        plain.get_input_embeddings().weight[d] = torch.inf
    plain.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    result = scores(model("broken", tmp_path / "broken"))["broken"]
    assert np.isnan(result.values).tolist() == [False, False, False, True]
    assert (result.timeouts, result.errors) == (0, 1)
    assert result.example == "gave nan for an answer; one finite number is needed"


def test_scores_of_ranks_are_gathered_with_each_answer_counted_once() -> None:
    """Ranks get equally many answers, so some answers are scored twice."""
    one, two = RewardResult.of([1.0, 2.0]), RewardResult.nothing(2, "no answer", timed_out=True)
    result = RewardResult.gather([np.array([0, 2]), np.array([1, 0])], [one, two], 3)
    np.testing.assert_array_equal(result.values, np.array([np.nan, np.nan, 2.0], np.float32))
    assert (result.timeouts, result.errors, result.example) == (2, 0, "no answer")
    again = RewardResult.gather([np.array([1, 0]), np.array([0, 2])], [two, one], 3)
    np.testing.assert_array_equal(again.values, np.array([1.0, np.nan, 2.0], np.float32))
    assert (again.timeouts, again.errors) == (1, 0)


def test_the_longest_that_scoring_may_take_follows_from_the_timeouts() -> None:
    function_times = {"timeout": 10.0, "start_timeout": 5.0}
    http = {"kind": "http", "name": "service", "url": "http://localhost", "timeout": 200.0}
    few = function("length") | function_times | {"batch_size": 4}
    config = run_config({"kind": "model"}, function("vowels") | function_times, few, http, judges=("words",))
    assert config.ppo
    assert config.ppo.longest_scoring(9) == 15 + 3 * 15 + 200 + (60 + 120)


def test_a_model_scores_the_last_token(scores: Scores, folder: Path, tmp_path: Path) -> None:
    """As the plain model does for each sequence alone; two models do not affect each other."""
    from transformers import AutoModelForSequenceClassification

    paths, plain = [tmp_path / "one", tmp_path / "two"], []
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        plain.append(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval())
        plain[-1].config.score_mean, plain[-1].config.score_std = 0.5, 2.0
        plain[-1].save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    results = scores(model("one", paths[0]), function("length"), model("two", paths[1]))
    chunk = answers_of(load_tokenizer(str(folder)))
    for name, hf in zip(("one", "two"), plain, strict=True):
        for i in range(4):
            ids = torch.from_numpy(chunk.ids.row(i).astype(np.int64))[None]
            assert int(ids.max()) < VOCABULARY
            with torch.no_grad():
                expected = (float(hf.score(hf.base_model(ids)[0])[0, -1, 0]) - 0.5) / 2.0
            assert results[name].values[i] == pytest.approx(expected, abs=1e-5)
    assert not np.allclose(results["one"].values, results["two"].values)


def test_a_model_with_another_tokenizer_is_refused(scores: Scores, folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["another"])
    make_model(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(RewardError, match=rf"^reward other: {tmp_path}/other has another tokenizer than .*{folder}"):
        scores(model("other", tmp_path / "other"))


CONVERSATIONS: list[Prompt] = [
    [{"role": "user", "content": "What is two and two?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One more?"},
        {"role": "assistant", "content": "One more of what?"},
        {"role": "user", "content": "Of films."},
    ],
    "Is this one text?",
]
SAID = ["Four.", "  It is\n\na film <of> {films}! ", "x", "No, and so on and on"]


@pytest.mark.parametrize(
    ("family", "architecture", "end"), [("qwen2.5", "qwen2", "<|im_end|>"), ("llama3", "llama", "<|eot_id|>")]
)
def test_a_model_with_a_tokenizer_of_its_own_reads_each_answer_as_plain_transformers_would(
    ray_here: Cluster, folder: Path, tmp_path: Path, family: str, architecture: str, end: str
) -> None:
    """Answers that ended and answers that were cut off, alone and in batches with longer ones."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    # ---- a reward model with other tokens and another template than the policy's
    path = make_model(tmp_path / "reader", architecture, seed=3, vocab_size=300, max_position_embeddings=512)
    torch.manual_seed(4)
    plain = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    torch.nn.init.normal_(plain.score.weight)
    plain.config.score_mean, plain.config.score_std = 0.5, 2.0
    plain.save_pretrained(path)
    chat_templates.save(family, path)

    # ---- every answer to every prompt, each ended and cut off
    policy = load_tokenizer(str(folder))
    cases = [(i, said, ended) for i in range(len(CONVERSATIONS)) for said in SAID for ended in (True, False)]
    answers = [[*policy(said)["input_ids"], *([policy.eos_token_id] if ended else [])] for _, said, ended in cases]
    chunk = RolloutBatch.of([Sample.of([5, 6, 7], answer) for answer in answers])
    refs = SampleRefs.of([ray.put(chunk)], [np.arange(len(cases))], len(cases))

    def computed(micro_batch_tokens: int) -> np.ndarray:
        config = run_config(model("reader", path) | {"tokenizer": "own"})
        assert config.ppo
        config.ppo.micro_batch_tokens, config.chat_template = micro_batch_tokens, True
        worker = RewardWorker(spec(config))
        worker.load(str(folder), {"reader": str(path)})
        worker.add_rows("prompts", [Row(prompt) for prompt in CONVERSATIONS])
        prompts, ended = np.array([i for i, *_ in cases]), np.array([ended for *_, ended in cases])
        asked = ScoringRequest("prompts", prompts, np.zeros_like(prompts), ended, 3)
        return worker.scores(asked, refs, [np.arange(len(cases))], ["reader"])["reader"].values

    # ---- the oracle: one conversation after the other, no batch, no padding
    tokenizer = AutoTokenizer.from_pretrained(path)
    plain.config.pad_token_id = None
    expected = []
    for (i, said, ended), answer in zip(cases, answers, strict=True):
        assert policy.decode(answer, skip_special_tokens=True) == said
        prompt = CONVERSATIONS[i]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        conversation = [*asked, {"role": "assistant", "content": said}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        text = text[: text.rindex(end)] + (end if ended else "")
        with torch.no_grad():
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            expected.append((float(plain(ids).logits[0, 0]) - 0.5) / 2.0)
    assert len({round(score, 3) for score in expected}) > len(expected) * 0.9, "answers and ends make a difference"
    for micro_batch_tokens in (1, 400, 100_000):
        np.testing.assert_allclose(computed(micro_batch_tokens), expected, atol=1e-4)


def test_the_reward_is_the_weighted_sum() -> None:
    ppo = run_config(function("length", 2.0), function("vowels", -0.5)).ppo
    assert ppo is not None
    given = {
        "length": RewardResult.of([1.0, 2.0]),
        "vowels": RewardResult.of([4.0, 0.0]),
        "a judge": RewardResult.of([100.0, 100.0]),
    }
    assert weighted_sum(given, ppo).tolist() == [0.0, 4.0]


def test_a_source_without_weight_does_not_decide_which_answers_have_a_score() -> None:
    ppo = run_config(function("length", 2.0), function("vowels", 0.0)).ppo
    assert ppo is not None
    given = {"length": RewardResult.of([1.0, None]), "vowels": RewardResult.of([None, None])}
    np.testing.assert_array_equal(combined(given, ppo), [2.0, np.nan])


def test_a_sum_beyond_float32_is_no_score_and_counts() -> None:
    settings = run_config(function("length", 10.0), function("vowels", -10.0)).ppo
    assert settings is not None
    ppo = settings.model_copy(update={"max_unscored": 0.5})
    given = {"length": RewardResult.of([1e38, 1e38, 1.0]), "vowels": RewardResult.of([0.0, 9e37, 1.0])}
    np.testing.assert_allclose(weighted_sum(given, ppo), [np.nan, 1e38, 0.0], rtol=1e-6)
    with pytest.raises(RewardError, match=r"^1 of 3 responses have no score .*the weighted sum exceeds float32"):
        weighted_sum(given, settings)


def test_too_many_answers_without_a_score_end_the_run() -> None:
    settings = run_config(function("length", 2.0), function("vowels", -0.5)).ppo
    assert settings is not None
    given = {"length": RewardResult.of([1.0, None, 1.0, 1.0]), "vowels": RewardResult.of([0.0] * 4)}
    some = weighted_sum(given, settings.model_copy(update={"max_unscored": 0.25}))
    np.testing.assert_array_equal(some, [2.0, np.nan, 2.0, 2.0])
    with pytest.raises(
        RewardError, match=r"^1 of 4 responses have no score \(ppo\.max_unscored: 0\.1\)\. length: 0 timeouts, 1 er"
    ):
        weighted_sum(given, settings)
    np.testing.assert_array_equal(combined(given, settings), some)


# ---------------------------------------------------------------- what is checked before anything starts


def two_columns(prompts: list[str], answers: list[str], label: list[float], note: list[str]) -> list[float]:
    return label


def positional(prompts: list[str], answers: list[str], /, **columns: list[Any]) -> list[float]:
    return [0.0] * len(answers)


@pytest.mark.parametrize(
    ("called", "columns", "text"),
    [
        (positional, ["answers", "prompts"], ""),
        (reward_functions.length, ["label", "other"], ""),
        (reward_functions.by_sample, ["label"], ""),
        (two_columns, ["note", "label"], ""),
        (max, ["label"], ""),
        (
            reward_functions.length,
            ["label", "answers"],
            "the column answers has the name of one of its own arguments; give ",
        ),
        (reward_functions.by_sample, ["samples"], "the column samples has the name of one of its own arguments"),
        (two_columns, ["label"], "it needs the column note, and there are: label"),
        (two_columns, [], "it needs the column label, note, and there are: none"),
        (two_columns, ["label", "note", "id"], "it does not take the column id; give it a parameter \\*\\*columns"),
        (lambda answers: answers, [], "it must take prompts and answers as its first two arguments"),
    ],
)
def test_a_function_is_checked_against_the_columns(called: Any, columns: list[str], text: str) -> None:
    setting, dataset = "ppo.rewards.0.function", "ppo.prompts (squad.jsonl)"
    if not text:
        check_columns(called, setting, columns, dataset)
        return
    with pytest.raises(RewardError, match=rf"^{setting}: .* the columns of ppo\.prompts \(squad\.jsonl\): {text}"):
        check_columns(called, setting, columns, dataset)


def check_all(ppo: PPOSettings, prompts: list[Row], held_out: list[Row]) -> None:
    for check in column_checks(ppo, prompts, held_out):
        check()


def test_rewards_are_checked_against_both_datasets_and_judges_against_their_own() -> None:
    """By the check that the driver calls after reading the rows."""
    training, held_out = [Row("p", columns={"label": 1, "note": ""})], [Row("p", columns={"label": 1})]
    ppo = run_config(function("by_label"), judges=("vowels",)).ppo
    assert ppo is not None
    check_all(ppo, training, training)
    with pytest.raises(
        RewardError, match=r"^ppo\.rewards\.0\.function: .* of ppo\.evaluation\.prompts .* the column note"
    ):
        check_all(ppo, training, held_out)
    judged = run_config(function("length"), judges=("by_label",)).ppo
    assert judged is not None
    check_all(judged, held_out, training)
    with pytest.raises(RewardError, match=r"^ppo\.evaluation\.judges\.0\.function: .* needs the column note"):
        check_all(judged, training, held_out)
    service = run_config({"kind": "http", "name": "service", "url": "http://localhost"}).ppo
    assert service is not None
    with pytest.raises(RewardError, match=r"^ppo\.rewards\.0: .* the column what of row 2 of ppo\.prompts"):
        check_all(service, [Row("p"), Row("p", columns={"what": object()})], [])


def test_what_has_no_score_is_in_no_mean() -> None:
    scores = {"some": RewardResult.of([1.0, None, 3.0]), "none": RewardResult.of([None, None, None])}
    metrics = reward_metrics(np.array([4.0, np.nan, 8.0]), scores)
    assert metrics == {"reward/mean": 6.0, "reward/std": 2.0, "reward/some": 2.0, "reward/some_std": 1.0}
    assert reward_metrics(np.full(3, np.nan), {"none": scores["none"]}) == {}


@pytest.mark.parametrize("judges", [(), ("length",)])
def test_names_tell_rewards_and_judges_apart(tmp_path: Path, judges: tuple[str, ...]) -> None:
    sources = [function("length")] if judges else [model("length", tmp_path), function("length")]
    with pytest.raises(ValueError, match=r"rewards: the name length is used more than once"):
        run_config(*sources, judges=judges)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tests.nowhere:length", "No module named 'tests.nowhere'"),
        (f"{FUNCTIONS}:no_such", "has no attribute 'no_such'"),
    ],
)
def test_a_function_that_is_not_there_is_an_error_that_names_the_setting(path: str, text: str) -> None:
    with pytest.raises(RewardError, match=rf"^ppo\.rewards\.0\.function: cannot import '{path}': .*{text}"):
        find_function(path, "ppo.rewards.0.function")


@pytest.mark.slow
def test_two_workers_score_their_answers_and_leave_no_process(ray_here: Cluster, folder: Path) -> None:
    """Each rank has its share of the answers and its own processes, which end with it even if it is killed."""
    config = run_config(*map(function, ("length", "not_a_number", "by_label", "process_number")))
    env = {"env_vars": environment(config, "reward", "cpu", 1)}
    handles = [
        ray.remote(WorkerProcess)
        .options(num_cpus=1, runtime_env=env)
        .remote([("rewards", spec(config, rank=rank, world=2))])
        for rank in range(2)
    ]
    group = WorkerGroup("reward", handles, "reward", DEADLINES)
    try:
        group.call(RewardsApi.load, str(folder), {}).get()
        group.call(WorkerApi.add_rows, "prompts", ROWS).get()
        refs = SampleRefs.of([ray.put(answers_of(load_tokenizer(str(folder))))], [np.arange(4)], 4)
        shards = [np.array([2, 3]), np.array([0, 1])]

        def ask(name: str) -> Any:
            micro_batches = [np.arange(2)]
            requests = [
                api.request(RewardsApi.scores, request(rows), refs.take(rows), micro_batches, [name]) for rows in shards
            ]
            return run_concurrently(group.scatter(requests))[0]

        assert [results["length"].values.tolist() for results in ask("length")] == [[0, 4], [1, 2]]
        assert [results["not_a_number"].errors for results in ask("not_a_number")] == [0, 1]
        # it has no argument for the column `other`
        assert all(results["by_label"].example.startswith("TypeError") for results in ask("by_label"))
        numbers = [int(results["process_number"].values[0]) for results in ask("process_number")]
        theirs = [process for pid in numbers for process in psutil.Process(pid).parents()[:2]]  # guard, worker
        guards, workers = theirs[::2], theirs[1::2]
        assert len({*numbers, *(process.pid for process in theirs)}) == 6
        left = [*map(psutil.Process, numbers), *guards]
        for worker in workers:
            assert "ray::" in worker.cmdline()[0]
            worker.kill()
        _, alive = psutil.wait_procs(left, timeout=20)
        assert not alive
    finally:
        for handle in handles:
            ray.kill(handle)


@pytest.mark.parametrize(
    ("names", "judges", "error"),
    [
        (("mean", "f"), (), "rewards: the name mean is the name of a metric"),
        (("f", "f_std"), (), "rewards: the name f_std is the name of a metric"),
        (("f",), ("kl",), "evaluation.judges: the name kl is the name of a metric"),
    ],
)
def test_names_that_would_give_two_metrics_one_name_are_refused(
    names: tuple[str, ...], judges: tuple[str, ...], error: str
) -> None:
    rewards = [{"kind": "function", "name": name, "function": f"{FUNCTIONS}:length"} for name in names]
    named = [{"name": name, "function": f"{FUNCTIONS}:length"} for name in judges]
    evaluation = {"prompts": {"path": "p"}, "judges": named}
    with pytest.raises(ValueError, match=error):
        PPOSettings.model_validate(
            {"prompts": {"path": "p"}, "steps": 1, "actor_optimizer": {"lr": 1}, "critic_optimizer": {"lr": 1}}
            | {"rewards": rewards, "evaluation": evaluation}
        )
