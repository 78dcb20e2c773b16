"""The report, written from a made-up run folder (its numbers are test data), and the intervals it shows."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml

from orchestrator.evaluation.statistics import distinct_share, mean_interval, paired_interval
from orchestrator.report.report import write_report
from orchestrator.storage.metrics_file import read_lines
from tests.support.recording import recording
from tests.support.report_oracle import Report, check_report

ADAM = {"lr": 1e-4}
CONFIG = {
    "name": "test-data",
    "model": {"path": "models/tiny", "init": "random"},
    "sft": {"train": {"path": "data/sft.jsonl"}, "optimizer": ADAM},
    "rm": {"train": {"path": "data/pairs.jsonl"}, "optimizer": ADAM},
    "ppo": {
        "prompts": {"path": "data/prompts.jsonl"},
        "steps": 120,
        "actor_optimizer": ADAM,
        "critic_optimizer": ADAM,
        "kl": {"controller": {"kind": "adaptive", "target": 0.12}},
        "rewards": [{"kind": "model"}, {"kind": "function", "name": "brief", "function": "tests.support.micro:short"}],
        "evaluation": {"prompts": {"path": "data/held_out.jsonl"}, "samples": 6},
    },
}
PROMPTS = ["the film", "<script>alert(1)</script>", "a story of", "what begins as", "an actor who", "this & that"]
WORDS = ["moving", "funny", "dull", "warm", "slow", "bright", "tender", "odd", "clever", "flat", "vivid", "loud"]


def record_sft(folder: Path) -> None:
    noise = random.Random(1)
    with recording(folder, "test-data", "sft") as recorder:
        for step in range(1, 201):
            loss = 5.1 + 3.6 * math.exp(-step / 40) + noise.gauss(0, 0.08)
            line = {
                "loss": loss,
                "perplexity": math.exp(loss),
                "grad_norm": 1 + noise.random(),
                "tokens_per_second": 9000,
            }
            if step % 40 == 0:
                line |= {"validation/loss": loss + 0.15, "validation/perplexity": math.exp(loss + 0.15)}
            recorder.record(step, line)


def record_rm(folder: Path) -> None:
    noise = random.Random(2)
    with recording(folder, "test-data", "rm") as recorder:
        for step in range(1, 151):
            accuracy = 0.5 + 0.27 * (1 - math.exp(-step / 50)) + noise.gauss(0, 0.04)
            line = {"loss": 0.69 - 0.3 * (accuracy - 0.5), "accuracy": accuracy}
            if step % 50 == 0:
                line |= {"validation/accuracy": 0.6 + step / 1000, "validation/loss": 0.6}
            recorder.record(step, line)


def record_ppo(folder: Path) -> None:
    noise = random.Random(3)
    with recording(folder, "test-data", "ppo") as recorder:
        for step in range(121):
            part = 1 - math.exp(-step / 45)
            line: dict[str, float] = {}
            if step % 40 == 0:
                reward = -0.1 + 1.2 * part
                line |= {"evaluation/reward": reward, "evaluation/reward_ci_low": reward - 0.1}
                line |= {"evaluation/reward_ci_high": reward + 0.1, "evaluation/kl": 0.14 * part}
            if step:
                line |= {
                    "reward/mean": -0.1 + 1.2 * part + noise.gauss(0, 0.09),
                    "reward/std": 0.9 + noise.gauss(0, 0.05),
                    "reward/model": 0.4 * part,
                    "reward/model_std": 7.7,
                    "reward/brief": -0.3,
                    "reward/brief_std": 0.2,
                }
                line |= {"kl": 0.14 * part + abs(noise.gauss(0, 0.01)), "kl_coefficient": 0.1 + 0.1 * part}
                line |= {"entropy": 3.4 - part + noise.gauss(0, 0.05), "clip_fraction": 0.05 + 0.02 * noise.random()}
                line |= {
                    "explained_variance": 0.6 * part + noise.gauss(0, 0.05),
                    "length/response": 21 + noise.gauss(0, 1),
                }
                line |= {
                    "length/prompt": 4.2,
                    "truncated": 0.2 - 0.1 * part,
                    "logprob_mismatch": 2e-6 * (1 + noise.random()),
                }
                line |= {
                    "loss/policy": -0.01,
                    "loss/value": 0.6 - 0.3 * part,
                    "tokens_per_second": 800 + noise.gauss(0, 25),
                }
                line |= {"grad_norm/actor": 0.5 + noise.random() / 5, "grad_norm/critic": 1 + noise.random()}
                line |= {"seconds/train": 0.8, "seconds/weight_sync": 0.05, "seconds/score": 0.2}
                line |= {"seconds/generate": 0.9 + abs(noise.gauss(0, 0.1))}
                line |= {
                    "seconds/step": (5.0 if step > 1 else 90.0) + line["seconds/generate"],
                    "seconds/evaluate": 3.0,
                }
                line |= {f"memory_gib/{role}": 0.6 for role in ("actor", "critic", "reference", "reward", "rollout")}
            if step in (110, 120):
                recorder.keep_answers(step, [kept_line(number) for number in range(8)], 2**20)
            recorder.record(step, line)


def kept_line(number: int) -> dict[str, object]:
    line = evaluation_line(number, True)
    return {
        "row": 7 * number,
        **{name: line[name] for name in ("prompt", "answer", "kl", "tokens", "reward")},
        "rewards": {"model": 0.5, "brief": None},
        "ended": number % 2 == 0,
    }


def evaluation_line(number: int, trained: bool) -> dict[str, object]:
    noise = random.Random(2 * number + trained)
    reward = noise.gauss(1.0 if trained else 0.0, 0.9)
    answer = " ".join(noise.choices(WORDS, k=noise.randint(4, 16)))
    judges = {"vader": max(-1.0, min(1.0, 0.2 * reward + noise.gauss(0.1, 0.2)))}
    kl = abs(noise.gauss(0.13, 0.05)) if trained else 0.0
    prompt = PROMPTS[number % len(PROMPTS)]
    return {
        "prompt": prompt,
        "answer": answer,
        "reward": reward,
        "judges": judges,
        "kl": kl,
        "tokens": len(answer.split()),
    }


def write_evaluation(folder: Path, count: int = 256) -> tuple[list[dict], list[dict]]:
    (folder / "evaluation").mkdir()
    written = []
    for name, trained in (("before", False), ("after", True)):
        lines = [evaluation_line(number, trained) for number in range(count)]
        (folder / "evaluation" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        written.append(lines)
    return written[0], written[1]


def write_summary(folder: Path) -> None:
    summary = {
        "stages": {"sft": {"steps": 200, "final loss": 5.1234567}, "rm": {"pairs": 4321}, "ppo": {"samples": 7680}},
        "data": {
            "sft.train": {
                "noun": "rows",
                "rows": 4321,
                "kept": 4321,
                "tokens": 12345,
                "longest": 40,
                "conversations": 7,
            },
            "rm.train": {
                "noun": "pairs",
                "rows": 90,
                "kept": 80,
                "cut": 5,
                "dropped": 7,
                "equal": 3,
                "tokens": 9,
                "longest": 99,
            },
        },
        "hardware": {"CPU cores": 2, "GiB of memory": 8.0},
        "versions": {"torch": "2.13.0", "vllm": "0.32.0"},
        "seconds": {"sft": 75.2, "rm": 71.9, "ppo": 233.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_config(folder: Path) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a run can leave; not to be changed."""
    folder = write_config(tmp_path_factory.mktemp("run"))
    record_sft(folder)
    record_rm(folder)
    record_ppo(folder)
    write_evaluation(folder)
    write_summary(folder)
    return folder


