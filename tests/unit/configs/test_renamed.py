"""Settings given by names that they had before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, load_config, save_config
from configs.reference import describe
from configs.renamed import RENAMED, OldNames, Renamed, log_rename

TABLE = (
    Renamed("old", "new"),
    Renamed("a.list[].x", "a.list[].y"),
    Renamed("a.flat", "a.deep.flat"),
    Renamed("mode", "mode", lambda mode: {"kind": mode} if isinstance(mode, str) else mode),
    Renamed("speed", "pace", lambda speed: {"fast": "quick"}.get(speed, speed)),
)


@pytest.fixture(autouse=True)
def _no_notices_yet() -> None:
    log_rename.cache_clear()


def names() -> OldNames:
    return OldNames(renamed=TABLE)


def test_every_new_name_is_a_setting_and_no_old_one_is() -> None:
    there = {setting.path for setting in describe()}
    assert RENAMED
    for one in RENAMED:
        assert one.new in there, one.new
        assert one.old == one.new or one.old not in there, one.old
        assert one.old.count("[]") == one.new.count("[]")
        assert one.old.rpartition("[]")[0] == one.new.rpartition("[]")[0]


@pytest.mark.parametrize(
    ("given", "renamed"),
    [
        ({"old": {"z": 1}}, {"new": {"z": 1}}),
        ({"a": {"list": [{"x": 1}, {"w": 2}, {"x": 3, "y2": 4}]}}, {"a": {"list": [{"y": 1}, {"w": 2}, {"y2": 4, "y": 3}]}}),
        ({"a": {"flat": 1}}, {"a": {"deep": {"flat": 1}}}),
        ({"a": {"flat": 1, "deep": {"other": 2}}}, {"a": {"deep": {"other": 2, "flat": 1}}}),
        ({"mode": "m"}, {"mode": {"kind": "m"}}),
        ({"speed": "fast"}, {"pace": "quick"}),
        ({"b": ["${old.z}", "${a.list.1.x}${old}", "${older}"]}, {"b": ["${new.z}", "${a.list.1.y}${new}", "${older}"]}),
        ({"a": None, "old": None}, {"a": None, "new": None}),
    ],
)  # fmt: skip
def test_a_tree_gets_new_names(given: dict[str, Any], renamed: dict[str, Any]) -> None:
    before = repr(given)
    assert names().in_tree(given) == renamed
    assert repr(given) == before, "a copy"
    assert names().in_tree(renamed) == renamed


@pytest.mark.parametrize(
    ("key", "value", "renamed"),
    [
        ("old.z", "1", ("new.z", "1")),
        ("a.list.2.x", "1", ("a.list.2.y", "1")),
        ("a.list", [{"x": 1}], ("a.list", [{"y": 1}])),
        ("a.list.0", {"x": 1}, ("a.list.0", {"y": 1})),
        ("a", {"flat": 1}, ("a", {"deep": {"flat": 1}})),
        ("a.flat", "1", ("a.deep.flat", "1")),
        ("mode", "m", ("mode", {"kind": "m"})),
        ("mode.kind", "m", ("mode.kind", "m")),
        ("speed", "fast", ("pace", "quick")),
        ("b", "${old.z}", ("b", "${new.z}")),
    ],
)
def test_an_override_gets_new_names(key: str, value: Any, renamed: tuple[str, Any]) -> None:
    assert names().in_override(key, value) == renamed


def test_both_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a\.list\.1\.y: is given by its old name a\.list\.1\.x too$"):
        names().in_tree({"a": {"list": [{}, {"x": 1, "y": 2}]}})
    for first, second in (("old.z", "new.z"), ("new.z", "old.z")):
        given = names()
        given.in_override(first, 1)
        given.in_override(first, 2)  # the later one counts, as for any setting
        with pytest.raises(ValueError, match=r"^new\.z: is given by its old name old\.z too$"):
            given.in_override(second, 1)


def test_a_notice_for_each_old_name_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "troupe")
    for _ in range(2):
        given = names()
        given.in_tree({"old": {}, "new2": 1, "a": {"list": [{"x": 1}, {"x": 2}]}, "mode": {"kind": "m"}})
        given.in_override("old.z", 1)
    OldNames(notify=False, renamed=TABLE).in_tree({"speed": "fast"})
    assert [record.getMessage() for record in caplog.records] == [
        "old is now new; the old name goes with the next release",
        "a.list[].x is now a.list[].y; the old name goes with the next release",
    ]


# ---------------------------------------------------------------- the table

OLD = """
name: run
model: {path: some/model, lora: {}}
share: [actor, reference]
deadlines: {first: 100, least: 5, patience: 2, publish: 7}
recovery: {restarts: 1, window: 10, grace: 3, refused_steps: 4}
publish: {bucket_mib: 8}
sft: {train: {path: p}, optimizer: {lr: 1, refuse_grad_norm: 10}}
ppo:
  prompts: {path: p}
  steps: 3
  kl: {place: loss, estimator: k2, control: {kind: adaptive}}
  refuse_kl: 4
  max_log_prob_gap: 0.5
  actor_optimizer: {lr: 1, refuse_grad_norm: 12}
  critic_optimizer: ${ppo.actor_optimizer}
  gae_lambda: ${ppo.max_log_prob_gap}
"""


def test_a_file_with_old_names_loads(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(OLD)
    config = load_config(path, ["recovery.restarts=2", "deadlines={first: 50}", "ppo.kl.control.target=0.25"])
    assert (config.shared_base, config.weight_sync.bucket_mib) == (["actor", "reference"], 8)
    assert (config.deadlines.initial_timeout, config.deadlines.min_timeout) == (50, 60)
    recovery = config.recovery
    found = recovery.max_restarts, recovery.restart_window, recovery.stop_grace, recovery.max_skipped_steps
    assert found == (2, 10, 3, 4)
    ppo, sft = config.ppo, config.sft
    assert ppo and ppo.critic_optimizer and sft
    assert (ppo.kl.apply_to, ppo.kl.controller.kind, ppo.kl.controller.coefficient) == ("loss", "adaptive", 0.1)
    assert getattr(ppo.kl.controller, "target") == 0.25  # noqa: B009  of an adaptive one
    assert (ppo.max_kl_per_step, ppo.max_logprob_mismatch, ppo.gae_lambda) == (4, 0.5, 0.5)
    norms = [optimizer.skip_grad_norm for optimizer in (sft.optimizer, ppo.actor_optimizer, ppo.critic_optimizer)]
    assert norms == [10, 12, 12]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert "refuse_" not in (tmp_path / "saved.yaml").read_text()
    assert load_config(path, ["deadlines.weight_sync=9"]).deadlines.weight_sync == 9, "new names may override old ones"


def test_errors_name_the_new_path_and_the_old_one_where_it_was_used(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(OLD.replace("bucket_mib: 8", "bucket_mb: 8"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["recovery.restarts=-1", "deadlines.min_timeout=x", "share=[critic]", "shared_base=[actor]"])
    assert sorted(caught.value.problems) == [
        'deadlines.min_timeout: was "x"; must be number > 0',
        "recovery.max_restarts: was -1; must be integer >= 0 (given as recovery.restarts)",
        "shared_base: is given by its old name share too",
        "weight_sync.bucket_mb: no such setting; did you mean bucket_mib? (given as publish.bucket_mb)",
    ]
