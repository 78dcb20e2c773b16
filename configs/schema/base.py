"""Shared by all settings: their base class, names of roles, types of values."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from configs.annotations import DisplayName

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
"""How to treat rows that are too long."""

FunctionPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"), DisplayName("module:function")]


def with_home(path: str) -> str:
    """A path with `~` or `~name` replaced by the home folder. Done when settings are read, so that workers on nodes with another
    home, and a resumed run, have the same path. Raises ValueError where the user does not exist."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"was {path!r}, but this machine has no user {path.partition('/')[0]}")
    if "\0" in path:
        raise ValueError(f"was {path!r}; a path cannot contain a null character")
    return expanded


FilePath = Annotated[str, Field(min_length=1), AfterValidator(with_home), DisplayName("path")]
ModelPath = Annotated[str, Field(min_length=1), AfterValidator(with_home), DisplayName("folder or hub name")]


class Settings(BaseModel):
    """Base class of all settings: unknown keys are refused, docstrings are descriptions."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)
