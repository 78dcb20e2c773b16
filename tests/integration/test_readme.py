"""Commands and snippets of the documents: every command exists, every snippet runs as far as possible."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from configs import ConfigError, load_config
from orchestrator.cli import app
from tests.support.micro import write_micro

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
STAGES = ("sft", "rm", "ppo", "pipeline")
SYSTEM = ("cd", "docker", "export", "git", "source")
"""Commands of other projects, which are not parsed here."""
USAGE_ERROR: Any = typer.BadParameter.__base__


class Block(NamedTuple):
    document: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = []
    for path in DOCUMENTS:
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            if language in languages:
                found.append(Block(path.name, language, text))
    return found


def commands() -> Iterator[tuple[str, ...]]:
    """Each command of the shell blocks, of which comments, assignments before it and redirections are left out."""
    for block in blocks("bash", "sh", "shell"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in re.split(r" && | > \S+", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    del words[0]
                if words:
                    yield tuple(words)
    for path in DOCUMENTS:  # commands in running text
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for inline in re.findall(r"`((?:troupe(?![/.])|make|python -m|\.venv/bin/)[^`]*)`", " ".join(text.split())):
            yield tuple(shlex.split(inline.partition(" > ")[0]))


def troupe(*args: str) -> None:
    """Parse as `troupe` does, without running; settings of configs that are there must be accepted."""
    group: Any = get_command(app)
    if not args:
        return  # spoken of
    name, command, rest = group.resolve_command(group.make_context("troupe", list(args)), list(args))
    if not rest or "--help" in rest:
        return  # spoken of
    rest = ["configs/movies/tiny.yaml" if word == "CONFIG" else word for word in rest]
    context = command.make_context(name, list(rest))
    if name in (*STAGES, "plan") and not context.params.get("model"):
        assert context.params["config"].is_file(), context.params["config"]
        load_config(context.params["config"], context.params["overrides"] or [])


def python(*args: str) -> None:
    if args[0] == "-c":
        compile(args[1], "-c", "exec")
        return
    assert args[0] == "-m"
    module, rest = args[1], list(args[2:])
    assert importlib.util.find_spec(module), module
    if module == "orchestrator.cli":
        troupe(*rest)
    elif module == "examples.movies" or (module.startswith("benchmarks.") and rest):
        done = subprocess.run([sys.executable, "-m", module, *rest, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        assert not rest or rest[0].isupper(), f"no parser is known here for {module} {rest}"


def make(*args: str) -> None:
    targets = [word for word in args if "=" not in word]
    for target in targets:
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    known = re.findall(r"\$\{(\w+):-", (ROOT / ".ci" / "setup").read_text())  # make hands its variables on to it
    assert {word.partition("=")[0] for word in args if "=" in word} <= set(known)


def ray(*args: str) -> None:
    from ray.scripts.scripts import cli

    if args[:2] == ("job", "submit"):
        entrypoint = args[args.index("--") + 1 :]
        check(entrypoint)
    group, rest = cli, list(args)
    while hasattr(group, "commands"):
        group = group.commands[rest.pop(0)]
    if rest:
        group.make_context("ray", rest)


def check(words: tuple[str, ...]) -> None:
    head, rest = Path(words[0]).name, words[1:]
    parsers = {"troupe": troupe, "python": python, "make": make, "ray": ray}
    if head in parsers:
        parsers[head](*rest)
    else:
        assert head in (*SYSTEM, "pre-commit", "tensorboard"), f"unknown command: {shlex.join(words)}"
    for flag, file in pairwise(words):
        if flag == "-f":
            assert (ROOT / file).is_file(), file


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own parser
@pytest.mark.parametrize("words", sorted(set(commands())), ids=shlex.join)
def test_a_command_exists(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(words)


def test_commands_are_found() -> None:
    found = [shlex.join(words) for words in commands()]
    assert "make demo" in found
    assert "troupe plan configs/movies/tiny.yaml" in found
    assert len(found) > 40


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("troupe pipe configs/movies/tiny.yaml", USAGE_ERROR),
        ("troupe plan configs/movies/tiny.yaml --clusters 1x8cpu", USAGE_ERROR),
        ("troupe ppo configs/movies/tiny.yaml ppo.step=3", ConfigError),
        ("troupe ppo configs/movies/huge.yaml", AssertionError),
        ("python -m examples.movies unprepare", AssertionError),
        ("make everything", AssertionError),
        ("ray job send", KeyError),
        ("vim README.md", AssertionError),
    ],
)
def test_a_command_that_does_not_exist_is_seen(
    line: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(error):
        check(tuple(shlex.split(line)))


CHEAP = {
    words for words in commands() if words[:2] in (("troupe", "plan"), ("troupe", "config")) and "CONFIG" not in words
}


@pytest.mark.parametrize("words", sorted(CHEAP - {("troupe", "plan")}), ids=shlex.join)
def test_a_cheap_command_runs(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, list(words[1:]))
    assert result.exit_code == 0, result.output
    assert result.stdout


# ---------------------------------------------------------------- snippets


@pytest.mark.parametrize(
    "block", blocks("python"), ids=lambda block: f"{block.document}: {block.text.split(chr(10))[0]}"
)
def test_python_compiles_and_its_imports_resolve(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def snippet(containing: str) -> str:
    (found,) = (block.text for block in blocks("python") if containing in block.text)
    return found


@pytest.mark.parametrize("name", ["gspo", "grpo", "token_advantage", "dpo", "reward", "logger"])
def test_the_programs_of_the_guide_are_those_that_tests_run(name: str) -> None:
    guide = (ROOT / "docs" / "algorithms.md").read_text()
    assert (
        f"`tests/plugins/{name}.py`:\n\n```python\n{(ROOT / 'tests' / 'plugins' / name).with_suffix('.py').read_text()}```"
        in guide
    )


def test_the_reward_of_the_readme_works() -> None:
    namespace: dict[str, Any] = {}
    exec(snippet("# my_rewards.py"), namespace)
    assert namespace["brevity"](["p", "p"], ["one two", ""], wanted=[1, 2]) == [-0.2, 0.0]


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.document}: {block.text.split(chr(10))[0]}")
def test_yaml_is_accepted(block: Block, tmp_path: Path) -> None:
    config = yaml.safe_load(write_micro(tmp_path).read_text())
    for section, settings in yaml.safe_load(block.text).items():
        config[section] = config.get(section, {}) | settings if isinstance(settings, dict) else settings
    if "plugins" in config:
        config["plugins"] = [f"tests.plugins.{name}" for name in ("gspo", "grpo", "dpo", "logger")]
        config["ppo"] |= {"kl": {"controller": {"kind": "fixed", "coefficient": 0}}, "critic": False}
    load_config(config)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "settings.md"], ids=lambda path: path.name)
def test_settings_and_files_that_are_named_exist(path: Path) -> None:
    from configs.reference import describe

    settings = {setting.path for setting in describe()}
    sections = {name.partition(".")[0] for name in settings if "." in name}
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text):
        if name.partition(".")[0] in sections and not (ROOT / name).exists():
            assert name in settings, name
    rooms = ("configs", "placement", "workers", "orchestrator", "examples", "benchmarks", "docs", "docker", "tests")
    for name in re.findall(r"`([\w.-]+/[\w./-]*)`", text):
        if name.partition("/")[0] in rooms:
            assert (ROOT / name).exists(), name


def test_the_python_api_is_documented() -> None:
    import orchestrator
    import troupe

    text = "".join((ROOT / "docs" / name).read_text() for name in ("driver.md", "algorithms.md"))
    assert [name for name in {*orchestrator.__all__, *troupe.__all__} if not re.search(rf"\b{name}\b", text)] == []
