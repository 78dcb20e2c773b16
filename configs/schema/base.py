"""What all settings have in common: their base class, names of roles, kinds of values."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from configs.annotations import Called

Role = Literal["actor", "critic", "reference", "reward", "rollout"]
ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward", "rollout")
Shared = Literal["actor", "critic", "reference", "reward"]
"""A role that can share its base with others."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]
MAX_SERVED_RANK = 512
"""Highest rank of an adapter that vLLM serves."""

Overlong = Literal["refuse", "cut", "drop"]
"""What happens to rows that are too long."""

FunctionPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"), Called("module:function")]


def with_home(path: str) -> str:
    """A path with a home folder in place of `~` or `~name`. Done where settings are read, so that workers on other nodes, whose
    home may be another, and a resumed run have the same path. Raises ValueError where no such user is known."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"was {path!r}, but there is no user {path.partition('/')[0]} here")
    if "\0" in path:
        raise ValueError(f"was {path!r}; a path holds no null character")
    return expanded


FilePath = Annotated[str, Field(min_length=1), AfterValidator(with_home), Called("path")]
ModelPath = Annotated[str, Field(min_length=1), AfterValidator(with_home), Called("folder or hub name")]


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, docstrings are descriptions."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)
