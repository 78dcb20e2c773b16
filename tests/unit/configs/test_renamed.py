"""Settings given by names that they had before."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from configs.reference import describe
from configs.renamed import RENAMED, OldNames, Renamed, _told

TABLE = (
    Renamed("old", "new"),
    Renamed("a.list[].x", "a.list[].y"),
    Renamed("a.flat", "a.deep.flat"),
    Renamed("mode", "mode", lambda mode: {"kind": mode} if isinstance(mode, str) else mode),
    Renamed("speed", "pace", lambda speed: {"fast": "quick"}.get(speed, speed)),
)


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    _told.cache_clear()


def names() -> OldNames:
    return OldNames(renamed=TABLE)


def test_every_new_name_is_a_setting_and_no_old_one_is() -> None:
    there = {setting.path for setting in describe()}
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
    OldNames(tell=False, renamed=TABLE).in_tree({"speed": "fast"})
    assert [record.getMessage() for record in caplog.records] == [
        "old is now new; the old name goes with the next release",
        "a.list[].x is now a.list[].y; the old name goes with the next release",
    ]
