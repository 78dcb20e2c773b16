"""Every setting of a run: typed, validated and documented in one place.

`configs.schema` exports the classes of the sections, `configs.extensions` what plugins need to add settings.
"""

import troupe.imports  # noqa: F401  before any other import of ours
from configs.load import ConfigError, load_config, save_config
from configs.schema import ROLES, Role, RunConfig, Strategy
from configs.zero import ZERO, StateLocation, Zero

__all__ = [
    "ROLES",
    "ZERO",
    "ConfigError",
    "Role",
    "RunConfig",
    "StateLocation",
    "Strategy",
    "Zero",
    "load_config",
    "save_config",
]
