"""Kinds of settings that plugins add."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from configs.annotations import kind_of_child, kind_of_field
from configs.extensions import settings_kind
from configs.schema import Settings


class Round(Settings):
    kind: Literal["round"] = "round"


class Square(Settings):
    kind: Literal["square"] = "square"


Shape = Annotated[Round | Square, Field(discriminator="kind")]


class Drawing(Settings):
    frame: Annotated[Round | Square, Field(discriminator="kind")] = Round()
    shapes: Annotated[list[Shape], Field(min_length=1)] = [Round()]


@pytest.fixture
def owner() -> type[Settings]:
    class Own(Drawing):
        pass

    return Own


@pytest.mark.parametrize(("field", "wrap"), [("frame", lambda value: value), ("shapes", lambda value: [value])])
def test_a_field_and_the_items_of_a_list_get_a_further_kind(owner: type[Settings], field: str, wrap) -> None:
    with pytest.raises(ValidationError):
        owner.model_validate({field: wrap({"kind": "star"})})

    @settings_kind(owner, field)
    class Star(Settings):
        kind: Literal["star"] = "star"
        points: int = 5

    for given, made in ({"kind": "star", "points": 6}, Star(points=6)), ({"kind": "square"}, Square()):
        assert getattr(owner.model_validate({field: wrap(given)}), field) == wrap(made)
    assert owner.model_validate({}) == owner.model_validate(owner.model_validate({}).model_dump())
    with pytest.raises(ValidationError, match="Input tag 'sta' found"):
        owner.model_validate({field: wrap({"kind": "sta"})})
    held = kind_of_field(owner, field)
    assert list((kind_of_child(held, 0) or held).models) == ["round", "square", "star"]


@pytest.mark.parametrize("field", ["frame", "shapes"])
def test_a_kind_that_is_there_is_not_replaced(owner: type[Settings], field: str) -> None:
    taken = type("Taken", (Settings,), {"__annotations__": {"kind": Literal["round"]}, "kind": "round"})
    taken.__module__ = "elsewhere"
    with pytest.raises(ValueError, match=rf"{field}: the kind 'round' is already used by .*\.Round"):
        settings_kind(owner, field)(taken)


def test_a_list_still_needs_its_items(owner: type[Settings]) -> None:
    @settings_kind(owner, "shapes")
    class Star(Settings):
        kind: Literal["star"] = "star"

    with pytest.raises(ValidationError, match="at least 1 item"):
        owner.model_validate({"shapes": []})
