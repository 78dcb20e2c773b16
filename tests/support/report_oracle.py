"""Every number of a report, computed again from the files of the run's folder, without the report's own code."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

T_975 = {6: 2.5706, 256: 1.9693}
"""Number of values -> 0.975 quantile of Student's t with one degree of freedom less, from a printed table."""
TITLES = {"sft": "Supervised fine-tuning", "rm": "Reward model", "ppo": "PPO"}
Row = dict[str, Any]


def json_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Report:
    """The values on a report's page, and the files in its folder."""

    def __init__(self, folder: Path) -> None:
        page = (folder / "report.html").read_text()
        tiles = re.findall(r'<div class="tile"><p>(.*?)</p><b>(.*?)</b><p>(.*?)</p></div>', page)
        self.tiles = {html.unescape(a): (html.unescape(b), html.unescape(c)) for a, b, c in tiles}
        self.facts = {a: html.unescape(b) for a, b in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)}
        rows = re.findall(r'<th scope="row">(.*?)</th>' + r'<td data-label=".*?">(.*?)</td>' * 3, page)
        self.rows = {html.unescape(name): list(map(html.unescape, cells)) for name, *cells in rows}
        leads = re.findall(r'<section id="(\w+)">\s*<h2>.*?</h2>\s*<p class="lead">(.*?)</p>', page)
        self.leads = {key: html.unescape(text) for key, text in leads}
        figures = re.findall(
            r"<h3>(.*?)</h3>\s*<div.*?>(<svg.*?</svg>)\s*</div>.*?<figcaption>(.*?)</figcaption>", page, re.S
        )
        self.captions = {title: html.unescape(caption) for title, _, caption in figures}
        self.texts = {title: re.findall(r"<text[^>]*>(.*?)</text>", svg) for title, svg, _ in figures}
        answers = re.findall(r'<span class="score[^"]*">(.*?)</span></p><p class="text">(.*?)</p>', page, re.S)
        self.answers = [(number(score), html.unescape(text)) for score, text in answers]
        self.config = yaml.safe_load((folder / "config.yaml").read_text())
        self.metrics = json_lines(folder / "metrics.jsonl")
        self.before, self.after = (json_lines(folder / "evaluation" / f"{name}.jsonl") for name in ("before", "after"))
        self.kept = json_lines(folder / "samples" / "ppo.jsonl")
        self.seconds = json.loads((folder / "summary.json").read_text())["seconds"]

    def values(self, stage: str, metric: str) -> list[tuple[int, float]]:
        values = [(line["step"], line.get(metric)) for line in self.metrics if line["stage"] == stage]
        return [(step, value) for step, value in values if value is not None]

    def steps(self, stage: str) -> int:
        return max([line["step"] for line in self.metrics if line["stage"] == stage], default=0)


def number(text: str) -> float:
    """The first number of a text."""
    match = re.search(r"[+−-]?[\d,]*\.?\d+(e[+-]\d+)?", text)
    assert match, text
    return float(match[0].replace(",", "").replace("−", "-"))


def numbers(text: str) -> list[float]:
    return [float(one.replace("−", "-").replace(",", "")) for one in re.findall(r"[+−]?[\d,]*\.\d+|[+−]?\d+", text)]


def check_report(folder: Path) -> None:
    """Fails if a number of the report differs from the files."""
    report = Report(folder)
    _check_header(report)
    _check_before_after(report)
    _check_training(report)
    _check_charts(report)
    _check_answers(report)


def _check_header(report: Report) -> None:
    stages = [stage for stage in TITLES if report.steps(stage)]
    for stage in stages:
        assert f"{TITLES[stage]} ({report.steps(stage):,} steps" in report.facts["Stages"]
        assert report.leads[stage].startswith(f"{report.steps(stage):,} steps")
    total = round(sum(report.seconds.values()))
    assert report.facts["Duration"].startswith(f"{total // 60}:{total % 60:02d} (")


def _check_before_after(report: Report) -> None:
    pairs = list(zip(report.before, report.after, strict=True))
    measures = {"Reward": [(a["reward"], b["reward"]) for a, b in pairs]}
    for judge in report.before[0]["judges"]:
        measures[f"Judge: {judge}"] = [(a["judges"][judge], b["judges"][judge]) for a, b in pairs]
    for name, scores in measures.items():
        values = np.array([pair for pair in scores if None not in pair], float)
        full = len(values) == len(pairs)
        (cells,) = [cells for label, cells in report.rows.items() if label.partition(" (")[0] == name]
        assert full or f"{name} ({len(values)} of {len(pairs)} prompts have both scores)" in report.rows
        _check_cells(cells, values, 1.1e-3)
        gain = values[:, 1].mean() - values[:, 0].mean()
        if name == "Reward":
            assert number(report.tiles["Reward gain (std), held out"][0]) == pytest.approx(
                gain / values[:, 0].std(ddof=1), abs=0.006
            )
        else:
            assert number(report.tiles[f"Judge {name[7:]}, held out"][0]) == pytest.approx(gain, abs=6e-4)
    _check_cells(
        report.rows["Tokens per response"], np.array([(a["tokens"], b["tokens"]) for a, b in pairs], float), 0.06
    )
    kl = [_kl(lines) for lines in (report.before, report.after)]
    assert list(map(number, report.rows["KL to the reference, nats per token"][:2])) == pytest.approx(kl, abs=6e-4)
    assert number(report.tiles["KL to the reference"][0]) == pytest.approx(kl[1], abs=6e-4)
    shares = [len({line["answer"].strip() for line in lines}) / len(lines) for lines in (report.before, report.after)]
    for shown, share in zip(report.rows["Distinct responses"], shares, strict=False):
        _check_percent(shown, share)
    value, detail = report.tiles["Distinct responses"]
    _check_percent(value, shares[1])
    assert number(detail) == len(report.after)


