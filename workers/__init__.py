"""All that runs inside a Ray actor."""

import troupe.imports  # noqa: F401  before any other import of ours
