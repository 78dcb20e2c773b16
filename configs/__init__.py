"""Every setting of a run: typed, validated and documented in one place."""

import troupe.imports  # noqa: F401  before any other import of ours
from configs.load import ConfigError, load_config, save_config
from configs.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "load_config", "save_config"]