def _check_cells(cells: Sequence[str], values: np.ndarray, tolerance: float) -> None:
    """Before, after and change, each with its 95% interval."""
    for cell, column in zip(cells, (values[:, 0], values[:, 1], values[:, 1] - values[:, 0]), strict=True):
        half = T_975[len(column)] * column.std(ddof=1) / math.sqrt(len(column))
        expected = [column.mean(), column.mean() - half, column.mean() + half]
        assert numbers(cell) == pytest.approx(expected, abs=tolerance + 1e-3 * half)


def _check_percent(shown: str, share: float) -> None:
    """Right to its last digit, and 100% or 0% only where that is true."""
    assert shown.endswith("%")
    digits = len(shown.rstrip("%").partition(".")[2])
    assert number(shown) == pytest.approx(100 * share, abs=0.51 * 10**-digits)
    assert (number(shown) in (0, 100)) == (share in (0, 1))


def _kl(lines: Sequence[Row]) -> float:
    tokens = np.array([line["tokens"] for line in lines], float)
    return float(np.array([line["kl"] for line in lines]) @ tokens / tokens.sum())


def _check_training(report: Report) -> None:
    accuracy = report.values("rm", "validation/accuracy")
    value, detail = report.tiles["Preference accuracy, held out"]
    _check_percent(value, accuracy[-1][1])
    assert number(detail) == accuracy[-1][0]
    perplexity = report.values("sft", "validation/perplexity")
    value, detail = report.tiles["Validation perplexity"]
    assert number(value) == pytest.approx(perplexity[-1][1], abs=0.06)
    assert f"after step {perplexity[-1][0]:,}" in detail
    if len(perplexity) > 1:
        assert f"{perplexity[0][1]:,.1f} after step {perplexity[0][0]:,}" in detail
    gaps = report.values("ppo", "logprob_mismatch")
    value, detail = report.tiles["Largest logprob mismatch"]
    assert number(value) == pytest.approx(max(gap for _, gap in gaps), rel=0.06)
    assert f"largest of {len(gaps)} steps" in detail
    speeds = [(step, speed) for step, speed in report.values("ppo", "tokens_per_second") if step > 1]
    value, detail = report.tiles["PPO speed"]
    assert number(value) == pytest.approx(np.median([speed for _, speed in speeds]), abs=0.6)
    assert f"median of steps 2 to {speeds[-1][0]:,}" in detail
    shown = (
        ("sft", "validation/loss", 3),
        ("rm", "validation/accuracy", 1),
        ("ppo", "reward/mean", 3),
        ("ppo", "kl", 3),
    )
    for stage, metric, digits in shown:
        step, last = report.values(stage, metric)[-1]
        percent = "100%" if last == 1.0 else f"{100 * last:.1f}%"
        text = percent if digits == 1 else f"{last:.{digits}f}".replace("-", "−")
        assert re.search(rf"{re.escape(text)}[^·]*\(step {step:,}\)", report.leads[stage]), report.leads[stage]


def _check_charts(report: Report) -> None:
    """Axes, legends and captions of the charts over PPO's steps."""
    seconds = dict(report.values("ppo", "seconds/step"))
    median = np.median([value for step, value in seconds.items() if step > 1])
    caption = report.captions["Seconds of a step"]
    assert number(caption) == pytest.approx(median, abs=0.06)
    assert f"median of steps 2 to {max(seconds)}" in caption
    words = [text for text in report.texts["Seconds of a step"] if text.isalpha()]
    assert words.count("step") == 1, "only the axis: the whole step is not one of its own parts"
    rewards = report.config["ppo"].get("rewards", [])
    names = [reward.get("name", "model") for reward in rewards] if len(rewards) > 1 else []
    assert [text for text in report.texts.get("Reward by source", []) if text.isalpha() and text != "step"] == names


def _check_answers(report: Report) -> None:
    count = report.config["ppo"]["evaluation"].get("samples", 16)
    expected = [
        (line["reward"], line["answer"]) for pair in zip(report.before, report.after, strict=True) for line in pair
    ]
    last = report.kept[-1]["step"] if report.kept else None
    kept = [(line["reward"], line["answer"]) for line in report.kept if line["step"] == last][:4]
    expected = expected[: 2 * count] + kept
    assert [answer for _, answer in report.answers] == [answer for _, answer in expected]
    assert [reward for reward, _ in report.answers] == pytest.approx([reward for reward, _ in expected], abs=0.006)
    if kept:
        assert f"step {last:,}" in report.leads["training"].lower()