class Page(HTMLParser):
    """Checks that elements close in order; keeps ids, links, and the visible text."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def whole_page(whole: Path) -> tuple[str, Page]:
    return page_of(whole)


def test_the_page_is_whole_and_needs_nothing_else(whole_page: tuple[str, Page]) -> None:
    html, page = whole_page
    assert html.startswith("<!DOCTYPE html>") and html.rstrip().endswith("</html>")
    assert len(page.ids) == len(set(page.ids))
    wide = html.count('<figure class="wide">')
    assert page.tags.count("svg") - wide == page.tags.count("figure") >= 15, (
        "wide ones are there for narrow screens too"
    )
    assert {link[:1] for link in page.links} == {"#"}
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", html)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)
    assert len(html) < 2_000_000


def test_texts_of_models_and_users_are_escaped(whole_page: tuple[str, Page]) -> None:
    html, page = whole_page
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>alert(1)</script>" in page.text
    assert "this & that" in page.text


def test_the_numbers_are_those_of_the_files(whole: Path, whole_page: tuple[str, Page]) -> None:
    before, after = (read_lines(whole / "evaluation" / f"{name}.jsonl") for name in ("before", "after"))
    _, page = whole_page
    rewards = [[line["reward"] for line in lines] for lines in (before, after)]
    gain = (fmean(rewards[1]) - fmean(rewards[0])) / stdev(rewards[0])
    assert f"Reward gain (std), held out{gain:+.2f}" in page.text
    differences = [late - early for early, late in zip(*rewards, strict=True)]
    half = 1.9693 * stdev(differences) / 16  # Student's t with 255 degrees of freedom; 256 prompts.
    mean = fmean(differences)
    assert f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]" in page.text
    kl = sum(line["kl"] * line["tokens"] for line in after) / sum(line["tokens"] for line in after)
    assert f"{kl:.3f}" in page.text
    assert "75.0%" in page.text  # The reward model's last validation.
    assert "6:20" in page.text  # 75.2 + 71.9 + 233.0 s.
    assert after[0]["answer"] in page.text
    assert before[5]["answer"] in page.text
    assert "5.123" in page.text
    assert "4,321" in page.text
    assert "CPU cores: 2" in page.text
    assert "sft.train: 4,321 rows, 12,345 tokens, longest 40 · rm.train: 80 of 90 pairs, 5 cut to length, " in page.text
    assert "7 left out as too long, 3 left out with two equal answers, 9 tokens, longest 99" in page.text
    check_report(whole)


def test_samples_are_as_many_as_the_settings_ask_for(whole_page: tuple[str, Page]) -> None:
    assert whole_page[1].tags.count("article") == 6 + 4  # and of the last step's answers


def test_what_is_drawn_over_steps_is_of_the_steps_of_the_stage(whole: Path, whole_page: tuple[str, Page]) -> None:
    texts = Report(whole).texts
    ticks = [int(text) for text in texts["Seconds of a step"] if text.isdecimal()]
    assert max(ticks) == 120, "the sft stage has 200 steps"
    labels = ["generate", "score", "train", "weight sync", "other", "evaluate"]
    assert [
        text
        for text in texts["Seconds of a step"]
        if text.replace(" ", "").isalpha() and text not in ("step", "seconds")
    ] == labels
    assert [text for text in texts["Reward by source"] if text.isalpha() and text != "step"] == ["model", "brief"]


def test_the_first_step_does_not_count_in_a_median(folder: Path) -> None:
    with recording(folder, "test-data", "ppo") as recorder:
        for step, seconds in ((1, 90.0), (2, 4.0), (3, 5.0)):
            recorder.record(step, {"seconds/step": seconds, "tokens_per_second": 100 * seconds})
    _, page = page_of(folder)
    assert "A step takes 4.5 s (median of steps 2 to 3)." in page.text
    assert "450 tokens/s" in page.text


def test_a_score_that_is_missing_costs_its_own_measure_alone(folder: Path) -> None:
    before, after = write_evaluation(folder)
    after[3]["judges"]["vader"] = before[8]["reward"] = None
    for name, lines in (("before", before), ("after", after)):
        (folder / "evaluation" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, page = page_of(folder)
    assert "Reward (255 of 256 prompts have both scores)" in page.text
    assert "Judge: vader (255 of 256 prompts have both scores)" in page.text
    kl = sum(line["kl"] * line["tokens"] for line in after) / sum(line["tokens"] for line in after)
    assert f"{kl:.3f}" in page.text


def test_what_was_refused_and_left_out_is_said(folder: Path) -> None:
    with recording(folder, "test-data", "ppo") as recorder:
        for step in (1, 2, 3):
            recorder.record(
                step, {"kl": 0.1, "skipped/actor": step // 2, "skipped/critic": 0, "unscored": 3 * (step == 2)}
            )
    _, page = page_of(folder)
    assert (
        "3 steps · KL 0.100 (step 3) · 2 skipped optimizer steps of the actor · 3 responses excluded from training"
        in page.text
    )


def test_a_value_is_told_with_the_step_that_it_is_of(folder: Path) -> None:
    with recording(folder, "test-data", "ppo") as recorder:
        recorder.record(1, {"reward/mean": 0.25, "reward/std": 1.0, "kl": 0.1})
        recorder.record(2, {"reward/mean": math.nan, "reward/std": 1.0, "kl": 0.2})
    assert "reward +0.250 (step 1) · KL 0.200 (step 2)" in page_of(folder)[1].text


def test_models_and_data_are_those_of_the_stages_that_ran(folder: Path) -> None:
    with recording(folder, "test-data", "ppo") as recorder:
        recorder.record(1, {"kl": 0.1})
    write_evaluation(folder, count=6)
    _, page = page_of(folder)
    assert "with responses of the model before PPO" in page.text, "there was no SFT stage, though the config has one"
    assert "data/prompts.jsonl" in page.text.partition("Stages")[0]
    assert "data/sft.jsonl" not in page.text.partition("Stages")[0]


@pytest.mark.parametrize(
    ("record", "present", "absent"),
    [(record_sft, "sft", ("rm", "ppo")), (record_rm, "rm", ("sft", "ppo")), (record_ppo, "ppo", ("sft", "rm"))],
)
def test_stages_that_did_not_run_are_left_out(
    folder: Path, record: Callable[[Path], None], present: str, absent: tuple[str, str]
) -> None:
    record(folder)
    _, page = page_of(folder)
    assert present in page.ids
    assert not set(absent) & set(page.ids)
    assert "before-after" not in page.ids
    assert "samples" not in page.ids


def test_a_run_that_has_just_begun_has_a_page(folder: Path) -> None:
    with recording(folder, "test-data", "ppo") as recorder:
        recorder.record(1, {"reward/mean": 0.1, "reward/std": math.nan, "kl": 0.0, "seconds/train": 2.0})
    assert "ppo" in page_of(folder)[1].ids


def test_a_step_without_finite_numbers_leaves_a_gap(folder: Path) -> None:
    with recording(folder, "test-data", "ppo") as recorder:
        for step in range(1, 5):
            recorder.record(
                step, {"reward/mean": math.nan if step == 2 else 0.1, "reward/std": 1.0, "entropy": math.inf}
            )
    _, page = page_of(folder)
    assert "Reward" in page.text
    assert "Entropy" not in page.text
    assert "nan" not in page.text.lower()


def test_one_held_out_prompt_has_no_interval(folder: Path) -> None:
    write_evaluation(folder, count=1)
    _, page = page_of(folder)
    assert "before-after" in page.ids
    assert "inf" not in page.text


def test_names_of_rewards_are_text_not_markup_or_mathematics(folder: Path) -> None:
    function = {"kind": "function", "name": "<b>$x$", "function": "tests.support.micro:short"}
    ppo = CONFIG["ppo"] | {"rewards": [{"kind": "model"}, function]}  # type: ignore[operator]
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"ppo": ppo}))
    with recording(folder, "test-data", "ppo") as recorder:
        for step in (1, 2):
            recorder.record(step, {"reward/mean": 0.5, "reward/std": 1.0, "reward/<b>$x$": 0.3, "reward/model": 0.2})
    html, page = page_of(folder)
    assert "<b>$x$" in page.text
    assert "<b>$x$" not in html


def test_evaluations_of_other_prompts_are_refused(folder: Path) -> None:
    write_evaluation(folder, count=8)
    path = folder / "evaluation" / "after.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(ValueError, match=r"after\.jsonl:2: not the prompt of "):
        write_report(folder)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"7 prompts, but .*before\.jsonl has 8"):
        write_report(folder)


def test_writing_again_gives_the_same_page(whole: Path, whole_page: tuple[str, Page]) -> None:
    assert page_of(whole)[0] == whole_page[0]


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("count", "quantile", "tolerance"),
    [
        (2, 12.7062, 1e-5),
        (3, 4.3027, 1e-5),
        (4, 3.1824, 2e-3),
        (6, 2.5706, 2e-4),
        (11, 2.2281, 2e-5),
        (31, 2.0423, 2e-5),
        (256, 1.9693, 2e-5),
        (10001, 1.9602, 2e-5),
    ],
)
def test_interval_widths_are_those_of_the_printed_t_table(count: int, quantile: float, tolerance: float) -> None:
    values = [random.Random(number).gauss(3, 2) for number in range(count)]
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(fmean(values))
    scale = stdev(values) / math.sqrt(count)
    assert (interval.high - interval.mean) / scale == pytest.approx(quantile, rel=tolerance)
    assert (interval.mean - interval.low) / scale == pytest.approx(quantile, rel=tolerance)


def test_a_known_interval() -> None:
    # Mean 3, deviation sqrt(2.5), t(4) = 2.7764: 3 +- 2.7764 * sqrt(2.5 / 5).
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.0368, 4.9632), abs=1e-3)
    assert mean_interval([7.0]) == (7.0, -math.inf, math.inf)


def test_pairing_removes_what_prompts_have_in_common() -> None:
    before = [float(number) for number in range(100)]
    after = [value + 1 for value in before]
    assert paired_interval(before, after) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="shorter"):
        paired_interval(before, after[1:])


def test_intervals_cover_the_truth_95_times_in_100() -> None:
    noise = random.Random(7)
    intervals = (mean_interval([noise.gauss(0, 1) for _ in range(8)]) for _ in range(4000))
    assert sum(interval.low <= 0 <= interval.high for interval in intervals) / 4000 == pytest.approx(0.95, abs=0.012)


def test_distinct_share() -> None:
    assert distinct_share(["a", "a ", "b", "c"]) == 0.75
    assert distinct_share(["x"] * 10) == 0.1
    for empty in (distinct_share, mean_interval):
        with pytest.raises(ValueError, match=f"{empty.__name__}: no"):
            empty([])
