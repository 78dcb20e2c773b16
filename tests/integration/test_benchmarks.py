"""The benchmarks refuse arguments that would fail later."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from tests.support.runs import ROOT

REFUSED = [
    ("chaos", "--steps=20", "greater than or equal to 30"),
    ("chaos", "--faults=0", "greater than or equal to 1"),
    ("chaos", "--recipe=nowhere.yaml", "does not exist"),
    ("chaos", "--recipe=README.md", "not YAML"),
    ("dtypes", "--recipe=nowhere.yaml", "does not exist"),
    ("logits", "--repetitions=0", "greater than or equal to 1"),
    ("logits", "--side=half", "is not one of 'chunks'"),
    ("predicted", "--only=nothing", "no case's name contains 'nothing'"),
    ("predicted", "--json=nowhere/x.json", "the folder nowhere does not exist"),
    ("ppo_step", "--model=nowhere", "must be a folder with a Llama model"),
    ("ppo_step", "--layout=odd", "is not one of 'separate'"),
]


def benchmark(name: str, argument: str) -> Result:
    """Run `python -m benchmarks.<name>` with the argument."""
    command = typer.Typer()
    command.command()(import_module(f"benchmarks.{name}").main)
    return CliRunner().invoke(command, [argument])


def refused(result: Result, option: str, message: str) -> None:
    assert result.exit_code == 2, result.output
    output = " ".join(result.stderr.replace("\u2502", " ").split())
    assert message in output
    assert option in output


@pytest.mark.parametrize(("name", "argument", "message"), REFUSED)
def test_what_a_benchmark_cannot_do_is_refused_at_once(
    name: str, argument: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    refused(benchmark(name, argument), argument.partition("=")[0], message)


def test_missing_data_of_a_benchmark_is_an_error_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "configs/movies/tiny.yaml").read_text().replace("data/movies", f"{tmp_path}/movies"))
    refused(
        benchmark("chaos", f"--recipe={recipe}"),
        "--recipe",
        "does not exist; python -m examples.movies prepare creates",
    )


@pytest.mark.parametrize("arguments", [("bench", "--json"), ("plan", "--model=s", "--picture")])
def test_a_file_that_could_not_be_written_at_the_end_is_refused_at_once(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    for place, message in ((tmp_path / "none" / "x.html", "does not exist"), (tmp_path, "which is a folder")):
        refused(CliRunner().invoke(app, [*arguments, str(place)]), arguments[-1], message)
